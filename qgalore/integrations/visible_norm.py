"""The norm of an attached optimizer's gradient in the `.grad` of one parameter, where training loops look for it.

An attached optimizer keeps gradients to itself, so a loop that calls `torch.nn.utils.clip_grad_norm_` finds none: it
would log a norm of 0 and clip nothing. After the last backward pass of an update one parameter therefore gets a
`.grad` that is zero but for its first value, the norm of the whole gradient (projected where it is low-rank, summed
over ranks). What clips it by the norm scales that value; `step` takes it away and scales the update likewise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qgalore.optimizer import LowRankAdamW
from qgalore.torch_internals import internal

_AT_END_OF_BACKWARD = "torch.autograd.Variable._execution_engine.queue_callback"


class VisibleNorm:
    """Shows the norm of an optimizer's gradient until `remove`; made after `attach`."""

    def __init__(self, optimizer: LowRankAdamW, model: nn.Module) -> None:
        """Raises ValueError for a model without a float parameter."""
        self._carrier = weakref.ref(_smallest(optimizer, model))
        self._optimizer = weakref.ref(optimizer)
        self._shown: Tensor | None = None
        self._scaled: _HostFlag | None = None
        self._queued = False
        # What holds a hook is out of the garbage collector's sight: it gets weak references only.
        this = weakref.WeakMethod(self._leaf_is_ready)
        self._handles: list[RemovableHandle] = [
            leaf.register_post_accumulate_grad_hook(_calls(this)) for leaf in _leaves(optimizer, model)
        ]
        self._handles.append(optimizer.register_step_pre_hook(_StepHook(weakref.ref(self))))

    def forget(self) -> None:
        """Before a forward pass: wait no longer for the end of a backward pass, as after one that has failed."""
        self._queued = False

    def remove(self) -> None:
        """Show nothing from now on; raises RuntimeError as `take` does, of the last update."""
        self._take_away()
        while self._handles:
            self._handles.pop().remove()
        self._refuse_scaled()

    def _leaf_is_ready(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            internal(_AT_END_OF_BACKWARD)(self._show)

    @torch.no_grad()
    def _show(self) -> None:
        """At the end of a backward pass."""
        self._queued = False
        optimizer, carrier = self._optimizer(), self._carrier()
        if optimizer is None or carrier is None or not optimizer.is_last_micro_batch:
            return
        self._take_away()
        optimizer.collect()
        self._shown = optimizer.grad_norm().to(carrier.device)
        if carrier.dtype != torch.float32:
            carrier.grad_dtype = torch.float32  # the norm in bfloat16 would be logged with two digits
        grad = torch.zeros(carrier.shape, device=carrier.device)
        grad.view(-1)[0] = self._shown
        carrier.grad = grad

    @torch.no_grad()
    def take(self) -> None:
        """Let the update be scaled as the norm was since it was shown, and show it no longer.

        Raises RuntimeError where it was scaled and the updates have been made in the backward pass; of a GPU, which
        the host does not wait for, one update later, or in `remove`.
        """
        self._refuse_scaled()
        optimizer, carrier, shown = self._optimizer(), self._carrier(), self._shown
        if optimizer is None or carrier is None or shown is None or carrier.grad is None:
            self._take_away()
            return
        norm = carrier.grad.view(-1)[0]
        self._take_away()
        if optimizer.update_in_backward or optimizer.sums_in_momentum:
            self._scaled = _HostFlag((norm != shown) & shown.isfinite())
            if not norm.is_cuda:
                self._refuse_scaled()
            return
        usable = shown.isfinite() & (shown > 0)
        optimizer.scale_gradients(torch.where(usable, norm / shown, torch.ones_like(shown)))

    def _refuse_scaled(self) -> None:
        """Raise RuntimeError where the norm was scaled in an update that was made in the backward pass."""
        scaled, self._scaled = self._scaled, None
        if scaled is not None and scaled.value():
            raise RuntimeError(
                "gradients cannot be clipped where each weight is updated inside the backward pass, or each "
                "micro-batch added to the momentum: leave update_in_backward=False and sum_in_momentum=False, or set "
                "the norm that gradients are clipped to (max_grad_norm of a Trainer, gradient_clip_val of Lightning) "
                "to 0; in the backward pass norm_growth of the optimizer limits each gradient's growth instead"
            )

    def _take_away(self) -> None:
        carrier = self._carrier()
        if carrier is not None and self._shown is not None:
            carrier.grad = None
            if carrier.grad_dtype != carrier.dtype:
                carrier.grad_dtype = carrier.dtype
        self._shown = None


class _HostFlag:
    """A bool, (), on its way to the host: from a GPU into pinned memory, with an event, so that nothing waits yet."""

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._event = flag, None
        if flag.is_cuda:
            host = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
            self._flag, self._event = host.copy_(flag, non_blocking=True), torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def value(self) -> bool:
        """The bool itself; waits for the work that was queued before it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class _StepHook:
    """Before a step, or inside it after the closure that makes the gradients (as under Lightning), `take`."""

    def __init__(self, owner: weakref.ref[VisibleNorm]) -> None:
        self._owner = owner

    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        owner = self._owner()
        if owner is None:
            return None
        # torch gives the optimizer itself as the first of args.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            owner.take()
            return None

        def then_take() -> Any:
            loss = closure()
            owner.take()
            return loss

        return (args[0], then_take), {}


def _leaves(optimizer: LowRankAdamW, model: nn.Module) -> Iterator[Tensor]:
    """What autograd gives the gradients of an attached optimizer's weights to."""
    for weight in optimizer.weights_of(model):
        leaf = weight.param if weight.layer is None else weight.layer.proxy
        if leaf is not None and leaf.requires_grad:
            yield leaf


def _smallest(optimizer: LowRankAdamW, model: nn.Module) -> Tensor:
    """The float parameter with the fewest values, one that the optimizer trains if there is any."""
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    choices: Iterable[list[Tensor]] = (trained, list(model.parameters()))
    for params in choices:
        floats = [param for param in params if param.is_floating_point() and param.numel()]
        if floats:
            return min(floats, key=Tensor.numel)
    raise ValueError(
        f"{type(model).__name__} has no float parameter whose .grad could show the norm of the gradient: use the "
        "optimizer's own attach, grad_norm and clip_grad_norm_"
    )


def _calls(method: weakref.WeakMethod[Any]) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        found = method()
        if found is not None:
            found(leaf)

    return hook
