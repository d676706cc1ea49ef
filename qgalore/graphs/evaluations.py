"""Passes without gradients over layers whose weights come before they run, from other ranks or from the host.

In training whoever runs the layers brings the weights (`qgalore.graphs.eager.EagerStack`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Bring = Callable[[int], None]
"""bring(index) of a layer, by its number in the stack."""


def let_evaluations_in(layers: Sequence[nn.Module], enter: Bring, leave: Bring | None = None) -> None:
    """From now on a layer that runs without gradients enters before it does, and leaves after."""

    def without_gradients(act: Bring, index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if not torch.is_grad_enabled():
                act(index)

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(without_gradients(enter, index))
        if leave is not None:
            layer.register_forward_hook(without_gradients(leave, index))
