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
        """layers are on one CUDA device, and `optimizer` is attached to them.

        Nothing can be captured on CUDA's default stream: without a `torch.cuda.set_stream` before `attach` and the
        first step, the layers run as without graphs.
        """
        # The retained backward passes of a compiled layer must not write over what they have saved.
        torch._functorch.config.donated_buffer = False
        self._layers, self._run, self._optimizer = list(layers), run, optimizer
        self._weights = [optimizer.weights_of(layer) for layer in self._layers]
        self._steps = 0
        self._states_replaced = optimizer.states_replaced
        self._captured: _CapturedStack | None = None

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each, the same in all steps of one shape."""
        if self._can_replay(x):
            if self._captured is None or self._states_replaced != self._optimizer.states_replaced:
                self._captured, self._states_replaced = None, self._optimizer.states_replaced
                self._captured = _CapturedStack(self._layers, self._run, self._optimizer, self._weights, x, constants)
            out: Tensor = _Replay.apply(x, self._captured)
            return out
        self._steps += torch.is_grad_enabled()
        for layer in self._layers:
            x = self._run(layer, x, *constants)
        return x

    @property
    def replays(self) -> bool:
        """Whether graphs have been captured."""
        return self._captured is not None

    def _can_replay(self, x: Tensor) -> bool:
        if self._steps < _ORDINARY_STEPS or not (torch.is_grad_enabled() and x.requires_grad):
            return False
        if self._captured is not None and self._captured.shape != x.shape:
            return False
        if torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device):
            return False
        return self._optimizer.updates_at_once and not self._optimizer.sums_over_ranks


class _Replay(torch.autograd.Function):
    """The captured stack as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: _CapturedStack) -> Tensor:
        ctx.stack = stack
        return stack.forward(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.stack.backward(grad_output), None


class _CapturedStack:
    """The graphs for inputs of one shape."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        weights: list[list[FullRankWeight]],
        x: Tensor,
        constants: tuple[Tensor, ...],
    ) -> None:
        self.shape = x.shape
        self._optimizer, self._weights = optimizer, weights
        self._constants = constants  # kept, since the graphs read them
        # Graphs have memory of their own: what the ordinary steps took is given back first.
        torch.cuda.empty_cache()
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Gradients between two layers, in turn: layer i reads one and writes the other.
        self._grads = [torch.empty_like(x), torch.empty_like(x)]
        count = sum(map(len, weights))
        self._numbers = torch.zeros(count, 6, dtype=torch.int32, device=x.device)
        self._inputs: list[Tensor] = [torch.empty_like(x).requires_grad_()]
        self._outputs: list[Tensor] = []
        self._forward_graph = self._capture(lambda: self._run_forward(layers, run))
        self._backward_graphs: list[torch.cuda.CUDAGraph | None] = [None] * len(layers)

    def _run_forward(self, layers: list[nn.Module], run: RunLayer) -> None:
        with torch.enable_grad():
            for layer in layers:
                self._outputs.append(run(layer, self._inputs[-1], *self._constants))
                self._inputs.append(self._outputs[-1].detach().requires_grad_())

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer, at an address that the next step uses again."""
        # Through .data: autograd would take the write for a change of what the backward passes have saved.
        self._inputs[0].data.copy_(x)
        self._forward_graph.replay()
        return self._outputs[-1].detach()

    def backward(self, grad_output: Tensor) -> Tensor:
        """The gradient of the first layer's input; all weights of all layers are updated on the way."""
        count = len(self._weights)
        self._write_numbers()
        self._grads[count % 2].copy_(grad_output)
        for index in reversed(range(count)):
            weights = self._weights[index]
            if any(weight.changes_subspace for weight in weights):
                self._run_backward(index)
                continue
            graph = self._backward_graphs[index]
            if graph is None:
                graph = self._backward_graphs[index] = self._capture(lambda: self._run_backward(index))  # noqa: B023
            else:
                for weight in weights:
                    weight.count_replayed_update()
            graph.replay()
        self._numbers_in_use(False)
        return self._grads[0]

    def _run_backward(self, index: int) -> None:
        """The backward pass of one layer and the updates of its weights, in Python."""
        own = [weight for weight in self._weights[index] if weight.layer is None]
        inputs = [self._inputs[index], *(weight.param for weight in own)]
        grad, *own_grads = torch.autograd.grad(
            self._outputs[index], inputs, self._grads[(index + 1) % 2], retain_graph=True
        )
        with torch.no_grad():
            self._grads[index % 2].copy_(grad)
            for weight, own_grad in zip(own, own_grads, strict=True):
                weight.accumulate_full(own_grad)
            for weight in self._weights[index]:
                self._optimizer.gradient_ready(weight)

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
