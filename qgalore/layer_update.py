"""Updates of quantized layers by their directions, several of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.linear import LowRankLinear


class LayerUpdate(NamedTuple):
    """W <- quantize(decay * W - step_size * leftᵀ N right) of a layer; arguments as in `LowRankLinear.update_`."""

    layer: LowRankLinear
    direction: Tensor
    left: Tensor | None
    right: Tensor | None
    step_size: float
    decay: float
    seed: int
    numbers: Tensor | None

    @property
    def changes_nothing(self) -> bool:
        """A learning rate of 0 leaves every bit: requantizing would move the grid."""
        return self.step_size == 0 and self.decay == 1 and self.numbers is None


def update_layers_(updates: Sequence[LayerUpdate], skip: Tensor | None = None) -> None:
    """Update quantized layers in place, unless the flag `skip` on the device is true: each as `LowRankLinear.update_`.

    Raises ValueError for a layer with a float weight.
    """
    updates = [update for update in updates if not update.changes_nothing]
    kernels.update_several_quantized_([_arguments(update) for update in updates], skip)
    for update in updates:
        if update.layer.checks_version:
            # A kernel of ours writes behind autograd's back.
            torch.autograd.graph.increment_version(update.layer.weight)


def _arguments(update: LayerUpdate) -> kernels.QuantizedUpdate:
    layer, direction, left, right, step_size, decay, seed, numbers = update
    weight = layer.quantized_weight
    if weight is None:
        raise ValueError("the weight of a layer is float: LowRankLinear.update_ updates it")
    return kernels.QuantizedUpdate(
        weight.qdata, weight.scale, weight.zero_point, direction, left, right, weight.columns, weight.bits,
        weight.group_size, step_size, decay, seed if layer.format.stochastic_rounding else None, numbers,
    )  # fmt: skip
