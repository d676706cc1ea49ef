"""The CUDA graphs of a stack of layers: captured from the eager stack, then replayed."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qgalore.graphs.eager import ANY_MEMORY, EagerStack, RunLayer, Work
from qgalore.optimizer import LowRankAdamW
from qgalore.torch_internals import allocating_in_pool
from qgalore.update import moments
from qgalore.update.all_reduce import Bucket


class CapturedStack(EagerStack):
    """The graphs for inputs of one shape."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        constants: tuple[Tensor, ...],
        x: Tensor,
    ) -> None:
        super().__init__(layers, run, optimizer, constants, x)
        self._shape, self._weights_arrive = x.shape, optimizer.weights_arrive
        # Graphs have memory of their own: what the ordinary steps took is given back first.
        torch.cuda.empty_cache()
        self._pool: Any = torch.cuda.graph_pool_handle()
        moments.make_tables(x.device)  # which must not lie in `graph_pool`
        self._buffers = self._bucket_buffers(x)
        self._sent: dict[int, Bucket] = {}
        """The bucket that a layer's graph fills."""
        self._inputs.append(torch.empty_like(x).requires_grad_())
        for weight in itertools.chain(*self._weights):
            if weight.layer is not None:
                weight.layer.allow_backward_after_update()
            if not self._immediately and not self._sends:
                # A gradient that comes alone keeps its dtype, as it does without graphs.
                weight.gradient.fix_addresses(x.dtype if optimizer.cycle.takes_whole_gradients else None)
        self._forward_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

    @property
    def is_whole(self) -> bool:
        """Whether a forward pass has been made; if not, the one that was to capture it has failed."""
        return len(self._outputs) == len(self._layers)

    def serves(self, x: Tensor) -> bool:
        """Whether the graphs are those of a step like the one that begins."""
        return self._shape == x.shape and self._immediately == self._cycle.updates_immediately

    def graph_pool(self) -> contextlib.AbstractContextManager[None]:
        """See `LayerGraphs`."""
        return allocating_in_pool(self._inputs[0].device.index, self._pool)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer, at an address that the next step uses again."""
        self.forward_passes += 1
        if not self._immediately and not self._sends and not self._cycle.has_sums:
            for weight in itertools.chain(*self._weights):
                weight.gradient.begin()
        # Through .data: autograd would take the write for a change of what the backward passes have saved.
        self._inputs[0].data.copy_(x)
        if self._weights_arrive:
            self._run_forward()
        else:
            self._replay_forward(0, super()._run_forward)
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """See `EagerStack`; layers in which a subspace is refreshed run from Python."""
        if self._immediately:
            self._cycle.write_update_rows()
        else:
            self._cycle.write_sum_rows()
        self._grad_buffer.copy_(grad)
        self._run_backward()
        return self._grad_buffer

    @property
    def _grad_buffer(self) -> Tensor:
        """For the gradients between layers, one after the other: the last output, which nobody needs by then."""
        return self._outputs[-1].data

    def _forward_of_layer(self, index: int) -> None:
        if self._weights_arrive:
            self._replay_forward(index, functools.partial(super()._forward_of_layer, index))
        else:
            super()._forward_of_layer(index)

    def _replay_forward(self, index: int, work: Callable[[], None]) -> None:
        if index not in self._forward_graphs:
            self._forward_graphs[index] = self._capture(work)
        self._forward_graphs[index].replay()

    def _perform(self, work: Work, index: int) -> None:
        if any(weight.subspace.due for weight in self._weights[index]):
            work(index, self.graph_pool())
        else:
            self._replay(work, index)

    def _replay(self, work: Work, index: int) -> None:
        """A part of a layer's backward pass by its graph."""
        key, only_sends = (work.__name__, index), self._sends and work == self._gradients
        if key not in self._graphs:
            self._graphs[key] = self._capture(functools.partial(work, index, ANY_MEMORY))
            if only_sends:
                self._sent[index] = self._buckets[index]
        elif only_sends:
            self._buckets[index] = self._sent[index]
        elif work != self._checks:
            for weight in self._weights[index]:
                if self._immediately:
                    weight.count_replayed()
                else:
                    weight.gradient.count_replayed()
        self._graphs[key].replay()

    def _backward_of_layer(self, index: int) -> None:
        grad = self._gradient(index, self._grad_buffer, keep=True)
        if grad.data_ptr() != self._grad_buffer.data_ptr():  # a compiled layer writes there itself
            self._grad_buffer.copy_(grad)

    def _bucket_buffers(self, x: Tensor) -> list[Tensor]:
        """Two buffers for the buckets of the layers in turn, in the dtype of one micro-batch; none on one rank."""
        sizes = [sum(weight.values_to_sum for weight in weights) for weights in self._weights]
        return [x.new_empty(max(sizes)) for _ in range(2)] if self._sends else []

    def _buffer_of(self, index: int) -> Tensor | None:
        return self._buffers[index % 2] if self._buffers else None

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches; nothing of it has run yet."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph
