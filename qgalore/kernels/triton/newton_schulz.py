"""Newton-Schulz steps on a group of matrices X (rows, columns), in Triton; sums in float32.

    A = X Xᵀ,    B = b s² A + c s⁴ A A,    X <- s (a X + B X)

with s = 1 / |X| in the first step, where |X|² is the trace of A, and 1 afterwards. A and B are symmetric: tiles on and
below the diagonal are computed and stored twice.

Layout: the matrices have equally many rows and lie side by side in one buffer (rows, width), each padded with zeros to
whole tiles of columns; a second buffer takes the result, in turn. A and B (count, rows, rows). `ends` are the tiles of
columns after each matrix, as arguments of the launch: a table on the device could not be made while a graph is
captured. What a matrix becomes does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import GROUP_LIMIT
from qgalore.kernels.triton.tiles import to_float

__all__ = ["orthogonalize"]

_ENDS = [f"e{index}" for index in range(GROUP_LIMIT)]


@triton.jit
def _end_of(which, e0, e1, e2, e3, e4, e5, e6, e7):
    """Tiles of columns after matrix `which`; 0 for -1."""
    low = tl.where(which < 1, tl.where(which < 0, 0, e0), tl.where(which < 2, e1, tl.where(which < 3, e2, e3)))
    high = tl.where(which < 6, tl.where(which < 5, e4, e5), tl.where(which < 7, e6, e7))
    return tl.where(which < 4, low, high)


@triton.jit
def _below_diagonal(index):
    """Row and column, at most the row, of a tile among those on and below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)  # where the root was rounded down or up
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def _store_both(out, value, i, j, rows):
    at = out + i[:, None] * rows + j[None, :]
    tl.store(at, value, mask=(i < rows)[:, None] & (j < rows)[None, :])
    at = out + j[:, None] * rows + i[None, :]
    tl.store(at, tl.trans(value), mask=(j < rows)[:, None] & (i < rows)[None, :])


@triton.jit(do_not_specialize=_ENDS)
def _gram_kernel(
    x, gram, rows, width, e0, e1, e2, e3, e4, e5, e6, e7, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):
    which = tl.program_id(1)
    row, column = _below_diagonal(tl.program_id(0))
    i, j, k = row * T + tl.arange(0, T), column * T + tl.arange(0, T), tl.arange(0, K)
    start = _end_of(which - 1, e0, e1, e2, e3, e4, e5, e6, e7) * C
    end = _end_of(which, e0, e1, e2, e3, e4, e5, e6, e7) * C
    # Rows beyond the last are read from the beginning, and not stored.
    a_at = x + (i % rows)[:, None] * width + (start + k)[None, :]
    b_at = x + (j % rows)[None, :] * width + (start + k)[:, None]
    total = tl.zeros((T, T), dtype=tl.float32)
    for _ in range(start, end, K):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += K
        b_at += K
    _store_both(gram + which * rows * rows, to_float(total, gram.dtype.element_ty), i, j, rows)


@triton.jit
def _polynomial_kernel(gram, even, scale, rows, third, fifth, T: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr):
    which = tl.program_id(1)
    row, column = _below_diagonal(tl.program_id(0))
    i, j, k = row * T + tl.arange(0, T), column * T + tl.arange(0, T), tl.arange(0, K)
    gram += which * rows * rows
    total = tl.zeros((T, T), dtype=tl.float32)
    for start in range(0, rows, K):
        inside = start + k < rows
        a = tl.load(gram + (i % rows)[:, None] * rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(gram + (j % rows)[None, :] * rows + (start + k)[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
    own = tl.load(gram + (i % rows)[:, None] * rows + (j % rows)[None, :]).to(tl.float32)
    if SCALES:
        square = tl.load(scale + which)
        third, fifth = third * square, fifth * square * square
    value = to_float(third * own + fifth * total, even.dtype.element_ty)
    _store_both(even + which * rows * rows, value, i, j, rows)


@triton.jit(do_not_specialize=_ENDS)
def _apply_kernel(
    x, even, scale, out, rows, width, first, e0, e1, e2, e3, e4, e5, e6, e7, T: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1)
    which = (index >= e0).to(tl.int32) + (index >= e1).to(tl.int32) + (index >= e2).to(tl.int32)
    which += (index >= e3).to(tl.int32) + (index >= e4).to(tl.int32) + (index >= e5).to(tl.int32)
    which += (index >= e6).to(tl.int32)
    i, column, k = tl.program_id(0) * T + tl.arange(0, T), index * C + tl.arange(0, C), tl.arange(0, K)
    even += which * rows * rows
    total = tl.zeros((T, C), dtype=tl.float32)
    for start in range(0, rows, K):
        inside = start + k < rows
        a = tl.load(even + (i % rows)[:, None] * rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(x + (start + k)[:, None] * width + column[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
    value = first * tl.load(x + (i % rows)[:, None] * width + column[None, :]).to(tl.float32) + total
    if SCALES:
        value *= tl.sqrt(tl.load(scale + which))
    at = out + i[:, None] * width + column[None, :]
    tl.store(at, to_float(value, out.dtype.element_ty), mask=(i < rows)[:, None])


def tile(rows: int) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile, columns or rows that are summed at a time, warps, stages."""
    return (64, 64, 64, 4, 4) if rows <= 512 else (128, 128, 64, 4, 3)


def orthogonalize(matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]]) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize`."""
    starts = range(0, len(matrices), GROUP_LIMIT)
    return [x for start in starts for x in _launch(matrices[start : start + GROUP_LIMIT], polynomials)]


def _launch(matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]]) -> list[Tensor]:
    """At most `GROUP_LIMIT` matrices whose shorter sides are equal."""
    device, rows = matrices[0].device, min(matrices[0].shape)
    size, columns, depth, warps, stages = tile(rows)
    ends: list[int] = []
    for matrix in matrices:
        ends.append((ends[-1] if ends else 0) + triton.cdiv(max(matrix.shape), columns))
    width, count = ends[-1] * columns, len(matrices)
    x = torch.zeros(rows, width, dtype=matrices[0].dtype, device=device)
    starts = [end * columns for end in [0, *ends[:-1]]]
    for start, matrix in zip(starts, matrices, strict=True):
        _slot(x, start, matrix).copy_(matrix)
    ends += [ends[-1]] * (GROUP_LIMIT - count)
    out = torch.empty_like(x)
    gram, even = torch.empty(2, count, rows, rows, dtype=matrices[0].dtype, device=device)
    scale = torch.empty(0, device=device)
    across = triton.cdiv(rows, size)
    below = across * (across + 1) // 2
    how = {"num_warps": warps, "num_stages": stages}
    for step, (first, third, fifth) in enumerate(polynomials):
        _gram_kernel[(below, count)](x, gram, rows, width, *ends, T=size, K=depth, C=columns, **how)
        if step == 0:
            trace = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float32)
            scale = trace.clamp_min_(1e-30).reciprocal_()
        _polynomial_kernel[(below, count)](
            gram, even, scale, rows, third, fifth, T=size, K=depth, SCALES=step == 0, **how
        )
        _apply_kernel[(across, width // columns)](
            x, even, scale, out, rows, width, first, *ends, T=size, K=depth, C=columns, SCALES=step == 0, **how
        )
        x, out = out, x
    return [_slot(x, start, matrix) for start, matrix in zip(starts, matrices, strict=True)]


def _slot(x: Tensor, start: int, matrix: Tensor) -> Tensor:
    """The slot of a matrix in a buffer, in the shape of the matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    view = x[:, start : start + max(matrix.shape)]
    return view.T if tall else view
