"""Matrices that lie side by side in memory, and are one factor of a product then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def new_stack(like: Tensor, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialized matrices of these shapes in `dtype`, one behind the other on the device of `like`."""
    sizes = [rows * columns for rows, columns in shapes]
    places = like.new_empty(sum(sizes), dtype=dtype).split(sizes)
    return [place.view(shape) for place, shape in zip(places, shapes, strict=True)]


def joined(matrices: Sequence[Tensor], dim: int) -> Tensor | None:
    """The matrix whose rows (`dim` 0) or columns (1) these are, in order; None unless they lie so in one storage."""
    first = matrices[0]
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for matrix in matrices:
        alike = matrix.stride() == first.stride() and matrix.shape[1 - dim] == first.shape[1 - dim]
        if not alike or matrix.untyped_storage().data_ptr() != storage or matrix.storage_offset() != place:
            return None
        place += matrix.shape[dim] * matrix.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(matrix.shape[dim] for matrix in matrices)
    if dim == 1 and first.stride(0) < shape[1]:
        return None
    return first.as_strided(shape, first.stride())
