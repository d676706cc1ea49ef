"""The quantized weights and bases of one decoder layer, dequantized in one launch before the pass that uses them.

Each alone takes 3 us of a GPU and a gap, whatever its size, and there are 28 a layer and update. Cached matrices lie
one behind the other, so that several can be one factor (`qgalore.layer.autograd_op`). They live as long as a `with`
block, and are forgotten before where the weight or the basis that they were made of is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from qgalore.layer.layout import padded_width
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import grouped_dequantize
from qgalore.subspace.methods import Streaming
from qgalore.subspace.stored_bases import StoredBases
from qgalore.update.weight import Weight

CACHE_BYTES = 32 << 20
"""The weights of a layer are cached if together they take no more, as up to 350M; so are its bases, as up to 1B.

Beyond that a kernel's own time is longer than the gap that is saved, and memory is what large models are short of: the
weights of a 7B layer take 400 MB.
"""


@contextlib.contextmanager
def cached_weights(layers: Sequence[LowRankLinear], dtype: torch.dtype, limit: float | None = None) -> Iterator[None]:
    """Within it `LowRankLinear.padded_weight(dtype)` of quantized layers is there already.

    Nothing is cached for products in INT8 or FP8, or where it would be more than `CACHE_BYTES`.
    limit: other bytes in their place.
    """
    _cache_weights(layers, dtype, CACHE_BYTES if limit is None else limit)
    try:
        yield
    finally:
        for layer in layers:
            layer.cached_weight = None


@contextlib.contextmanager
def cached_bases(weights: Sequence[Weight], dtype: torch.dtype) -> Iterator[None]:
    """Within it `StoredBases.read(side, dtype)` of quantized bases is there already, unless they are too many."""
    stored = [weight.subspace.stored for weight in weights if isinstance(weight.subspace, Streaming)]
    _cache_bases(stored, dtype)
    try:
        yield
    finally:
        for bases in stored:
            bases.cached.clear()


def _cache_weights(layers: Sequence[LowRankLinear], dtype: torch.dtype, limit: float) -> None:
    multiplied = [layer for layer in layers if not layer.format.products]
    stored = [(layer, weight) for layer in multiplied if (weight := layer.quantized_weight) is not None]
    shapes = [(padded_width(weight.shape[0]), padded_width(weight.shape[1])) for _, weight in stored]
    if sum(map(math.prod, shapes)) * dtype.itemsize > limit:
        return
    values = grouped_dequantize([weight for _, weight in stored], dtype, shapes)
    for (layer, _), padded in zip(stored, values, strict=True):
        layer.cached_weight = padded


def _cache_bases(stored_bases: Sequence[StoredBases], dtype: torch.dtype) -> None:
    stored = [(bases, side, basis) for bases in stored_bases for side, basis in bases.quantized().items()]
    if sum(math.prod(basis.shape) for *_, basis in stored) * dtype.itemsize > CACHE_BYTES:
        return
    values = grouped_dequantize([basis for *_, basis in stored], dtype)
    for (bases, side, _), value in zip(stored, values, strict=True):
        bases.cached[side] = value
