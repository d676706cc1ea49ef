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
from qgalore.update.all_reduce import Bucket


class GatheredStack(EagerStack):
    """The layers for one step."""

    def __init__(self, gathering: Gathering, *arguments: Any) -> None:
        """arguments: of `EagerStack`."""
        super().__init__(*arguments)
        self._gathering = gathering
        self._summing: tuple[int, Bucket] | None = None
        """The layer whose gradients are on their way, where updates are not made in the backward pass."""

    def _enter(self, index: int, step: int) -> None:
        backward = step < 0
        self._gathering.fetch(index, backward)
        self._gathering.wait(index)
        self._gathering.fetch(index + step, backward)

    def _gradients_are_there(self, index: int) -> None:
        """See `EagerStack`; sums are under way while the layer below runs."""
        bucket = self._optimizer.bucket_of(self._weights[index])
        assert bucket is not None
        bucket.start()
        self._take_sums()
        self._summing = index, bucket

    def _finish(self, index: int) -> None:
        super()._finish(index)
        if index == 0:
            self._take_sums()

    def _take_sums(self) -> None:
        if self._summing is not None:
            (index, bucket), self._summing = self._summing, None
            self._optimizer.gradients_sent(self._weights[index], bucket)


class GatheredLayers:
    """Runs layers one after the other, whose weights other ranks own."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer | None, optimizer: LowRankAdamW) -> None:
        """layers are on one device; `optimizer` is attached to them with a mesh. run: None for plain calls."""
        self._layers, self._optimizer = list(layers), optimizer
        self._run: RunLayer = run or (lambda layer, *inputs: layer(*inputs))
        self._gathering = optimizer.gather_layers(self._layers)
        self._states_replaced = -1
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._before_evaluation(index))

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each."""
        if torch.is_grad_enabled() and x.requires_grad:
            if self._states_replaced != self._optimizer.states_replaced:
                self._gathering.take_bases()
                self._states_replaced = self._optimizer.states_replaced
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
                self._gathering.fetch(index, bases=False)
                self._gathering.wait(index)
                self._gathering.fetch(index + 1, bases=False)

        return gather
