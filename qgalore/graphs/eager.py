"""A stack of layers run from Python, in the order in which the CUDA graphs have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qgalore.graphs.dequant_cache import cached_bases, cached_weights
from qgalore.layer.linear import LowRankLinear
from qgalore.offload.offload import Pass
from qgalore.optimizer import LowRankAdamW
from qgalore.update.all_reduce import Bucket

RunLayer = Callable[..., Tensor]
"""run(layer, x, *constants) -> x of the next layer."""


Memory = contextlib.AbstractContextManager[None]
Work = Callable[[int, Memory], None]
"""work(layer, memory) launches a part of the backward pass of a layer, which allocates in that memory."""
ANY_MEMORY: Memory = contextlib.nullcontext()


class EagerStack:
    """The layers for one step, run from Python in the order in which the graphs have it."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        constants: tuple[Tensor, ...],
        x: Tensor,
    ) -> None:
        self._layers, self._run, self._cycle, self._constants = layers, run, optimizer.cycle, constants
        self._dtype = x.dtype
        self._linears = [[part for part in layer.modules() if isinstance(part, LowRankLinear)] for layer in layers]
        self._weights = [optimizer.weights_of(layer) for layer in layers]
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._buckets: dict[int, Bucket] = {}
        """The gradients of layers on their way over the ranks."""
        self._immediately = self._cycle.updates_immediately
        self._sends = self._cycle.ranks.owners_sum or (self._immediately and self._cycle.ranks.sums_gradients)
        self._gathering, self._offload = optimizer.gathering, optimizer.offload
        self._grad = torch.empty(0)
        self.forward_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer."""
        self.forward_passes += 1
        self._inputs.append(x.detach().requires_grad_())
        self._run_forward()
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the first layer's input; all weights of all layers are updated on the way."""
        self._inputs.pop()
        self._grad = grad
        self._run_backward()
        return self._grad

    def _run_forward(self) -> None:
        for index in range(len(self._layers)):
            self._enter(index, 1)
            self._forward_of_layer(index)
            self._leave(index)

    def _forward_of_layer(self, index: int) -> None:
        with torch.enable_grad(), cached_weights(self._linears[index], self._dtype):
            self._outputs.append(self._run(self._layers[index], self._inputs[-1], *self._constants))
        self._inputs.append(self._outputs[-1].detach().requires_grad_())

    def _run_backward(self) -> None:
        if self._offload is not None:
            self._offload.leave_all()
        for index in reversed(range(len(self._layers))):
            self._enter(index, -1)
            self._perform(self._gradients, index)
            if self._sends:
                self._buckets[index].start()
                self._finish(index + 1)
                continue
            if not self._immediately:
                self._cycle.gradients_ready(self._weights[index])
            self._leave(index)
        self._finish(0)

    def _enter(self, index: int, step: int) -> None:
        """Before a layer runs, and after it that of number index + step: forward where step is 1."""
        if self._gathering is not None:
            self._gathering.enter(index, step)
        if self._offload is not None:
            backward = Pass.UPDATE if self._immediately else Pass.GRADIENTS
            self._offload.enter(index, Pass.FORWARD if step > 0 else backward, step)

    def _leave(self, index: int) -> None:
        """After all that a pass has done with a layer."""
        if self._offload is not None:
            self._offload.leave(index)

    def _finish(self, index: int) -> None:
        """Update a layer whose gradients are on their way, if they are, or add them to their owners' sums."""
        if index in self._buckets:
            self._buckets[index].wait()
            if not self._immediately:
                self._cycle.gradients_sent(self._weights[index], self._buckets.pop(index))
                return
            if self._cycle.ranks.deals_weights:
                self._perform(self._checks, index)
                self._cycle.agree_on_skip()
            self._perform(self._updates, index)
            self._cycle.publish(self._weights[index])
            del self._buckets[index]
            self._leave(index)

    def _perform(self, work: Work, index: int) -> None:
        work(index, ANY_MEMORY)

    def _gradients(self, index: int, memory: Memory) -> None:
        """The backward pass of a layer, and the updates of its weights if nothing else has to come before."""
        with memory, cached_bases(self._weights[index], self._dtype):
            self._backward_of_layer(index)
            if self._immediately and not self._sends:
                self._cycle.finalize(self._weights[index])
        if self._sends:
            # Not there: it is still needed when graphs write over their memory.
            bucket = self._cycle.bucket_of(self._weights[index], self._buffer_of(index))
            assert bucket is not None
            self._buckets[index] = bucket

    def _checks(self, index: int, memory: Memory) -> None:
        """On a rank of a mesh: finalize the gradients of a layer, for other ranks to learn whether they are finite."""
        with memory:
            self._cycle.check_final(self._weights[index], self._buckets[index])

    def _updates(self, index: int, memory: Memory) -> None:
        with memory, cached_bases(self._weights[index], self._dtype):
            if self._cycle.ranks.deals_weights:
                self._cycle.update_checked(self._weights[index])
            else:
                self._cycle.finalize(self._weights[index], self._buckets[index])

    def _backward_of_layer(self, index: int) -> None:
        """From the gradient of the layer's output to that of its input, which is written over it."""
        self._grad = self._gradient(index, self._grad)
        self._inputs[index] = self._outputs[index] = torch.empty(0)  # what the layer has saved is needed no longer

    def _gradient(self, index: int, grad: Tensor, keep: bool = False) -> Tensor:
        """The gradient of a layer's input; its weights take theirs. `keep` what the layer has saved."""
        own = [weight for weight in self._weights[index] if weight.layer is None]
        inputs = [self._inputs[index], *(weight.param for weight in own)]
        with cached_weights(self._linears[index], self._dtype):
            grad, *own_grads = torch.autograd.grad(self._outputs[index], inputs, grad, retain_graph=keep)
        with torch.no_grad():
            for weight, own_grad in zip(own, own_grads, strict=True):
                weight.accumulate_full(own_grad)
        return grad

    def _buffer_of(self, index: int) -> Tensor | None:
        """A buffer for the bucket of a layer; None for any."""
        return None
