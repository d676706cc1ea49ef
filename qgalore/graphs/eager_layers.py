"""A stack of layers that runs one layer after the other, from Python, where CUDA graphs do not run it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore.graphs.eager import EagerStack, RunLayer
from qgalore.optimizer import LowRankAdamW


class EagerLayers:
    """Runs layers one after the other, with the updates that belong to their backward passes."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer | None, optimizer: LowRankAdamW) -> None:
        """layers are on one device; `optimizer` is attached to them. run: None for plain calls."""
        self._layers, self._optimizer = list(layers), optimizer
        self._run: RunLayer = run or (lambda layer, *inputs: layer(*inputs))

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each."""
        if torch.is_grad_enabled() and x.requires_grad:
            if (gathering := self._optimizer.gathering) is not None:
                gathering.begin(self._optimizer.states_replaced)
            if (offload := self._optimizer.offload) is not None:
                offload.leave_all()
            out: Tensor = LayersFunction.apply(x, self._stack(constants, x))
            return out
        for layer in self._layers:
            x = self._run(layer, x, *constants) if torch.is_grad_enabled() else layer(x, *constants)
        return x

    def _stack(self, constants: tuple[Tensor, ...], x: Tensor) -> EagerStack:
        """The layers for one training step."""
        return EagerStack(self._layers, self._run, self._optimizer, constants, x)

    def graph_pool(self) -> contextlib.AbstractContextManager[None]:
        """No graphs have memory."""
        return contextlib.nullcontext()


class LayersFunction(torch.autograd.Function):
    """All layers as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: EagerStack) -> Tensor:
        out = stack.forward(x)
        ctx.stack, ctx.number = stack, stack.forward_passes
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if ctx.number != ctx.stack.forward_passes:
            raise RuntimeError(
                "layers in CUDA graphs keep the activations of their newest forward pass alone: make the backward pass "
                "of each before the next one, or do without the graphs"
            )
        return ctx.stack.backward(grad_output), None
