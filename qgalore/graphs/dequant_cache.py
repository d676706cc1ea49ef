"""The quantized weights and bases of one decoder layer, dequantized in one launch before the pass that uses them.

Each alone takes 3 us of a GPU and a gap, whatever its size, and there are 28 a layer and update. What is held lies one
matrix behind the other, so that several can be one factor (`qgalore.layer.autograd_op`). It lives as long as a `with`
block, and is forgotten before where the weight or the basis that it was made of is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from qgalore.layer.layout import padded_width
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import dequantize_several
from qgalore.update.full_rank import FullRankWeight
from qgalore.update.stored_bases import WeightWithBases

HELD_BYTES = 32 << 20
"""The weights of a layer are held together if they take no more, and so are its bases: weights up to 350M, bases to 1B.

Beyond that a kernel's own time is longer than the gap that is saved, and memory is what large models are short of: the
weights of a 7B layer take 400 MB.
"""


@contextlib.contextmanager
def held_weights(layers: Sequence[LowRankLinear], dtype: torch.dtype) -> Iterator[None]:
    """Within it `LowRankLinear.padded_weight(dtype)` of quantized layers is there already.

    Nothing is held for products in INT8, or where it would be more than `HELD_BYTES`.
    """
    _hold_weights(layers, dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.cached_weight = None


@contextlib.contextmanager
def held_bases(weights: Sequence[FullRankWeight], dtype: torch.dtype) -> Iterator[None]:
    """Within it `WeightWithBases.basis(side, dtype)` of quantized bases is there already, unless they are too many."""
    projected = [weight for weight in weights if isinstance(weight, WeightWithBases)]
    _hold_bases(projected, dtype)
    try:
        yield
    finally:
        for weight in projected:
            weight.held_bases.clear()


def _hold_weights(layers: Sequence[LowRankLinear], dtype: torch.dtype) -> None:
    multiplied = [layer for layer in layers if not layer.format.int8_products]
    stored = [(layer, weight) for layer in multiplied if (weight := layer.quantized_weight) is not None]
    shapes = [(padded_width(weight.shape[0]), padded_width(weight.shape[1])) for _, weight in stored]
    if sum(map(math.prod, shapes)) * dtype.itemsize > HELD_BYTES:
        return
    values = dequantize_several([weight for _, weight in stored], dtype, shapes)
    for (layer, _), padded in zip(stored, values, strict=True):
        layer.cached_weight = padded


def _hold_bases(weights: Sequence[WeightWithBases], dtype: torch.dtype) -> None:
    stored = [(weight, side, basis) for weight in weights for side, basis in weight.quantized_bases().items()]
    if sum(math.prod(basis.shape) for *_, basis in stored) * dtype.itemsize > HELD_BYTES:
        return
    values = dequantize_several([basis for *_, basis in stored], dtype)
    for (weight, side, _), value in zip(stored, values, strict=True):
        weight.held_bases[side] = value
