"""Newton-Schulz steps on a group of matrices X (rows, columns), in Triton; sums in float32.

    A = X Xᵀ,    B = b s² A + c s⁴ A A,    X <- s (a X + B X)

with s = 1 / |X| in the first step, where |X|² is the trace of A, and 1 afterwards. A and B are symmetric: tiles on and
below the diagonal are computed and stored twice. In segments, products of such squares take more of the work
(`reference.newton_schulz` has the formulas).

Layout: the matrices have equally many rows and lie side by side in one buffer (rows, width), each padded with zeros to
whole tiles of columns; a second buffer takes the result, in turn. Squares (count, rows, rows). `ends` are the tiles of
columns after each matrix, as arguments of the launch: a table on the device could not be made while a graph is
captured. What a matrix becomes does not depend on its neighbours: so norms are not added up by PyTorch, in which the
order within a batch depends on its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import GROUP_LIMIT, ceil_div, launches, next_power_of_2
from qgalore.kernels.reference.newton_schulz import steps_by_segment, working_dtype
from qgalore.kernels.triton.gradient_check import SUMS, partial_sums
from qgalore.kernels.triton.tiles import chosen, matrix_of_program, to_float

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
def _rows_and_columns(index, T: tl.constexpr, S: tl.constexpr):
    """Rows (T,) and columns (S,), S a multiple of T, of a tile among those that reach below the diagonal."""
    EACH: tl.constexpr = S // T
    row, column = _below_diagonal(index // EACH)
    return (row * EACH + index % EACH) * T + tl.arange(0, T), column * S + tl.arange(0, S)


@triton.jit
def _store_both(out, value, i, j, rows, ONCE: tl.constexpr):
    """A tile, and its transpose on the other side of the diagonal.

    ONCE: where it reaches over the diagonal, only what is on and below that, so that no two stores meet: of two
    different factors, value (i, j) and value (j, i) may differ in their last bit.
    """
    inside = (i < rows)[:, None] & (j < rows)[None, :]
    turned = (j < rows)[:, None] & (i < rows)[None, :]
    at, other = out + i[:, None] * rows + j[None, :], out + j[:, None] * rows + i[None, :]
    if ONCE and tl.max(j, axis=0) > tl.min(i, axis=0):
        inside = inside & (i[:, None] >= j[None, :])
        turned = turned & (j[:, None] < i[None, :])
        tl.store(at, value, mask=inside)
        tl.store(other, tl.trans(value), mask=turned)
    else:
        tl.store(at, value, mask=inside)
        tl.store(other, tl.trans(value), mask=turned)


@triton.jit
def _fill_kernel(
    matrices, x, factors, numbers, rows, width, lengths, strides, starts, ends, T: tl.constexpr, C: tl.constexpr,
    TURNS: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """Slots of X, each a matrix (rows, length), with zeros up to a whole tile.

    TURNS: they are contiguous along the rows, and a tile is turned. factors: of all matrices of the group, by number.
    """
    which, program = matrix_of_program(ends)
    matrix, length, stride = chosen(which, matrices), chosen(which, lengths), chosen(which, strides)
    blocks = tl.cdiv(rows, T)
    i, column = (program % blocks) * T + tl.arange(0, T), (program // blocks) * C + tl.arange(0, C)
    if TURNS:
        mask = (column < length)[:, None] & (i < rows)[None, :]
        value = tl.trans(tl.load(matrix + column[:, None].to(tl.int64) * stride + i[None, :], mask=mask, other=0.0))
    else:
        mask = (i < rows)[:, None] & (column < length)[None, :]
        value = tl.load(matrix + i[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0)
    if HAS_FACTORS:
        value = value.to(tl.float32) * tl.load(factors + chosen(which, numbers))
        value = to_float(value, x.dtype.element_ty)
    at = x + i[:, None].to(tl.int64) * width + (chosen(which, starts) + column)[None, :]
    tl.store(at, value, mask=(i < rows)[:, None])


@triton.jit(do_not_specialize=_ENDS)
def _gram_kernel(
    x, gram, rows, width, factor, e0, e1, e2, e3, e4, e5, e6, e7, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    i, j = _rows_and_columns(tl.program_id(0), T, S)
    k = tl.arange(0, K)
    start = _end_of(which - 1, e0, e1, e2, e3, e4, e5, e6, e7) * C
    end = _end_of(which, e0, e1, e2, e3, e4, e5, e6, e7) * C
    # Rows beyond the last are read from the beginning, and not stored.
    a_at = x + (i % rows)[:, None] * width + (start + k)[None, :]
    b_at = x + (j % rows)[None, :] * width + (start + k)[:, None]
    total = tl.zeros((T, S), dtype=tl.float32)
    for _ in range(start, end, K):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += K
        b_at += K
    _store_both(gram + which * rows * rows, to_float(total * factor, gram.dtype.element_ty), i, j, rows, ONCE)


@triton.jit
def _square_kernel(
    a, b, out, scale, rows, product, first, second, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    SCALES: tl.constexpr, SECOND: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """out = product a b + first a + second b of commuting symmetric matrices; b is read by its rows.

    SCALES: 1 where a is to be multiplied by `scale`, 2 where b, the same matrix, is, too.
    """
    which = tl.program_id(1)
    i, j = _rows_and_columns(tl.program_id(0), T, S)
    k = tl.arange(0, K)
    a += which * rows * rows
    b += which * rows * rows
    total = tl.zeros((T, S), dtype=tl.float32)
    for start in range(0, rows, K):
        inside = start + k < rows
        left = tl.load(a + (i % rows)[:, None] * rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(b + (j % rows)[None, :] * rows + (start + k)[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
    own = tl.load(a + (i % rows)[:, None] * rows + (j % rows)[None, :]).to(tl.float32)
    if SCALES:
        square = tl.load(scale + which)
        first, product = first * square, product * square
        if SCALES == 2:
            product *= square
    value = first * own + product * total
    if SECOND:
        value += second * tl.load(b + (i % rows)[:, None] * rows + (j % rows)[None, :]).to(tl.float32)
    _store_both(out + which * rows * rows, to_float(value, out.dtype.element_ty), i, j, rows, ONCE)


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


@triton.jit
def _trace_kernel(gram, scale, rows, WIDTH: tl.constexpr):
    """scale = 1 / trace; 0 where its square would not be finite: of |X| below 1e-9 the result is 0."""
    gram += tl.program_id(0).to(tl.int64) * rows * rows
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, rows, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(gram + at.to(tl.int64) * (rows + 1), mask=at < rows, other=0.0).to(tl.float32)
    trace = tl.sum(total, axis=0)
    tl.store(scale + tl.program_id(0), tl.where(trace < 1e-18, 0.0, 1.0 / tl.maximum(trace, 1e-18)))


@triton.jit
def _square_sums_kernel(gram, sums, rows, T: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of squares of T rows a program."""
    which, program = tl.program_id(1), tl.program_id(0)
    i, k = (program * T + tl.arange(0, T))[:, None], tl.arange(0, K)[None, :]
    gram += which.to(tl.int64) * rows * rows
    total = tl.zeros((T, K), dtype=tl.float32)
    for start in range(0, rows, K):
        mask = (i < rows) & (start + k < rows)
        value = tl.load(gram + i.to(tl.int64) * rows + (start + k), mask=mask, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + which * WIDTH + program, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def _norm_kernel(sums, scale, programs, WIDTH: tl.constexpr):
    """scale = 1 / the root of the sum of all sums."""
    at = tl.arange(0, WIDTH)
    values = tl.load(sums + tl.program_id(0) * WIDTH + at, mask=at < programs, other=0.0)
    norm = tl.sqrt(tl.sum(values, axis=0))
    tl.store(scale + tl.program_id(0), 1.0 / tl.maximum(norm, 1e-6))


@triton.jit
def _unit_factor_kernel(sums, factors, numel, counts, WIDTH: tl.constexpr):
    """The power of two that brings a matrix to values of about 1, by its sums of squares; 0 where that is too small."""
    which, at = tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(sums + which * WIDTH + at, mask=at < chosen(which, counts), other=0.0)
    size = tl.sqrt(tl.sum(values, axis=0) / chosen(which, numel))
    exponent = tl.floor(tl.log2(tl.maximum(size, 1e-18)) + 0.5)
    factor = ((127 - tl.minimum(exponent, 126.0).to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    tl.store(factors + which, tl.where(size < 1e-18, 0.0, factor))


class Tiles(NamedTuple):
    """How products are computed; all numbers but warps and stages are powers of two of at least 16."""

    square: tuple[int, int, int, int, int]
    """Rows of a tile of a symmetric matrix, its columns, a multiple of them, terms summed at a time, warps, stages."""
    full: tuple[int, int, int, int, int]
    """The same of the products with X; its columns are a multiple of the terms that both sum at a time."""


TILES: dict[int, Tiles] = {
    768: Tiles((64, 64, 64, 4, 4), (128, 128, 64, 4, 3)),
    1024: Tiles((128, 128, 64, 4, 3), (128, 128, 64, 4, 3)),
    2048: Tiles((64, 128, 64, 4, 3), (128, 128, 64, 4, 3)),
    1 << 30: Tiles((128, 128, 64, 4, 3), (128, 256, 64, 8, 4)),
}
"""By the most rows that they are for: the fastest of `python -m benchmarks.bench_direction --sweep` on an H200, where
products with X reach 0.91 of what cuBLAS makes of a large product at 4096 rows, and symmetric ones 0.73."""


def tiles_for(rows: int) -> Tiles:
    """Those of the table."""
    return next(tiles for most, tiles in sorted(TILES.items()) if rows <= most)


_FILLED_ROWS = 32
"""Rows of a tile that is copied into X, or that is squared; as many columns as a tile of X has."""


def orthogonalize(
    matrices: Sequence[Tensor],
    polynomials: Sequence[tuple[float, float, float]],
    segments: Sequence[int] | None = None,
) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize`."""
    found = []
    for start in range(0, len(matrices), GROUP_LIMIT):
        group = _Group(matrices[start : start + GROUP_LIMIT], in_segments=segments is not None)
        found += group.plain(polynomials) if segments is None else group.by_segments(polynomials, segments)
    return found


class _Group:
    """At most `GROUP_LIMIT` matrices whose shorter sides are equal, side by side in a buffer."""

    def __init__(self, matrices: Sequence[Tensor], in_segments: bool) -> None:
        self._matrices, self._rows = matrices, min(matrices[0].shape)
        self._tiles, self._in_segments = tiles_for(self._rows), in_segments
        dtype, device, columns = matrices[0].dtype, matrices[0].device, self._tiles.full[1]
        ends: list[int] = []
        for matrix in matrices:
            ends.append((ends[-1] if ends else 0) + ceil_div(max(matrix.shape), columns))
        self._width, self._count = ends[-1] * columns, len(matrices)
        self._starts = [end * columns for end in [0, *ends[:-1]]]
        self._dtype = working_dtype(dtype) if in_segments else dtype
        self._x = torch.empty(self._rows, self._width, dtype=self._dtype, device=device)
        self._ends = [*ends, *[ends[-1]] * (GROUP_LIMIT - self._count)]
        self._out = torch.empty_like(self._x)

    def plain(self, polynomials: Sequence[tuple[float, float, float]]) -> list[Tensor]:
        """Each step on X, scaled by |X|."""
        self._fill(None)
        gram, even = self._squares(2)
        scale = torch.empty(self._count, dtype=torch.float32, device=gram.device)
        for step, (first, third, fifth) in enumerate(polynomials):
            self._gram(gram, 1.0)
            if step == 0:
                _trace_kernel[(self._count,)](gram, scale, self._rows, WIDTH=SUMS, num_warps=4)
            self._square(gram, gram, even, (fifth, third, 0.0), scale, 2 if step == 0 else 0)
            self._apply(even, first, scale if step == 0 else None, self._out)
            self._x, self._out = self._out, self._x
        return self._slots(self._x)

    def by_segments(self, polynomials: Sequence[tuple[float, float, float]], segments: Sequence[int]) -> list[Tensor]:
        """Segments of steps on the Gram matrix, scaled by its norm."""
        self._fill(_unit_factors(self._matrices))
        squares = self._squares(4 if max(segments) > 1 else 2)
        for index, steps in enumerate(steps_by_segment(polynomials, segments)):
            self._gram(squares[0], 1.0 if index else 1.0 / self._rows)
            scale = None if index else self._norm_scales(squares[0])
            factor, first = self._segment(squares, steps, scale)
            last, size = index == len(segments) - 1, None if scale is None else scale / self._rows
            # A buffer of values of 16 bits holds those of the other type of 16 bits.
            out = self._out.view(self._matrices[0].dtype) if last else self._out
            self._apply(factor, first, size, out)
            self._x, self._out = out, self._x
        return self._slots(self._x)

    def _segment(
        self, squares: Sequence[Tensor], steps: Sequence[tuple[float, float, float]], scale: Tensor | None
    ) -> tuple[Tensor, float]:
        """W and q; squares: the Gram matrices, which are used up, and three more, or one for a single step."""
        gram, factor, *more = squares
        whole = 1.0
        for index, (first, third, fifth) in enumerate(steps):
            scales = 1 if scale is not None and index == 0 else 0
            even = factor if index == 0 else more[0]
            self._square(gram, gram, even, (fifth, third, 0.0), scale, 2 * scales)
            moves = index < len(steps) - 1
            if moves:
                self._square(gram, even, more[1], (1.0, first, 0.0), scale, scales)
                self._square(more[1], even, gram, (1.0, first, 0.0), None, 0)
            if index:
                self._square(factor, even, more[1], (1.0, first, whole), None, 0)
                factor, more[1] = more[1], factor
            whole *= first
        return factor, whole

    def _norm_scales(self, gram: Tensor) -> Tensor:
        """`reference.newton_schulz.gram_scales`, added up in an order that the number of matrices does not change."""
        height = next_power_of_2(max(_FILLED_ROWS, ceil_div(self._rows, SUMS)))
        programs, scale = ceil_div(self._rows, height), torch.empty(self._count, device=gram.device)
        sums = torch.empty(self._count, SUMS, device=gram.device)
        _square_sums_kernel[(programs, self._count)](
            gram, sums, self._rows, T=height, K=_FILLED_ROWS, WIDTH=SUMS, num_warps=4
        )
        _norm_kernel[(self._count,)](sums, scale, programs, WIDTH=SUMS, num_warps=4)
        return scale

    def _squares(self, count: int) -> tuple[Tensor, ...]:
        shape = (count, self._count, self._rows, self._rows)
        return torch.empty(*shape, dtype=self._dtype, device=self._x.device).unbind()

    def _fill(self, factors: Tensor | None) -> None:
        """Write the matrices, times their factors, to their slots; one launch for each order of their values."""
        views = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in self._matrices]
        views = [view if 1 in view.stride() else view.contiguous() for view in views]
        columns = self._tiles.full[1]
        for indices in launches(views, lambda view: view.stride(1) != 1):
            turns = views[indices[0]].stride(1) != 1
            chosen_views = [views[index] for index in indices]
            lengths = tuple(view.shape[1] for view in chosen_views)
            blocks = ceil_div(self._rows, _FILLED_ROWS)
            ends = tuple(itertools.accumulate(blocks * ceil_div(length, columns) for length in lengths))
            _fill_kernel[(ends[-1],)](
                tuple(chosen_views), self._x, factors, tuple(indices), self._rows, self._width, lengths,
                tuple(view.stride(0 if not turns else 1) for view in chosen_views),
                tuple(self._starts[index] for index in indices), ends, T=_FILLED_ROWS, C=columns, TURNS=turns,
                HAS_FACTORS=factors is not None, num_warps=4,
            )  # fmt: skip

    def _below(self) -> int:
        """Tiles of a symmetric matrix that reach below its diagonal."""
        rows, columns = self._tiles.square[:2]
        across = ceil_div(self._rows, columns)
        return columns // rows * (across * (across + 1) // 2)

    def _gram(self, gram: Tensor, factor: float) -> None:
        rows, columns, depth, warps, stages = self._tiles.square
        _gram_kernel[(self._below(), self._count)](
            self._x, gram, self._rows, self._width, factor, *self._ends, T=rows, S=columns, K=depth,
            C=self._tiles.full[1], ONCE=self._in_segments, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _square(
        self, a: Tensor, b: Tensor, out: Tensor, factors: tuple[float, float, float], scale: Tensor | None, scales: int
    ) -> None:
        """out = factors · (a b, a, b), as `_square_kernel` has it."""
        rows, columns, depth, warps, stages = self._tiles.square
        _square_kernel[(self._below(), self._count)](
            a, b, out, a if scale is None else scale, self._rows, *factors, T=rows, S=columns, K=depth, SCALES=scales,
            SECOND=factors[2] != 0.0, ONCE=self._in_segments, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _apply(self, factor: Tensor, first: float, scale: Tensor | None, out: Tensor) -> None:
        """out = (first X + factor X) sqrt(scale)."""
        rows, columns, depth, warps, stages = self._tiles.full
        _apply_kernel[(ceil_div(self._rows, rows), self._width // columns)](
            self._x, factor, factor if scale is None else scale, out, self._rows, self._width, first, *self._ends,
            T=rows, K=depth, C=columns, SCALES=scale is not None, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _slots(self, x: Tensor) -> list[Tensor]:
        return [_slot(x, start, matrix) for start, matrix in zip(self._starts, self._matrices, strict=True)]


def _unit_factors(matrices: Sequence[Tensor]) -> Tensor:
    """`reference.newton_schulz.unit_factors`, in two launches; contiguous copies are made of other matrices."""
    sums, counts = partial_sums([matrix.contiguous() for matrix in matrices])
    factors = torch.empty(len(matrices), dtype=torch.float32, device=sums.device)
    numel = tuple(matrix.numel() for matrix in matrices)
    _unit_factor_kernel[(len(matrices),)](sums, factors, numel, counts, WIDTH=SUMS, num_warps=4)
    return factors


def _slot(x: Tensor, start: int, matrix: Tensor) -> Tensor:
    """The slot of a matrix in a buffer, in the shape of the matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    view = x[:, start : start + max(matrix.shape)]
    return view.T if tall else view
