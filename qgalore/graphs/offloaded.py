"""A stack of layers of which something waits in host memory, each copied to the device before it runs.

Optimizer states alone are not read by forward passes: CUDA graphs (`qgalore.graphs.runner`) go on with them, since each
layer's graph of the backward pass reads a slot, into which the layer's states come between two graphs. With weights the
one graph of all forward passes would have to hold a layer at a time: so here is Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qgalore.graphs.eager import EagerStack, RunLayer
from qgalore.graphs.runner import Step
from qgalore.offload.offload import Offload, Pass
from qgalore.optimizer import LowRankAdamW


class OffloadedLayers:
    """Runs layers one after the other, from Python."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer | None, optimizer: LowRankAdamW) -> None:
        """optimizer: after `LowRankAdamW.offload_layers` of these layers. run: None for plain calls."""
        self._layers, self._optimizer = list(layers), optimizer
        self._run: RunLayer = run or (lambda layer, *inputs: layer(*inputs))

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each."""
        if torch.is_grad_enabled() and x.requires_grad:
            arguments = (self._layers, self._run, self._optimizer, constants, x)
            out: Tensor = Step.apply(x, EagerStack(*arguments))
            return out
        for layer in self._layers:
            x = layer(x, *constants)
        return x

    def graph_pool(self) -> contextlib.AbstractContextManager[None]:
        """No graphs have memory."""
        return contextlib.nullcontext()


def let_evaluations_in(layers: Sequence[nn.Module], offload: Offload) -> None:
    """From now on a layer that runs without gradients is on the device meanwhile."""

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if not torch.is_grad_enabled():
                offload.enter(index, Pass.FORWARD, 1)

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if not torch.is_grad_enabled():
                offload.leave(index)

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(index))
        layer.register_forward_hook(leave(index))
