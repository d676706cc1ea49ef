"""Layers of which something waits in host memory, copied to the device also for passes without gradients.

In training whoever runs the layers copies them. Optimizer states alone are not read by forward passes: CUDA graphs
(`qgalore.graphs.runner`) go on with them, since each layer's graph of the backward pass reads a slot, into which the
layer's states come between two graphs. With weights the one graph of all forward passes would have to hold a layer at
a time: so they run from Python (`qgalore.graphs.eager_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qgalore.offload.offload import Offload, Pass


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
