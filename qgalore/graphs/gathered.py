"""A stack of layers whose weights are gathered from the ranks that own them, each before it runs.

There are no CUDA graphs: a graph's addresses would have to hold one layer's weights at a time. So a small model waits
for Python; a large one, which is what needs this, does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore.graphs.eager import EagerStack, RunLayer
from qgalore.graphs.runner import Step
from qgalore.optimizer import LowRankAdamW
from qgalore.sharding.gathering import Gathering


class GatheredStack(EagerStack):
    """The layers for one step."""

    def __init__(self, gathering: Gathering, *arguments: Any) -> None:
        """arguments: of `EagerStack`."""
        super().__init__(*arguments)
        self._gathering = gathering

    def _enter(self, index: int, step: int) -> None:
        self._gathering.enter(index, step)


class GatheredLayers:
    """Runs layers one after the other, whose weights other ranks own."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer | None, optimizer: LowRankAdamW) -> None:
        """layers are on one device; `optimizer` is attached to them with a mesh. run: None for plain calls.

        Somebody else may call the layers of a training step, too, who tells the optimizer's `gathering`.
        """
        self._layers, self._optimizer = list(layers), optimizer
        self._run: RunLayer = run or (lambda layer, *inputs: layer(*inputs))
        self._gathering = optimizer.gather_layers(self._layers)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._before_evaluation(index))

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each."""
        if torch.is_grad_enabled() and x.requires_grad:
            self._gathering.begin(self._optimizer.states_replaced)
            arguments = (self._layers, self._run, self._optimizer, constants, x)
            out: Tensor = Step.apply(x, GatheredStack(self._gathering, *arguments))
            return out
        for layer in self._layers:
            x = layer(x, *constants)
        return x

    def graph_pool(self) -> contextlib.AbstractContextManager[None]:
        """No graphs have memory."""
        return contextlib.nullcontext()

    def _before_evaluation(self, index: int) -> Callable[..., None]:
        def gather(*_: object) -> None:
            if not torch.is_grad_enabled():
                self._gathering.enter(index, 1)

        return gather
