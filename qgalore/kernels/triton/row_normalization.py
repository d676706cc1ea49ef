"""Rows of directions over the roots of their second moments, with the size of the whole kept, in Triton.

    q_i = s² mean x_ij²,    v_i <- beta v_i + (1 - beta) q_i,    f_i = 1 / (sqrt(c v_i) + eps)
    x_ij <- s f_i sqrt(Σ q_i / Σ q_i f_i²) x_ij

with the scale s of the direction and c the second bias correction of the step row. Two launches for a group of
matrices: one reads whole rows, the other sums q and q f² of all rows of its matrix, in one order, and writes.

Layout: directions (rows, columns) float in place, contiguous along the columns or, TALL, along the rows; v (rows,)
float32; q, q f² and f of all matrices one after the other in a buffer (3, all rows) float32, each from a multiple of 16
rows on: the order in which a program adds depends on what the compiler knows of the address, and must not depend on
the neighbours of a matrix. All values are float32 inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import RowNormalization, ceil_div, launches
from qgalore.kernels.triton.tiles import chosen, matrix_of_program, readable, to_float

__all__ = ["normalize_rows"]

_SUMS = 1024  # rows whose sums a program reads at a time
_ALIGNED = tl.constexpr(16)  # numbers that are multiples of it are known to the compiler as such
_SUMMED = {False: (8, 1024, 8), True: (16, 1024, 8)}
"""Rows and columns that a program sums at a time, and its warps, by whether the direction is contiguous along its rows.

64 or 128 bytes a thread are on their way at once, of rows that leave whole sectors of 32 bytes.
"""
_SCALED = {False: (8, 1024, 8), True: (32, 256, 8)}
"""The same of what a program scales at a time."""


@triton.jit
def _offsets(row, column, stride, TALL: tl.constexpr):
    return row + column * stride if TALL else row * stride + column


@triton.jit
def _read_ends(rows, columns, end, TALL: tl.constexpr):
    """Rows and columns that can be read: `end` of those along which values are contiguous."""
    if TALL:
        return end, columns
    else:
        return rows, end


@triton.jit(do_not_specialize=["beta", "rest", "eps"])
def _row_squares_kernel(
    x, second, step_rows, scales, sums, all_rows, firsts, rows, columns, strides, x_ends, ends, skip, beta, rest, eps,
    M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr, RAGGED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    which, program = matrix_of_program(ends)
    x, rows, columns, stride = chosen(which, x), chosen(which, rows), chosen(which, columns), chosen(which, strides)
    row = program * M + tl.arange(0, M)
    at = row[:, None].to(tl.int64)
    inside = row < rows
    total = tl.zeros((M, N), dtype=tl.float32)
    read_rows, read_columns = _read_ends(rows, columns, chosen(which, x_ends), TALL)
    for start in range(0, columns, N):
        column = (start + tl.arange(0, N))[None, :].to(tl.int64)
        mask = (at < read_rows) & (column < read_columns)
        value = tl.load(x + _offsets(at, column, stride, TALL), mask=mask, other=0.0).to(tl.float32)
        if RAGGED and not TALL:  # rows that are none of the matrix are not looked at
            value = tl.where(column < columns, value, 0.0)
        total += value * value
    scale = chosen(which, scales)
    square = tl.sum(total, axis=1) * (scale * scale / columns)
    second = chosen(which, second)
    kept = tl.load(second + row, mask=inside, other=0.0)
    moved = kept * beta + square * rest
    if HAS_SKIP:
        moved = tl.where(tl.load(skip), kept, moved)
    tl.store(second + row, moved, mask=inside)
    inverse2 = tl.load(chosen(which, step_rows) + 5).to(tl.float32, bitcast=True)
    factor = 1.0 / (tl.sqrt(moved * inverse2) + eps)
    sums += chosen(which, firsts) + row
    tl.store(sums, square, mask=inside)
    tl.store(sums + all_rows, square * factor * factor, mask=inside)
    tl.store(sums + 2 * all_rows, factor, mask=inside)


@triton.jit
def _scale_rows_kernel(
    x, scales, sums, all_rows, firsts, rows, columns, strides, x_ends, ends, M: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, TALL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    which, program = matrix_of_program(ends)
    x, rows, columns, stride = chosen(which, x), chosen(which, rows), chosen(which, columns), chosen(which, strides)
    sums += chosen(which, firsts)
    before, after = tl.zeros((S,), dtype=tl.float32), tl.zeros((S,), dtype=tl.float32)
    for start in range(0, rows, S):
        at = start + tl.arange(0, S)
        before += tl.load(sums + at, mask=at < rows, other=0.0)
        after += tl.load(sums + all_rows + at, mask=at < rows, other=0.0)
    size = tl.sqrt(tl.sum(before, axis=0) / tl.maximum(tl.sum(after, axis=0), 1e-30 * rows))
    row = program * M + tl.arange(0, M)
    at = row[:, None].to(tl.int64)
    inside = row < rows
    factor = tl.load(sums + 2 * all_rows + row, mask=inside, other=0.0) * (size * chosen(which, scales))
    read_rows, read_columns = _read_ends(rows, columns, chosen(which, x_ends), TALL)
    if RAGGED:  # whole vectors, and what is left of the rows or columns
        if TALL:
            whole_rows, whole_columns = rows // _ALIGNED * _ALIGNED, columns
        else:
            whole_rows, whole_columns = rows, columns // _ALIGNED * _ALIGNED
    else:
        whole_rows, whole_columns = rows, columns
    for start in range(0, columns, N):
        column = (start + tl.arange(0, N))[None, :].to(tl.int64)
        pointer = x + _offsets(at, column, stride, TALL)
        value = tl.load(pointer, mask=(at < read_rows) & (column < read_columns), other=0.0).to(tl.float32)
        value = to_float(value * factor[:, None], x.dtype.element_ty)
        whole = (at < whole_rows) & (column < whole_columns)
        tl.store(pointer, value, mask=whole)
        if RAGGED:
            if (program * M + M > whole_rows) | (start + N > whole_columns):
                tl.store(pointer, value, mask=inside[:, None] & (column < columns) & (whole == 0))


def normalize_rows(parts: Sequence[RowNormalization], skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.normalize_rows`."""
    directions = [part.direction if 1 in part.direction.stride() else part.direction.contiguous() for part in parts]

    def kind(index: int) -> tuple[object, ...]:
        direction = directions[index]
        return direction.dtype, _is_tall(direction), _is_ragged(direction), parts[index].beta, parts[index].eps

    for indices in launches(range(len(parts)), kind):
        _launch([directions[index] for index in indices], [parts[index] for index in indices], skip)
    return directions


