"""How matrices lie in memory: padded for the tensor cores, or adjacent, so that several are one factor of a product.

A product of which a side is no multiple of eight, such as the 5461 columns of LLaMA-1B's MLP, falls back to kernels
that are ten times slower (docs/performance.md), whatever the distance between its rows. Zeros change no sum, so a
result that is cut again to its own width is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_width(width: int) -> int:
    """`width` where the tensor cores take it, else the next multiple of 16."""
    return width if width % 8 == 0 else -(-width // 16) * 16


def with_padded_columns(x: Tensor) -> Tensor:
    """x (..., n) itself, or a copy with zeros up to the padded width."""
    missing = padded_width(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def cut_columns(x: Tensor, width: int) -> Tensor:
    """x (..., n) itself if n is `width`, else a copy of its first columns."""
    return x if x.shape[-1] == width else x[..., :width].contiguous()


def new_stack(like: Tensor, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialized matrices of these shapes in `dtype`, one behind the other on the device of `like`."""
    sizes = [rows * columns for rows, columns in shapes]
    parts = like.new_empty(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def as_one_view(matrices: Sequence[Tensor], dim: int) -> Tensor | None:
    """The matrix whose rows (`dim` 0) or columns (1) these are, in order; None unless they lie so in one storage."""
    first = matrices[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for matrix in matrices:
        alike = matrix.stride() == first.stride() and matrix.shape[1 - dim] == first.shape[1 - dim]
        if not alike or matrix.untyped_storage().data_ptr() != storage or matrix.storage_offset() != offset:
            return None
        offset += matrix.shape[dim] * matrix.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(matrix.shape[dim] for matrix in matrices)
    if dim == 1 and first.stride(0) < shape[1]:
        return None
    return first.as_strided(shape, first.stride())
