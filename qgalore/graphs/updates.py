"""Updates in CUDA graphs inside somebody else's training loop, whose forward and backward passes stay as they are.

A step of a few hundred weights is some thousand lines of Python for each of them. Where the loop waits for the device
before it, as Hugging Face's Trainer does to look at the loss, the device has nothing to do meanwhile. Here what a batch
of weights launches (`qgalore.update.step.make_update`) is captured once, and replayed in every later update in which
none of them has a refresh. Python is left with the account of the update and one copy of the batch's gradients to the
addresses that the graph knows.

Memory: a buffer for the gradients of one batch, and what the largest batch needs while it is updated, which the graphs
share and keep between updates.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgalore.torch_internals import internal
from qgalore.update.gradient_sum import Gradient
from qgalore.update.step import make_update
from qgalore.update.weight import HOST_STATE, Weight

_ORDINARY_UPDATES = 2
"""Updates of a batch without a graph, in which kernels are compiled and libraries set up."""
_MOST_BYTES = 128 << 20
"""Of a batch's gradients: larger ones take a GPU longer than Python takes to launch what is done with them."""
_MOST_BATCHES = 4096
"""Where batches have other weights in each update, as those of experts that only some tokens reach, they are forgotten
before they are more than so many."""
_CHANGING = ("params", "lr", "initial_lr", "weight_decay")
"""Entries of a param group of which the graphs know nothing: an update reads these numbers from its step rows."""


@dataclass
class _Batch:
    """A batch of weights, and its graph once there is one."""

    description: list[Any]
    ordinary_updates: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    gradients: Sequence[Tensor] = ()
    """Where the graph reads the gradients."""
    factors: Tensor | None = None
    """(weights,): where it reads their factors, if they have any."""


class UpdateGraphs:
    """The graphs of one attached optimizer: `optimizer.attach(model, replay=UpdateGraphs())`."""

    def __init__(self) -> None:
        self.replays = 0
        """How many updates of a batch were made from graphs."""
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = collections.defaultdict(list)
        """By shape and dtype, for as many gradients as a batch has of these; batches share them."""
        self._pool: Any = None

    def update(
        self,
        weights: Sequence[Weight],
        gradients: Sequence[Gradient | None],
        factors: Sequence[Tensor | None],
        skip: Tensor | None,
    ) -> bool:
        """See `qgalore.update.step.Replay`."""
        if skip is None or any(weight.has_residual or weight.direction.update for weight in weights):
            return False  # the residual has the newest full gradient, and another library's kernels their own stream
        whole = [gradient for gradient in gradients if isinstance(gradient, Tensor)]
        if len(whole) < len(weights) or sum(gradient.nbytes for gradient in whole) > _MOST_BYTES:
            return False
        scaled = [factor for factor in factors if factor is not None]
        if scaled and len(scaled) < len(weights):
            return False
        batch = self._batch(weights, whole, bool(scaled), skip)
        if batch.graph is None and batch.ordinary_updates < _ORDINARY_UPDATES:
            batch.ordinary_updates += 1
            return False
        if begins := batch.graph is None:
            self._prepare(batch, whole, scaled)
        internal("torch._foreach_copy_")(list(batch.gradients), whole)
        if batch.factors is not None:
            torch.stack(scaled, out=batch.factors)
        if begins:
            batch.graph = self._capture(skip.device, functools.partial(_update, list(weights), batch, skip))
        else:
            for weight in weights:
                if weight.layer is not None:
                    weight.layer.was_written()
        assert batch.graph is not None
        batch.graph.replay()
        self.replays += 1
        return True

    def _batch(self, weights: Sequence[Weight], gradients: Sequence[Tensor], scaled: bool, skip: Tensor) -> _Batch:
        """The batch of these weights; a new one where a tensor or an option is another one than the graph knows."""
        description: list[Any] = [scaled, skip.data_ptr()]
        for weight, gradient in zip(weights, gradients, strict=True):
            description += [gradient.shape, gradient.dtype, weight.subspace.dtype, weight.param.data_ptr()]
            description.append(weight.step_row.data_ptr())
            description += [value.data_ptr() for key, value in weight.state.items() if key not in HOST_STATE]
        groups = {id(weight.param_group): weight.param_group for weight in weights}
        for group in groups.values():
            description.append({key: value for key, value in group.items() if key not in _CHANGING})
        key = tuple(weight.index for weight in weights)
        batch = self._batches.get(key)
        if batch is None or batch.description != description:
            if len(self._batches) >= _MOST_BATCHES:
                self._batches.clear()
            self._batches[key] = batch = _Batch(description)
        return batch

    def _prepare(self, batch: _Batch, gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
        """Give a batch its addresses."""
        taken: dict[tuple[torch.Size, torch.dtype], itertools.count[int]] = collections.defaultdict(itertools.count)
        chosen = []
        for gradient in gradients:
            kind = gradient.shape, gradient.dtype
            number, buffers = next(taken[kind]), self._buffers[kind]
            if number == len(buffers):
                buffers.append(torch.empty_like(gradient, memory_format=torch.contiguous_format))
            chosen.append(buffers[number])
        batch.gradients = chosen
        batch.factors = torch.empty(len(factors), dtype=factors[0].dtype, device=factors[0].device) if factors else None

    def _capture(self, device: torch.device, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches; nothing of it has run yet.

        On a stream of its own, since the default one cannot be captured, which is where others train.
        """
        graph, ours, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), torch.cuda.Stream(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(ours)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        ours.wait_stream(stream)
        return graph


def _update(weights: list[Weight], batch: _Batch, skip: Tensor) -> None:
    factors: list[Tensor | None] = [None] * len(weights)
    if batch.factors is not None:
        factors = [*batch.factors.unbind()]
    make_update(weights, [*batch.gradients], factors, skip)
