"""Reading and writing of tiles by products of Newton-Schulz: through tensor descriptors, or by pointers with masks.

WHOLE: every tile lies within its matrix, which is a descriptor (TMA): a program names a tile, and the tensor memory
accelerator moves it, so that no registers hold addresses and masks. Otherwise a matrix is a pointer.

Squares of several matrices are one below the other: `base` is the first row of one of them, and 0 of a buffer of X.
Rows and columns of tiles count within a matrix, of which `rows` are the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qgalore.kernels.triton.tiles import to_float

__all__: list[str] = []


@triton.jit
def rows_of(matrix, base, row, rows, column, columns, stride, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """A tile (R, C). By pointers, rows beyond the last are those from the beginning, for results that are not stored.

    columns: those beyond are 0; None where tiles are whole along them.
    """
    if WHOLE:
        value = matrix.load([base + row, column])
    else:
        i, j = row + tl.arange(0, R), column + tl.arange(0, C)
        at = matrix + base * stride + (i % rows)[:, None] * stride + j[None, :]
        if columns is None:
            value = tl.load(at)
        else:
            value = tl.load(at, mask=(j < columns)[None, :], other=0.0)
    return value


@triton.jit
def terms_of(x, row, rows, column, width, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """A tile (R, C) of X whose rows are summed up: those beyond the last are 0."""
    if WHOLE:
        value = x.load([row, column])
    else:
        i, j = row + tl.arange(0, R), column + tl.arange(0, C)
        value = tl.load(x + i[:, None] * width + j[None, :], mask=(i < rows)[:, None], other=0.0)
    return value


@triton.jit
def rounded(value, matrix, WHOLE: tl.constexpr):
    """float32 values in the dtype of a matrix."""
    return to_float(value, matrix.dtype if WHOLE else matrix.dtype.element_ty)


@triton.jit
def store_tile(matrix, row, rows, column, stride, value, WHOLE: tl.constexpr):
    """Write a tile of X."""
    if WHOLE:
        matrix.store([row, column], value)
    else:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(matrix + i[:, None] * stride + j[None, :], value, mask=(i < rows)[:, None])


@triton.jit
def store_turned(matrix, row, rows, column, stride, value, WHOLE: tl.constexpr):
    """Write the transpose of a tile of X to a matrix that is the transpose of X."""
    if WHOLE:
        matrix.store([column, row], tl.trans(value))
    else:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(matrix + j[:, None] * stride + i[None, :], tl.trans(value), mask=(i < rows)[None, :])


@triton.jit
def store_symmetric(out, turned, base, row, column, rows, value, WHOLE: tl.constexpr):
    """Write a tile of a symmetric matrix, and its transpose on the other side of the diagonal.

    turned: the same matrix, in tiles of the transpose.
    """
    if WHOLE:
        out.store([base + row, column], value)
        turned.store([base + column, row], tl.trans(value))
    else:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        out += base * rows
        tl.store(out + i[:, None] * rows + j[None, :], value, mask=(i < rows)[:, None] & (j < rows)[None, :])
        at = out + j[:, None] * rows + i[None, :]
        tl.store(at, tl.trans(value), mask=(j < rows)[:, None] & (i < rows)[None, :])


@triton.jit
def store_once(out, base, row, column, rows, value):
    """The same by pointers, of what is on and below the diagonal, so that no two stores meet."""
    i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
    below = (i < rows)[:, None] & (j < rows)[None, :] & (i[:, None] >= j[None, :])
    above = (j < rows)[:, None] & (i < rows)[None, :] & (j[:, None] < i[None, :])
    out += base * rows
    tl.store(out + i[:, None] * rows + j[None, :], value, mask=below)
    tl.store(out + j[:, None] * rows + i[None, :], tl.trans(value), mask=above)


class Tiled:
    """Buffers as kernels take them: descriptors if tiles are whole, made once for each; else the buffers themselves."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._made: dict[tuple[Any, ...], TensorDescriptor] = {}

    def __call__(self, matrix: Tensor, height: int, width: int) -> Any:
        """A buffer, or squares one below the other, in tiles (height, width)."""
        if not self._whole:
            return matrix
        key = matrix.data_ptr(), matrix.dtype, height, width
        if key not in self._made:
            flat = matrix.flatten(0, -2)
            self._made[key] = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [height, width])
        return self._made[key]


def takes_descriptors(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tiles go through descriptors: of at most 16 bits a value, on Hopper, where that was timed."""
    if device.type != "cuda" or torch.version.hip is not None or dtype.itemsize > 2:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9
