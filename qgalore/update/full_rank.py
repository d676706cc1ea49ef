"""One weight followed through an update under plain AdamW: its gradient, its moments and its new value.

The order is the same for `LowRankWeight`: `accumulate` or `accumulate_full` once a micro-batch; `complete` when the
last one is in, which sums over the ranks and holds the sum; `release` takes it for `update`, which is the first to
touch moments, basis or weight.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.grouped_update import LayerUpdate
from qgalore.layer.linear import LowRankLinear
from qgalore.subspace import fit
from qgalore.update import moments
from qgalore.update.directions import DIRECTIONS, Direction
from qgalore.update.gradient_sum import Gradient, GradientAccumulator, dense, rows_of_gradient, zeros
from qgalore.update.moments import GradientStep
from qgalore.update.seeding import mix_seed
from qgalore.update.step_table import StepTable

HOST_STATE = ("step", "schedule", "similarities")
"""What of a weight's state lives on the CPU."""

States = MutableMapping[Tensor, dict[str, Tensor]]
"""`torch.optim.Optimizer.state`: a weight without state has no entry."""

ROUNDING, ACCUMULATION = range(2)
"""What random numbers are for; `LowRankWeight` goes on counting."""


class FullRankWeight:
    """A weight under plain AdamW: embeddings, head, norms, and every weight of an ordinary Adam run."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """seed: that of the run, from which with the step and the index all rounding is seeded."""
        self.param, self.seed = param, seed
        self.layer: LowRankLinear | None = None
        self.name = ""
        self._additions = 0

    def bind(self, group: dict[str, Any], states: States, table: StepTable, index: int, place: int, count: int) -> None:
        """Take up hyperparameters and state: index numbers the weights, place the low-rank ones among `count`.

        states: those of all weights, into which that of this one goes as soon as it has any; table: of all weights.
        """
        self.group, self.index, self._states, self._table = group, index, states, table
        self.state = states.get(self.param, {})
        self.name = self.name or str(index)
        self._sum, self._held = self._accumulator(), self._accumulator()

    @property
    def _sum_dtype(self) -> torch.dtype:
        name: Any = self.group["accumulator_dtype"]
        dtype: torch.dtype = getattr(torch, name, name)
        return dtype

    def _accumulator(self) -> GradientAccumulator:
        return GradientAccumulator(self._sum_dtype)

    def check(self) -> None:
        """Raise ValueError where the weight cannot be trained as its group says."""
        if self.layer is None and not self.param.is_floating_point():
            raise ValueError(
                f"parameter {self.name} is quantized and no LowRankLinear of the model holds it: "
                "call attach(model) with the model whose parameters the optimizer was given"
            )
        if self.param.dtype == torch.float64:
            raise ValueError(f"parameter {self.name} is float64: updates are made in float32; convert the model to it")
        if self.layer is None and not self.param.is_contiguous():
            raise ValueError(f"parameter {self.name} is not contiguous in memory: give the optimizer one that is")
        if "exp_avg" in self.state and self.state["exp_avg"].shape != self.gradient_shape:
            shapes = tuple(self.state["exp_avg"].shape), tuple(self.gradient_shape)
            raise ValueError(
                f"the state of {self.name} is that of a gradient of shape {shapes[0]}, not {shapes[1]}: it was saved "
                "for another model or other param groups"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, whatever its storage."""
        if self.layer is None:
            return self.param.shape
        return torch.Size((self.layer.out_features, self.layer.in_features))

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self.state["step"]) if "step" in self.state else 0

    def _seed(self, purpose: int, *parts: int) -> int:
        return mix_seed(self.seed, self.step, self.index, purpose, *parts)

    def clear(self) -> None:
        """Forget the gradient."""
        self._sum.clear()
        self._held.clear()

    def forms_gradient(self, input: Tensor) -> bool:
        """See `qgalore.layer.gradient_sink.GradientSink`."""
        return True

    def input_basis(self, input: Tensor) -> Tensor | None:
        """See `qgalore.layer.gradient_sink.GradientSink`."""
        return None

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        """Add the gradient of one micro-batch, given as factors (`qgalore.layer.gradient_sink.GradientSink`)."""
        self._add(self._sum, fit.gradient(grad_output, input, (self.shape[0], self.shape[1])))

    def accumulate_full(self, grad: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        if grad.layout != torch.strided:
            raise ValueError(f"parameter {self.name} has a sparse gradient: use a layer with sparse=False")
        self._add(self._sum, grad)

    def _add(self, accumulator: GradientAccumulator, grad: Tensor) -> None:
        self._additions = 0 if accumulator.empty else self._additions + 1
        accumulator.add(grad, self._sum_row(self._additions))

    def _sum_row(self, addition: int) -> Tensor:
        """The step row for a gradient that is added to a sum; addition counts those of the update."""
        if self._sum_dtype == torch.int8:  # others round to nearest
            self._table.write_sum(self.index, self.sum_scalars(addition), self.param.device)
        return self._table.sums[self.index]

    def fix_sum(self, alone: torch.dtype | None = None) -> None:
        """Give the sum of gradients a place of its own, as CUDA graphs need it.

        alone: the dtype of gradients that come alone, which is kept but where sums are in INT8. From then on every
        update begins with `begin_sum`.
        """
        dtype = self._sum_dtype if alone is None or self._sum_dtype == torch.int8 else alone
        self._sum.place = self._held.place = zeros(self.gradient_shape, dtype, self.param.device)

    def begin_sum(self) -> None:
        """Start the sum of an update from zero."""
        self._sum.begin()
        self._additions = -1

    def parts_to_sum(self) -> list[Tensor]:
        """What `complete` needs the sum of over the ranks, in the dtype it has (INT8 sums: float32); not kept here."""
        return [self._sum.take()]

    def complete(self, summed: list[Tensor] | None = None) -> None:
        """Hold the gradient of the update until `release`, in the accumulator's dtype.

        It is made of this rank's micro-batches, or of `parts_to_sum` summed over the ranks.
        """
        if summed is None:
            self._sum, self._held = self._held, self._sum
        else:
            self._held.replace(summed[0], self._sum_row(-1))

    @property
    def complete_gradient(self) -> GradientAccumulator:
        """The gradient of the update, until `release`."""
        return self._held

    def limit_growth(self, squared_norm: Tensor, skip: Tensor) -> Tensor | None:
        """The factor, (), that lets the gradient's norm grow by `norm_growth` at most from update to update.

        After Fira's limiter (Chen et al., arXiv 2410.01623). None where no limit is set. squared_norm and skip are
        those of `UpdateChecks`; a skipped update leaves no trace.
        """
        growth: float = self.group["norm_growth"]
        if not growth:
            return None
        if not self.state:
            self._init_state()
        if "limited_norm" not in self.state:
            self.state["limited_norm"] = torch.zeros((), device=self.param.device)
        before, norm = self.state["limited_norm"], squared_norm.sqrt()
        limited = torch.where(before > 0, torch.minimum(norm, growth * before), norm)
        before.copy_(torch.where(skip, before, limited))
        return limited / norm.clamp_min(1e-30)

    @property
    def accumulates(self) -> bool:
        """Whether a micro-batch has reached the weight since the last complete gradient."""
        return not self._sum.empty

    @property
    def holds_gradient(self) -> bool:
        """Whether a complete gradient waits for the update."""
        return not self._held.empty

    def release(self) -> Gradient:
        """The complete gradient, which is not held any longer."""
        return self._held.take_as_held()

    def _advance(self) -> None:
        if not self.state:
            self._init_state()
        self.state["step"] += 1

    def _init_state(self) -> None:
        self._states[self.param] = self.state
        self.state["step"] = torch.zeros((), dtype=torch.int64)
        bits, device = self.group["state_bits"], self.param.device
        moments.init_moments(self.state, self.gradient_shape, bits, device, self.direction.moments)

    @property
    def direction(self) -> Direction:
        """How the step is made of the gradient."""
        return DIRECTIONS["adam"]

    @property
    def gradient_shape(self) -> torch.Size:
        """Of the gradient that reaches Adam."""
        return self.shape

    @property
    def values_to_sum(self) -> int:
        """Of `parts_to_sum` in an update without a refresh."""
        return self.gradient_shape.numel()

    def update(self, grad: Gradient, factor: Tensor | None = None, skip: Tensor | None = None) -> GradientStep | None:
        """One step on the weight with factor * grad (clipping); grad is what `release` gave.

        Gives what `Direction.steps` makes the direction of, for `apply_direction` and `end_update`; None if the update
        has been made.

        Where the flag `skip` is true weight and state stay as they are, to the bit, but the update counts. On an
        accelerator the flag goes to the kernels, so that nothing waits for the device.
        """
        if not self.state:
            self._init_state()
        on_host = skip is not None and skip.device.type == "cpu"
        if on_host and skip:
            self._advance()
            self.clear()
            return None
        return self._update(grad, factor, None if on_host else skip)

    def apply_direction(self, direction: Tensor) -> LayerUpdate | None:
        """Let an `update` that waits move the weight; gives what `update_layers_` is to do before `end_update`."""
        raise RuntimeError(f"no update of {self.name} waits for a direction")

    def end_update(self) -> None:
        """What an `update` that waited does when its direction has been applied."""
        raise RuntimeError(f"no update of {self.name} waits for its end")

    def _update(self, grad: Gradient, factor: Tensor | None, skip: Tensor | None) -> GradientStep | None:
        """`update` with a flag on the device only."""
        group, row = self.group, self._row
        self._advance()
        if self.layer is not None:
            direction = moments.adam_step(self.state, dense(grad), row, group["betas"], group["eps"], factor, skip)
            self.layer.update_(direction, None, None, row, skip)
            return None
        l2 = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        # In parts, so that no float32 copy of a whole embedding is made.
        param = torch.atleast_1d(self.param.data)
        for start, stop in moments.row_parts(self.state, param.shape):
            weight, part, scale = param[start:stop], rows_of_gradient(grad, start, stop), factor
            if l2:
                part, scale = kernels.scaled(part, factor).add(weight, alpha=l2), None
            state = moments.rows_of(self.state, start, stop)
            direction = moments.adam_step(state, part, row, group["betas"], group["eps"], scale, skip)
            kernels.update_float_(weight, direction, None, None, row, row_start=start, skip=skip)
        return None

    @property
    def changes_subspace(self) -> bool:
        """Whether the next update also refreshes a subspace."""
        return False

    @property
    def _step_size(self) -> float:
        return float(self.group["lr"])

    @property
    def _row(self) -> Tensor:
        """The step row of the update that is being made."""
        return self._table.updates[self.index]

    def update_scalars(self) -> kernels.StepScalars:
        """What the row of the next update has to hold."""
        corrections = [1.0 / (1.0 - beta ** (self.step + 1)) for beta in self.group["betas"]]
        return kernels.StepScalars(self._seed(ROUNDING), self._step_size, self._decay, *corrections)

    def sum_scalars(self, addition: int | None = None) -> kernels.StepScalars:
        """What the row of a gradient that is added has to hold, by default the next one."""
        addition = self._additions + 1 if addition is None else addition
        return kernels.StepScalars(self._seed(ACCUMULATION, addition), -1.0, 1.0)

    def count_replayed_sum(self) -> None:
        """Keep the host's account of a gradient that a CUDA graph has added."""
        self._additions += 1

    def count_replayed_update(self) -> None:
        """Keep the host's account of an update that a CUDA graph has made: it holds no gradient of it."""
        self.state["step"] += 1

    @property
    def _decay(self) -> float:
        group = self.group
        return 1.0 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
