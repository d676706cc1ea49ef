"""A stack of layers whose weights are gathered from the ranks that own them, each before it runs.

There are no CUDA graphs: a graph's addresses would have to hold one layer's weights at a time. So a small model waits
for Python; a large one, which is what needs this, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore.graphs.eager import EagerStack, RunLayer
from qgalore.graphs.eager_layers import EagerLayers
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


class GatheredLayers(EagerLayers):
    """Runs layers one after the other, whose weights other ranks own."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer | None, optimizer: LowRankAdamW) -> None:
        """As of `EagerLayers`, with an optimizer that is attached with a mesh.

        Somebody else may call the layers of a training step, too, who tells the optimizer's `gathering`.
        """
        super().__init__(layers, run, optimizer)
        self._gathering = optimizer.gather_layers(self._layers)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._before_evaluation(index))

    def _stack(self, constants: tuple[Tensor, ...], x: Tensor) -> EagerStack:
        self._gathering.begin(self._optimizer.states_replaced)
        return GatheredStack(self._gathering, self._layers, self._run, self._optimizer, constants, x)

    def _before_evaluation(self, index: int) -> Callable[..., None]:
        def gather(*_: object) -> None:
            if not torch.is_grad_enabled():
                self._gathering.enter(index, 1)

        return gather
