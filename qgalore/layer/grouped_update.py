"""Updates of quantized layers by their directions, several of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from qgalore import kernels
from qgalore.layer.linear import LowRankLinear


class LayerUpdate(NamedTuple):
    """W <- quantize(decay * W - step_size * leftᵀ N right) of a layer; arguments as in `LowRankLinear.update_`."""

    layer: LowRankLinear
    direction: Tensor
    left: Tensor | None
    right: Tensor | None
    row: Tensor


def update_layers_(updates: Sequence[LayerUpdate], skip: Tensor | None = None) -> None:
    """Update quantized layers in place, unless the flag `skip` on the device is true: each as `LowRankLinear.update_`.

    Raises ValueError for a layer with a float weight.
    """
    kernels.update_quantized_([update.layer.quantized_update(*update[1:]) for update in updates], skip)
    for update in updates:
        update.layer.was_written()
