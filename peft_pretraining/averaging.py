"""Average the weights of the last part of a run, in host memory.

The mean is uniform over the weights after every `interval`-th update of the part, the last update among them: latest
weight averaging (Kaddour, arXiv 2209.14981; Sanyal et al., arXiv 2306.03241), which is tail averaging of SGD (Jain et
al., arXiv 1610.03774). An exponential mean of the same centre of mass would give much the same, with a decay that goes
by the interval and the length of the run, and weights from before the part. Successive weights differ little, so at
most `SNAPSHOTS` of them count. A weight that is rounded stochastically carries a rounding error that changes from one
snapshot to the next: of that the mean keeps less than any single one.

Every rank has the same weights, so the main rank alone averages. After an update that counts it queues copies of the
weights as they are stored, codes as codes, into pinned memory: on a GPU they are ordered before the next update, take
no memory there, and the host does not wait. A thread adds them to the mean when they have arrived. The mean is float32,
since n weights in bfloat16 could not tell the n-th from its n - 1 predecessors: 4 bytes a value of host memory, beside
the snapshot's. It is part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_pretraining.config.flag_groups import ScheduleArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.network import CausalLM
from peft_pretraining.runtime.world import World
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import QuantizedTensor, quantize

SNAPSHOTS = 64
"""Weights that the mean is made of, at most."""
_PARTS = ("qdata", "scale", "zero_point")
FLOATS, QUANTIZED = "averaged", "averaged_quantized"
"""Averaged weights as floats in the model's dtype, and rounded to the nearest codes of the run's own format."""


class Window(NamedTuple):
    """The updates after which weights count: the last of all, and every `interval`-th before it after `start`."""

    start: int
    interval: int
    total: int

    def has(self, update_step: int) -> bool:
        """Whether the weights after so many updates count."""
        return self.start < update_step <= self.total and (self.total - update_step) % self.interval == 0

    def count(self, update_step: int) -> int:
        """How many updates up to this one count."""
        later = -((min(update_step, self.total) - self.total) // self.interval)
        return max(0, (self.total - self.start - 1) // self.interval + 1 - later)

    def agrees(self, other: Window, update_step: int) -> bool:
        """Whether the same updates up to this one count in both, as where a run is made longer."""
        return all(self.has(step) == other.has(step) for step in range(update_step + 1))


def window_of(schedule: ScheduleArgs) -> Window | None:
    """The updates that `--average_last` names; None where it is off."""
    updates = schedule.averaged_updates
    if not updates:
        return None
    return Window(schedule.num_training_steps - updates, math.ceil(updates / SNAPSHOTS), schedule.num_training_steps)


class WeightAverage:
    """The running mean of a model's weights; without `--average_last` every method does nothing."""

    def __init__(self, args: RunArgs, world: World, model: CausalLM) -> None:
        """Nothing is allocated before the first update that counts."""
        self._window, self._world, self._model = window_of(args.schedule), world, model
        self._dtype: torch.dtype = getattr(torch, args.model.dtype)
        self._count = 0
        self._mean: dict[str, Tensor] = {}
        self._snapshot: dict[str, Tensor | QuantizedTensor] = {}
        self._thread = ThreadPoolExecutor(1, "average")
        self._added: Future[None] | None = None

    @property
    def forms(self) -> list[str]:
        """Of `FLOATS` and `QUANTIZED`, those in which the averaged weights can be evaluated."""
        if not self._count:
            return []
        quantized = any(layer.format.bits is not None for layer in _low_rank_linears(self._model))
        return [FLOATS, QUANTIZED] if quantized else [FLOATS]

    def after_update(self, update_step: int) -> None:
        """Let the weights after so many updates count, if they are to; does not wait for the device."""
        if self._window is None or not self._window.has(update_step):
            return
        self._count += 1
        if self._world.is_main:
            self._wait()
            self._added = self._thread.submit(self._add, self._take_snapshot(), self._count)

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, on the main rank; None where it is off.

        A mean has the name and shape of each weight in the state dict of a float model.
        """
        if self._window is None:
            return None
        self._wait()
        first = {param: name for name, param in self._model.named_parameters()}
        names = dict(self._model.named_parameters(remove_duplicate=False))  # a tied weight has two
        turned = self._transposed()
        mean = {name: self._mean[first[param]] for name, param in names.items() if first[param] in self._mean}
        mean = {name: value.T.contiguous() if name in turned else value for name, value in mean.items()}
        return {"window": list(self._window), "count": self._count, "mean": mean}

    def load_state_dict(self, state: Mapping[str, Any] | None, update_step: int, source: object) -> None:
        """Go on after update_step with what `state_dict` gave; state is None where the run did not average.

        Raises UserError where weights of this part of the run were not averaged. source: the checkpoint, for the text.
        """
        window = self._window
        if window is None:
            return
        if state is not None and Window(*state["window"]).agrees(window, update_step):
            self._count, turned = state["count"], self._transposed()
            if self._world.is_main:
                mean = {name: state["mean"][name] for name, _ in _stored_weights(self._model) if self._count}
                self._mean = {name: (v.T if name in turned else v).clone() for name, v in mean.items()}
        elif window.count(update_step):
            raise UserError(
                f"--average_last: {source} is after {update_step} updates and has no mean of those from update "
                f"{window.start} on, which this run of {window.total} updates averages: resume from a checkpoint of "
                f"update {window.start} or before, give the --average_last and --num_training_steps of before, or "
                "leave it out"
            )

    @contextlib.contextmanager
    def in_model(self, form: str) -> Iterator[None]:
        """Within it, the model has the averaged weights for an evaluation; after it its own again, to the bit.

        form: one of `forms`. All ranks must enter it: the main one sends the mean. Where quantized layers are to be
        floats, they lie in host memory, and a decoder layer has its own on the device while it runs.
        """
        self._wait()
        arrived = self._take_snapshot()
        if arrived is not None:
            arrived.synchronize()
        floats: dict[str, Tensor] = {}
        hooks: list[Any] = []
        try:
            with torch.no_grad():
                for name, stored in _stored_weights(self._model):
                    value = self._received(name, stored)
                    if isinstance(stored, Tensor):
                        stored.copy_(self._rounded(name, value) if form == QUANTIZED else value)
                    elif form == QUANTIZED:
                        _copy(stored, _quantized_like(stored, value.to(stored.scale.device)))
                    else:
                        floats[name] = _pinned(value.to(self._dtype), stored.scale.is_cuda)
            self._tell_layers()
            if floats:
                hooks = [
                    hook for layer in self._model.decoder_layers for hook in self._float_while_running(layer, floats)
                ]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for name, stored in _stored_weights(self._model):
                    _copy(stored, self._snapshot[name])
            self._tell_layers()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    # ---- averaging

    def _wait(self) -> None:
        """Wait for the thread, and so for what it has waited for, and raise what it has raised."""
        if self._added is not None:
            self._added.result()
            self._added = None

    def _take_snapshot(self) -> torch.cuda.Event | None:
        """Queue copies of all weights to the host; gives the event after which they are there, None if they are."""
        event = None
        with torch.no_grad():
            for name, stored in _stored_weights(self._model):
                if name not in self._snapshot:
                    self._snapshot[name] = _on_host(stored)
                _copy(self._snapshot[name], stored)
                if event is None and _device_of(stored).type == "cuda":
                    event = torch.cuda.Event()
        if event is not None:
            event.record()
        return event

    def _add(self, arrived: torch.cuda.Event | None, count: int) -> None:
        """Add the snapshot to a mean of count - 1."""
        if arrived is not None:
            arrived.synchronize()
        for name, stored in self._snapshot.items():
            value = stored.float() if isinstance(stored, Tensor) else stored.dequantize(torch.float32)
            if name not in self._mean:
                self._mean[name] = torch.zeros_like(value)
            # A weight that stays the same is its own mean, to the bit.
            self._mean[name].add_(value - self._mean[name], alpha=1.0 / count)

    # ---- evaluation

    def _received(self, name: str, stored: Tensor | QuantizedTensor) -> Tensor:
        """A mean, float32 on the CPU, from the main rank."""
        if self._world.world_size == 1:
            return self._mean[name]
        value = self._mean[name].clone() if self._world.is_main else torch.zeros(stored.shape)
        self._world.all_reduce(value)
        return value

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        """The mean of a float parameter, on the grid of its layer where quantization is simulated."""
        layer = self._model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, LowRankLinear) or layer.format.bits is None or not name.endswith(".weight"):
            return value
        return quantize(value, layer.format.bits, layer.group_size).dequantize(self._dtype)

    def _float_while_running(self, decoder_layer: nn.Module, floats: Mapping[str, Tensor]) -> list[Any]:
        """Let the quantized layers of a decoder layer be float ones while it runs; gives the hooks that do so."""
        names = {layer: name for name, layer in self._model.named_modules() if isinstance(layer, LowRankLinear)}
        found = [
            (parent, key, child, floats[f"{names[child]}.weight"])
            for parent in decoder_layer.modules()
            for key, child in parent._modules.items()
            if isinstance(child, LowRankLinear) and f"{names[child]}.weight" in floats
        ]

        def to_floats(*_: object) -> None:
            for parent, key, layer, value in found:
                parent._modules[key] = _linear(layer, value)

        def back(*_: object) -> None:
            for parent, key, layer, _value in found:
                parent._modules[key] = layer

        return [
            decoder_layer.register_forward_pre_hook(to_floats),
            decoder_layer.register_forward_hook(back, always_call=True),
        ]

    def _tell_layers(self) -> None:
        for layer in _low_rank_linears(self._model):
            layer.was_written()

    def _transposed(self) -> set[str]:
        """The names of weights that a state dict has the other way round."""
        modules = self._model.named_modules(remove_duplicate=False)
        return {f"{name}.weight" for name, layer in modules if isinstance(layer, LowRankLinear) and layer.transposed}


def _low_rank_linears(model: nn.Module) -> list[LowRankLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def _stored_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
    """Each parameter once, by its first name: a view of its values, or of its codes with their scales."""
    codes = {layer.weight: layer.quantized_weight for layer in _low_rank_linears(model)}
    for name, param in model.named_parameters():
        quantized = codes.get(param)
        yield name, param.data if quantized is None else replace(quantized, qdata=quantized.qdata.data)


def _device_of(stored: Tensor | QuantizedTensor) -> torch.device:
    return stored.device if isinstance(stored, Tensor) else stored.scale.device


def _on_host(stored: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
    """Memory on the CPU for a copy, pinned where it comes from a GPU."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    if isinstance(stored, Tensor):
        return empty(stored)
    qdata, scale, zero_point = (empty(getattr(stored, part)) for part in _PARTS)
    return replace(stored, qdata=qdata, scale=scale, zero_point=zero_point)


def _copy(to: Tensor | QuantizedTensor, source: Tensor | QuantizedTensor) -> None:
    if isinstance(to, Tensor) and isinstance(source, Tensor):
        to.copy_(source, non_blocking=True)
    elif isinstance(to, QuantizedTensor) and isinstance(source, QuantizedTensor):
        for part in _PARTS:
            _copy(getattr(to, part), getattr(source, part))


def _quantized_like(stored: QuantizedTensor, value: Tensor) -> QuantizedTensor:
    """A float matrix, rounded to the nearest in the format and layout of another."""
    return quantize(value, stored.bits, stored.group_size).with_aligned_rows()


def _pinned(value: Tensor, wanted: bool) -> Tensor:
    return value.pin_memory() if wanted else value


def _linear(layer: LowRankLinear, value: Tensor) -> nn.Linear:
    """A float layer with the bias of a quantized one and another weight, on its device."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(value.to(layer.weight.device, non_blocking=True), requires_grad=False)
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear
