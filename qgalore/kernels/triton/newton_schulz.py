"""Newton-Schulz steps on a group of matrices X (rows, columns), in Triton; sums in float32.

    A = X Xᵀ,    B = b s² A + c s⁴ A A,    X <- s (a X + B X)

with s = 1 / |X| in the first step, where |X|² is the trace of A, and 1 afterwards. A and B are symmetric: tiles on and
below the diagonal are computed and stored twice. In segments, products of such squares take more of the work
(`reference.newton_schulz` has the formulas).

Layout: as `matrix_groups` says, with a second buffer that takes the result, in turn. Squares (count, rows, rows). A
kernel takes a buffer once for each size of its tiles (`tile_access`). What a matrix becomes does not depend on its
neighbours: so norms are not added up by PyTorch, in which the order within a batch depends on its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div, even_groups, next_power_of_2
from qgalore.kernels.reference.newton_schulz import steps_by_segment, working_dtype
from qgalore.kernels.triton.gradient_check import SUMS, partial_sums
from qgalore.kernels.triton.matrix_groups import (
    ENDS,
    FILLED_ROWS,
    SideBySide,
    Tile,
    Tiles,
    corner,
    end_of,
    matrix_of,
    squares_summed,
    tile_of_slot,
    tiles_below,
    tiles_for,
)
from qgalore.kernels.triton.tile_access import (
    Tiled,
    rounded,
    rows_of,
    store_once,
    store_symmetric,
    store_tile,
    terms_of,
)
from qgalore.kernels.triton.tiles import chosen

__all__ = ["orthogonalize"]


@triton.jit
def _fill_kernel(
    matrices, x, factors, numbers, rows, width, lengths, strides, starts, ends, T: tl.constexpr, C: tl.constexpr,
    TURNS: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """X, from matrices and factors as `tile_of_slot` reads them."""
    row, column, value = tile_of_slot(
        matrices, factors, numbers, rows, lengths, strides, starts, ends, T, C, TURNS, HAS_FACTORS
    )
    store_tile(x, row, rows, column, width.to(tl.int64), rounded(value, x, False), False)


@triton.jit(do_not_specialize=ENDS)
def _gram_kernel(
    x, other_x, gram, tiled, turned, rows, width, factor, e0, e1, e2, e3, e4, e5, e6, e7, T: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ONCE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    row, column = corner(tl.program_id(0), T, S)
    start = end_of(which - 1, e0, e1, e2, e3, e4, e5, e6, e7) * C
    end = end_of(which, e0, e1, e2, e3, e4, e5, e6, e7) * C
    total = tl.zeros((T, S), dtype=tl.float32)
    if WHOLE:
        tl.assume(start < end)  # so that sums stay in the registers that tensor cores write
    for k in range(start, end, K):
        left = rows_of(x, 0, row, rows, k, None, width, T, K, WHOLE)
        right = rows_of(other_x, 0, column, rows, k, None, width, S, K, WHOLE)
        total = tl.dot(left, right.T, total)
    _store(gram, tiled, turned, which * rows, row, column, rows, total * factor, ONCE, WHOLE)


@triton.jit
def _store(out, tiled, turned, base, row, column, rows, value, ONCE: tl.constexpr, WHOLE: tl.constexpr):
    """Write a tile of a symmetric matrix twice; `tiled` and `turned` are `out` in tiles and in their transposes.

    ONCE: of tiles that reach over the diagonal, what is on and below that: of two different factors, value (i, j) and
    value (j, i) may differ in their last bit.
    """
    value = rounded(value, out, False)
    if ONCE and column + value.shape[1] - 1 > row:
        store_once(out, base, row, column, rows, value)
    else:
        store_symmetric(tiled, turned, base, row, column, rows, value, WHOLE)


@triton.jit
def _square_kernel(
    a, b, own_a, own_b, out, tiled, turned, scale, rows, product, first, second, T: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, SCALES: tl.constexpr, SECOND: tl.constexpr, ONCE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out = product a b + first a + second b of commuting symmetric matrices; b is read by its rows.

    SCALES: 1 where a is to be multiplied by `scale`, 2 where b, the same matrix, is, too.
    """
    which = tl.program_id(1)
    row, column = corner(tl.program_id(0), T, S)
    base = which * rows
    total = tl.zeros((T, S), dtype=tl.float32)
    if WHOLE:
        tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = rows_of(a, base, row, rows, k, rows, rows, T, K, WHOLE)
        right = rows_of(b, base, column, rows, k, rows, rows, S, K, WHOLE)
        total = tl.dot(left, right.T, total)
    own = rows_of(own_a, base, row, rows, column, rows, rows, T, S, WHOLE).to(tl.float32)
    if SCALES:
        square = tl.load(scale + which)
        first, product = first * square, product * square
        if SCALES == 2:
            product *= square
    value = first * own + product * total
    if SECOND:
        value += second * rows_of(own_b, base, row, rows, column, rows, rows, T, S, WHOLE).to(tl.float32)
    _store(out, tiled, turned, base, row, column, rows, value, ONCE, WHOLE)


@triton.jit(do_not_specialize=ENDS)
def _apply_kernel(
    x, own_x, even, scale, out, rows, width, first, e0, e1, e2, e3, e4, e5, e6, e7, T: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, SCALES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    index, row = tl.program_id(1), tl.program_id(0) * T
    which, column = matrix_of(index, e0, e1, e2, e3, e4, e5, e6), index * C
    total = tl.zeros((T, C), dtype=tl.float32)
    if WHOLE:
        tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = rows_of(even, which * rows, row, rows, k, rows, rows, T, K, WHOLE)
        total = tl.dot(left, terms_of(x, k, rows, column, width, K, C, WHOLE), total)
    own = rows_of(own_x, 0, row, rows, column, None, width, T, C, WHOLE)
    value = first * own.to(tl.float32) + total
    if SCALES:
        value *= tl.sqrt(tl.load(scale + which))
    store_tile(out, row, rows, column, width, rounded(value, out, WHOLE), WHOLE)


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
    gram += which.to(tl.int64) * rows * rows
    tl.store(sums + which * WIDTH + program, squares_summed(gram, program * T, rows, T, K))


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


TILES: dict[int, Tiles] = {
    768: Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 4, 3)),
    1024: Tiles(Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
    2048: Tiles(Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
    1 << 30: Tiles(Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
}
"""By the most rows that they are for: the fastest of `python -m benchmarks.bench_direction --sweep` on an H200, of
those that take at most the 99 KiB of shared memory of consumer cards."""
WHOLE_TILES: dict[int, Tiles] = {
    768: Tiles(Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), whole=True),
    1024: Tiles(Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), whole=True),
    2048: Tiles(Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), whole=True),
    1 << 30: Tiles(Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 4), whole=True),
}
"""The same through descriptors; those of 768 and 1,024 rows were the fastest on an H200, others are not swept yet. By
tiles of 128 x 256 products with X reach 0.91 of what cuBLAS makes of a large one at 4096 rows, and symmetric ones 0.73
(H200, with masks)."""


def orthogonalize(
    matrices: Sequence[Tensor],
    polynomials: Sequence[tuple[float, float, float]],
    segments: Sequence[int] | None = None,
) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize`."""
    found, in_segments = [], segments is not None
    dtype = _dtype_inside(matrices[0].dtype, in_segments)
    tiles = tiles_for(min(matrices[0].shape), dtype, matrices[0].device, TILES, WHOLE_TILES)
    for part in even_groups(matrices):
        group = _Group(part, in_segments, tiles)
        found += group.plain(polynomials) if segments is None else group.by_segments(polynomials, segments)
    return found


def _dtype_inside(dtype: torch.dtype, in_segments: bool) -> torch.dtype:
    return working_dtype(dtype) if in_segments else dtype


class _Group:
    """At most `GROUP_LIMIT` matrices whose shorter sides are equal, side by side in a buffer."""

    def __init__(self, matrices: Sequence[Tensor], in_segments: bool, tiles: Tiles) -> None:
        self._matrices, self._in_segments = matrices, in_segments
        self._tiles, self._tiled = tiles, Tiled(tiles.whole)
        self._side_by_side = SideBySide(matrices, tiles.apply.columns)
        self._rows, self._count = self._side_by_side.rows, len(matrices)
        self._dtype = _dtype_inside(matrices[0].dtype, in_segments)
        self._x = self._side_by_side.empty(self._dtype)
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
        return self._side_by_side.slots(self._x)

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
        return self._side_by_side.slots(self._x)

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
        height = next_power_of_2(max(FILLED_ROWS, ceil_div(self._rows, SUMS)))
        programs, scale = ceil_div(self._rows, height), torch.empty(self._count, device=gram.device)
        sums = torch.empty(self._count, SUMS, device=gram.device)
        _square_sums_kernel[(programs, self._count)](
            gram, sums, self._rows, T=height, K=FILLED_ROWS, WIDTH=SUMS, num_warps=4
        )
        _norm_kernel[(self._count,)](sums, scale, programs, WIDTH=SUMS, num_warps=4)
        return scale

    def _squares(self, count: int) -> tuple[Tensor, ...]:
        shape = (count, self._count, self._rows, self._rows)
        return torch.empty(*shape, dtype=self._dtype, device=self._x.device).unbind()

    def _fill(self, factors: Tensor | None) -> None:
        """Write the matrices, times their factors, to their slots."""
        for programs, arguments in self._side_by_side.fills():
            _fill_kernel[(programs,)](
                x=self._x, factors=factors, HAS_FACTORS=factors is not None, num_warps=4, **arguments
            )

    def _symmetric(self, matrix: Tensor, rows: int, columns: int) -> tuple[Any, Any, Any]:
        """Squares as a kernel takes them that writes them: as they are, in tiles, and in tiles of the transposes."""
        return matrix, self._tiled(matrix, rows, columns), self._tiled(matrix, columns, rows)

    def _gram(self, gram: Tensor, factor: float) -> None:
        group, (rows, columns, depth, warps, stages) = self._side_by_side, self._tiles.gram
        _gram_kernel[(tiles_below(self._rows, rows, columns), self._count)](
            self._tiled(self._x, rows, depth), self._tiled(self._x, columns, depth),
            *self._symmetric(gram, rows, columns), self._rows, group.width, factor, *group.ends, T=rows, S=columns,
            K=depth, C=group.columns, ONCE=self._in_segments, WHOLE=self._tiles.whole, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip

    def _square(
        self, a: Tensor, b: Tensor, out: Tensor, factors: tuple[float, float, float], scale: Tensor | None, scales: int
    ) -> None:
        """out = factors · (a b, a, b), as `_square_kernel` has it."""
        tiled, (rows, columns, depth, warps, stages) = self._tiled, self._tiles.square
        _square_kernel[(tiles_below(self._rows, rows, columns), self._count)](
            tiled(a, rows, depth), tiled(b, columns, depth), tiled(a, rows, columns), tiled(b, rows, columns),
            *self._symmetric(out, rows, columns), a if scale is None else scale, self._rows, *factors, T=rows,
            S=columns, K=depth, SCALES=scales, SECOND=factors[2] != 0.0, ONCE=self._in_segments,
            WHOLE=self._tiles.whole, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _apply(self, factor: Tensor, first: float, scale: Tensor | None, out: Tensor) -> None:
        """out = (first X + factor X) sqrt(scale)."""
        tiled, group, (rows, columns, depth, warps, stages) = self._tiled, self._side_by_side, self._tiles.apply
        _apply_kernel[(ceil_div(self._rows, rows), group.width // columns)](
            tiled(self._x, depth, columns), tiled(self._x, rows, columns), tiled(factor, rows, depth),
            factor if scale is None else scale, tiled(out, rows, columns), self._rows, group.width, first,
            *group.ends, T=rows, K=depth, C=columns, SCALES=scale is not None, WHOLE=self._tiles.whole,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _unit_factors(matrices: Sequence[Tensor]) -> Tensor:
    """`reference.newton_schulz.unit_factors`, in two launches; contiguous copies are made of other matrices."""
    sums, counts = partial_sums([matrix.contiguous() for matrix in matrices])
    factors = torch.empty(len(matrices), dtype=torch.float32, device=sums.device)
    numel = tuple(matrix.numel() for matrix in matrices)
    _unit_factor_kernel[(len(matrices),)](sums, factors, numel, counts, WIDTH=SUMS, num_warps=4)
    return factors
