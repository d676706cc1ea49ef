"""A stack of layers whose training step is replayed from CUDA graphs: one launch where Python would make thousands.

A step through a LLaMA with low-rank weights is about a hundred kernels a layer. On a small model a GPU finishes them
sooner than Python can ask for them. Here the forward pass of all layers is one graph, and each layer has another for
its backward pass together with the updates of its weights, which happen as soon as their gradients are there.

Nothing is computed otherwise: the graphs are captured from the ordinary code, and hold the same kernels in the same
order. What changes from update to update (seeds, learning rates, bias corrections) is read from a table on the device,
one row a weight, written before each backward pass. A layer in which a subspace is to be refreshed runs its backward
pass from Python that time, over what the graph of the forward pass has saved.

The autograd graphs of the captured forward passes are kept, so that a layer's backward pass can be captured or run at
any time; the activations lie at fixed addresses, and no more of them than one forward pass needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore.full_rank_weight import FullRankWeight
from qgalore.optimizer import LowRankAdamW

_ORDINARY_STEPS = 2
"""Steps without graphs, in which kernels are compiled and libraries set up."""

RunLayer = Callable[..., Tensor]
"""run(layer, x, *constants) -> x of the next layer."""


class LayerGraphs:
    """Runs layers one after the other; from the third training step of one shape on by CUDA graphs."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer, optimizer: LowRankAdamW) -> None:
        """layers are on one device, and `optimizer` is attached to them.

        Nothing can be captured on CUDA's default stream: without a `torch.cuda.set_stream` before `attach` and the
        first step, the layers run as without graphs, and so they do on another device.
        """
        # The retained backward passes of a compiled layer must not write over what they have saved.
        torch._functorch.config.donated_buffer = False
        self._layers, self._run, self._optimizer = list(layers), run, optimizer
        self._steps = 0
        self._states_replaced = optimizer.states_replaced
        self._captured: _CapturedStack | None = None

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each, the same in all steps of one shape."""
        if torch.is_grad_enabled() and x.requires_grad and self._optimizer.updates_at_once:
            out: Tensor = _Step.apply(x, self._stack_for(x, constants))
            return out
        for layer in self._layers:
            x = self._run(layer, x, *constants)
        return x

    @property
    def replays(self) -> bool:
        """Whether graphs have been captured."""
        return self._captured is not None

    def _stack_for(self, x: Tensor, constants: tuple[Tensor, ...]) -> _Stack:
        self._steps += 1
        if self._states_replaced != self._optimizer.states_replaced:
            self._captured, self._states_replaced = None, self._optimizer.states_replaced
        if self._captured is not None and self._captured.shape == x.shape:
            return self._captured
        arguments = (self._layers, self._run, self._optimizer, constants)
        if self._captured is not None or self._steps <= _ORDINARY_STEPS or not _can_capture(x.device):
            return _Stack(*arguments)
        self._captured = _CapturedStack(*arguments, x)
        return self._captured


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


class _Step(torch.autograd.Function):
    """All layers as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: _Stack) -> Tensor:
        ctx.stack = stack
        return stack.forward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.stack.backward(grad_output), None


class _Stack:
    """The layers for one step, run from Python in the order in which the graphs have it."""

    def __init__(
        self, layers: list[nn.Module], run: RunLayer, optimizer: LowRankAdamW, constants: tuple[Tensor, ...]
    ) -> None:
        self._layers, self._run, self._optimizer, self._constants = layers, run, optimizer, constants
        self._weights = [optimizer.weights_of(layer) for layer in layers]
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer."""
        self._inputs.append(x.detach().requires_grad_())
        self._run_forward()
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the first layer's input; all weights of all layers are updated on the way."""
        self._inputs.pop()
        for weights in reversed(self._weights):
            grad = self._run_backward(weights, self._inputs.pop(), self._outputs.pop(), grad)
        return grad

    def _run_forward(self) -> None:
        with torch.enable_grad():
            for layer in self._layers:
                self._outputs.append(self._run(layer, self._inputs[-1], *self._constants))
                self._inputs.append(self._outputs[-1].detach().requires_grad_())

    def _run_backward(
        self, weights: list[FullRankWeight], x: Tensor, out: Tensor, grad: Tensor, keep: bool = False
    ) -> Tensor:
        """The gradient of one layer's input, and the updates of its weights; `keep` what the layer has saved."""
        own = [weight for weight in weights if weight.layer is None]
        inputs = [x, *(weight.param for weight in own)]
        grad, *own_grads = torch.autograd.grad(out, inputs, grad, retain_graph=keep)
        with torch.no_grad():
            for weight, own_grad in zip(own, own_grads, strict=True):
                weight.accumulate_full(own_grad)
            self._optimizer.gradients_ready(weights)
        return grad


class _CapturedStack(_Stack):
    """The graphs for inputs of one shape."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        constants: tuple[Tensor, ...],
        x: Tensor,
    ) -> None:
        super().__init__(layers, run, optimizer, constants)
        self.shape = x.shape
        # Graphs have memory of their own: what the ordinary steps took is given back first.
        torch.cuda.empty_cache()
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Gradients between two layers, in turn: layer i reads one and writes the other.
        self._grads = [torch.empty_like(x), torch.empty_like(x)]
        count = sum(map(len, self._weights))
        self._numbers = torch.zeros(count, 6, dtype=torch.int32, device=x.device)
        self._inputs.append(torch.empty_like(x).requires_grad_())
        self._forward_graph = self._capture(self._run_forward)
        self._backward_graphs: list[torch.cuda.CUDAGraph | None] = [None] * len(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer, at an address that the next step uses again."""
        # Through .data: autograd would take the write for a change of what the backward passes have saved.
        self._inputs[0].data.copy_(x)
        self._forward_graph.replay()
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """See `_Stack`; layers in which a subspace is refreshed run from Python."""
        count = len(self._weights)
        self._write_numbers()
        self._grads[count % 2].copy_(grad)
        for index in reversed(range(count)):
            weights = self._weights[index]
            if any(weight.changes_subspace for weight in weights):
                self._run_layer_backward(index)
                continue
            graph = self._backward_graphs[index]
            if graph is None:
                graph = self._capture(functools.partial(self._run_layer_backward, index))
                self._backward_graphs[index] = graph
            else:
                for weight in weights:
                    weight.count_replayed_update()
            graph.replay()
        self._numbers_in_use(False)
        return self._grads[0]

    def _run_layer_backward(self, index: int) -> None:
        given, wanted = self._grads[(index + 1) % 2], self._grads[index % 2]
        wanted.copy_(self._run_backward(self._weights[index], self._inputs[index], self._outputs[index], given, True))

    def _write_numbers(self) -> None:
        rows = [weight.numbers_of_update() for weights in self._weights for weight in weights]
        # A new pinned buffer each time: the copy may still be under way when the next one is written.
        self._numbers.copy_(torch.tensor(rows, dtype=torch.int32).pin_memory(), non_blocking=True)
        self._numbers_in_use(True)

    def _numbers_in_use(self, used: bool) -> None:
        rows = self._numbers.unbind() if used else [None] * len(self._numbers)
        weights = (weight for weights in self._weights for weight in weights)
        for weight, row in zip(weights, rows, strict=True):
            weight.numbers = row

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches; nothing of it has run yet."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        work()
        graph.capture_end()
        return graph
