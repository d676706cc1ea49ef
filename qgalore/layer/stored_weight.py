"""Give a layer another weight in place, in the format that the layer has."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import QuantizedTensor, row_bytes


@torch.no_grad()
def store_float_(layer: LowRankLinear, weight: Tensor) -> None:
    """Store a float weight (out_features, in_features), with the bits that a layer made from it would have.

    A quantized format rounds to the nearest code. Raises ValueError for a weight of another shape.
    """
    if weight.shape != (layer.out_features, layer.in_features):
        here = f"{layer.out_features} x {layer.in_features}"
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit a layer of {here}")
    if layer.format.simulate:  # whose grid is in the dtype of the float weight that it keeps
        weight = weight.to(layer.weight.dtype)
    made = LowRankLinear(weight, None, layer.format)
    for to, value in zip(_tensors(layer), _tensors(made), strict=True):
        to.copy_(value)
    layer.was_written()


@torch.no_grad()
def store_quantized_(layer: LowRankLinear, weight: QuantizedTensor) -> None:
    """Store a quantized weight: its codes as they are where the layer has its format, else its values, rounded again.

    Raises ValueError for a weight of another shape.
    """
    here = layer.quantized_weight
    if here is None or weight.shape != here.shape or _format(weight) != _format(here):
        store_float_(layer, weight.with_aligned_rows().dequantize(torch.float32))
        return
    width = row_bytes(here.columns, here.bits)
    here.qdata[:, :width].copy_(weight.qdata[:, :width])
    here.scale.copy_(weight.scale)
    here.zero_point.copy_(weight.zero_point)
    layer.was_written()


def _tensors(layer: LowRankLinear) -> list[Tensor]:
    return [x for x in (layer.weight, layer.weight_scale, layer.weight_zero_point) if x is not None]


def _format(weight: QuantizedTensor) -> tuple[int, int]:
    return weight.bits, min(weight.group_size, weight.columns)