def _is_tall(direction: Tensor) -> bool:
    return direction.stride(1) != 1


def _is_ragged(direction: Tensor) -> bool:
    return bool(direction.shape[0 if _is_tall(direction) else 1] % _ALIGNED.value)


def _launch(directions: Sequence[Tensor], parts: Sequence[RowNormalization], skip: Tensor | None) -> None:
    tall = _is_tall(directions[0])
    device = directions[0].device
    rows, columns = zip(*(direction.shape for direction in directions), strict=True)
    strides = tuple(direction.stride(1 if tall else 0) for direction in directions)
    *firsts, all_rows = 0, *itertools.accumulate(ceil_div(count, _ALIGNED.value) * _ALIGNED.value for count in rows)
    sums = torch.empty(3, all_rows, dtype=torch.float32, device=device)
    _, scales, seconds, step_rows, (beta, *_), (eps, *_) = zip(*parts, strict=True)
    where = sums, all_rows, tuple(firsts), rows, columns, strides, tuple(readable(x) for x in directions)
    order = {"TALL": tall, "RAGGED": _is_ragged(directions[0])}
    ends, how = _programs(rows, *_SUMMED[tall])
    _row_squares_kernel[(ends[-1],)](
        tuple(directions), seconds, step_rows, scales, *where, ends, skip, beta, 1.0 - beta, eps,
        HAS_SKIP=skip is not None, **order, **how,
    )  # fmt: skip
    ends, how = _programs(rows, *_SCALED[tall])
    _scale_rows_kernel[(ends[-1],)](tuple(directions), scales, *where, ends, S=_SUMS, **order, **how)


def _programs(rows: Sequence[int], height: int, width: int, warps: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Programs up to the end of each matrix, and how they are launched."""
    ends = tuple(itertools.accumulate(ceil_div(count, height) for count in rows))
    return ends, {"M": height, "N": width, "num_warps": warps}
