"""An optimizer connected to a model inside somebody else's training loop, which knows nothing of `attach`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qgalore.graphs.updates import UpdateGraphs
from qgalore.integrations.visible_norm import VisibleNorm
from qgalore.optimizer import LowRankAdamW

_connections: weakref.WeakKeyDictionary[LowRankAdamW, Connection] = weakref.WeakKeyDictionary()


class Connection:
    """An optimizer attached for somebody else's loop; `close` undoes it."""

    def __init__(
        self,
        optimizer: LowRankAdamW,
        model: nn.Module,
        update_in_backward: bool,
        follow_accelerate: bool,
        capture_updates: bool,
    ) -> None:
        """Attach; on several ranks gradients are averaged, and the model's tensors become those of the first rank."""
        self._optimizer = weakref.ref(optimizer)
        ranks = _ranks()
        if ranks > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)
        replay = UpdateGraphs() if capture_updates else None
        optimizer.attach(model, update_in_backward, _average if ranks > 1 else None, replay=replay)
        self._norm = VisibleNorm(optimizer, model)
        # Losses that are made of the states of the body, as fused ones are, do not call the model itself.
        bodies = {id(each): each for each in (model, getattr(model, "base_model", None)) if isinstance(each, nn.Module)}
        follow = _BeforeForward(self._optimizer, self._norm, follow_accelerate)
        self._handles: list[RemovableHandle] = [body.register_forward_pre_hook(follow) for body in bodies.values()]

    def close(self) -> None:
        """Let gradients arrive in `.grad` again, as before `connect`.

        Raises RuntimeError where gradients were clipped in the last update and it was made in the backward pass, as far
        as the update itself has not.
        """
        while self._handles:
            self._handles.pop().remove()
        try:
            self._norm.remove()
        finally:
            optimizer = self._optimizer()
            if optimizer is not None:
                optimizer.detach()
                optimizer.is_last_micro_batch = True


def connect(
    optimizer: Any,
    model: nn.Module,
    update_in_backward: bool = False,
    follow_accelerate: bool | None = None,
    capture_updates: bool = False,
) -> Connection:
    """Attach an optimizer to a model that a Trainer, accelerate, Lightning or a loop of one's own trains.

    Beside what `attach` does: `is_last_micro_batch` follows accelerate's gradient accumulation, which a Trainer uses,
    too; gradients are averaged over the ranks of `torch.distributed`, as in `DistributedDataParallel`, which is to be
    left out (`without_ddp`); and clipping by the norm works with the functions of others, which also return the norm
    (`qgalore.integrations.visible_norm`).

    optimizer: a `LowRankAdamW`, or what accelerate has made of it; model: the one on its device that is trained.
    follow_accelerate: None is whether accelerate has prepared the optimizer; else the loop sets the flag.
    capture_updates: on a GPU, make them from CUDA graphs (`qgalore.graphs.updates`): faster where Python is what the
    device waits for, for some memory that is kept. A second call takes the place of the first. Raises TypeError for
    another optimizer, ValueError where `attach` does.
    """
    found = unwrapped(optimizer)
    former = _connections.pop(found, None)
    if former is not None:
        former.close()
    model = model.module if isinstance(model, nn.parallel.DataParallel) else model
    follows = found is not optimizer if follow_accelerate is None else follow_accelerate
    _connections[found] = connection = Connection(found, model, update_in_backward, follows, capture_updates)
    return connection


def unwrapped(optimizer: Any) -> LowRankAdamW:
    """The optimizer inside accelerate's; raises TypeError where it is none of this library."""
    found = optimizer
    while not isinstance(found, LowRankAdamW) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, LowRankAdamW):
        raise TypeError(
            f"{type(found).__name__} is not an optimizer of this library: give a GaLoreAdamW, GaLoreAdamW8bit or "
            "QGaLoreAdamW8bit, to a Trainer as optimizers=(optimizer, None) or by optimizer_cls_and_kwargs="
            "(OptimizerFactory, {...})"
        )
    return found


def without_ddp(model: nn.Module) -> None:
    """Keep accelerate, and so a Trainer, from wrapping a model in `DistributedDataParallel`; on one rank do nothing.

    It would sum the gradients that autograd gives, and `connect` sums those that the optimizer takes. accelerate leaves
    alone what it has prepared itself, which it marks; of what it would do else, autocast is done here.
    """
    if _ranks() == 1 or getattr(model, "_is_accelerate_prepared", False):
        return
    from accelerate.state import AcceleratorState
    from accelerate.utils.operations import convert_outputs_to_fp32

    state = AcceleratorState()
    if state.mixed_precision == "bf16":
        cast = torch.autocast(state.device.type, torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(cast)
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _average(tensor: Tensor) -> dist.Work | None:
    """Sum shares of a tensor over the ranks, in place; gloo cannot average by itself."""
    work: dist.Work | None = dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
    return work


class _BeforeForward:
    """Before a forward pass, tell the optimizer what accelerate knows: whether its micro-batch is the last.

    In a copy of the model, deep or pickled, it does nothing: the copy is connected to no optimizer.
    """

    def __init__(
        self,
        optimizer: weakref.ref[LowRankAdamW] | None = None,
        norm: VisibleNorm | None = None,
        follow_accelerate: bool = False,
    ) -> None:
        self._optimizer, self._norm, self._follow_accelerate = optimizer, norm, follow_accelerate

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, ()

    def __call__(self, *_: object) -> None:
        if self._optimizer is None or self._norm is None:
            return
        self._norm.forget()
        optimizer = self._optimizer()
        if optimizer is not None and self._follow_accelerate:
            from accelerate.state import GradientState

            optimizer.is_last_micro_batch = bool(GradientState().sync_gradients)
