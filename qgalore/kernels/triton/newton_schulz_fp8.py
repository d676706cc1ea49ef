"""Newton-Schulz steps in FP8 with exact diagonals (`reference.newton_schulz_fp8`), in Triton; sums in float32.

Layout: X (rows, width) as `matrix_groups` says, which each step replaces in place; beside it X in FP8, in that order
for its Gram matrices and turned, (width, rows), for its product with B, since tensor cores read both factors of a
product along the dimension that is summed up. Of the Gram matrices without their diagonals one in the dtype of X and
one in FP8, of B one in FP8; diagonals (count, rows) float32. By the Schatten norm, t² A takes the place of the first
Gram matrices A before they are squared, and the product with the first B is multiplied by t (count,). A kernel takes a
buffer once for each size of its tiles (`tile_access`). What a matrix becomes does not depend on its neighbours.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div, even_groups, next_power_of_2
from qgalore.kernels.reference import newton_schulz_fp8
from qgalore.kernels.reference.newton_schulz_fp8 import FACTOR, FIRST_GRAM, GRAM, LEAST_GRAM_NORM, scale_of
from qgalore.kernels.triton.gradient_check import SUMS, partial_sums
from qgalore.kernels.triton.matrix_groups import (
    ENDS,
    SideBySide,
    Tile,
    Tiles,
    are_whole,
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
    store_symmetric,
    store_tile,
    store_turned,
)
from qgalore.kernels.triton.tiles import chosen, float8_bits

__all__ = ["orthogonalize_fp8", "runs_in_fp8"]


@triton.jit
def _float8(x):
    return float8_bits(x).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _inverse_norm_kernel(sums, factors, counts, WIDTH: tl.constexpr):
    """1 / |X| of each matrix by its sums of squares; 0 for norms below 1e-18."""
    which, at = tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(sums + which * WIDTH + at, mask=at < chosen(which, counts), other=0.0)
    norm = tl.sqrt(tl.sum(values, axis=0))
    tl.store(factors + which, tl.where(norm < 1e-18, 0.0, 1.0 / tl.maximum(norm, 1e-18)))


@triton.jit
def _store_x(x, x8, turned, value, row, column, rows, width, scale, LAST: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of X; but for the last step also in FP8, in both orders."""
    value, stride = rounded(value, x, WHOLE), width.to(tl.int64)
    store_tile(x, row, rows, column, stride, value, WHOLE)
    if not LAST:
        value8 = _float8(value.to(tl.float32) * scale)
        store_tile(x8, row, rows, column, stride, value8, WHOLE)
        store_turned(turned, row, rows, column, rows.to(tl.int64), value8, WHOLE)


@triton.jit
def _fp8_fill_kernel(
    matrices, x, x8, turned, factors, numbers, rows, width, lengths, strides, starts, ends, scale, T: tl.constexpr,
    C: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, column, value = tile_of_slot(
        matrices, factors, numbers, rows, lengths, strides, starts, ends, T, C, TURNS, True
    )
    _store_x(x, x8, turned, value, row, column, rows, width, scale, False, False)


@triton.jit(do_not_specialize=ENDS)
def _fp8_gram_kernel(
    x8, other_x8, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, e0, e1, e2, e3, e4, e5,
    e6, e7, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The Gram matrices of what X in FP8 stands for, without diagonals, in 16 bits and in FP8, and their diagonals."""
    which, stride = tl.program_id(1), width.to(tl.int64)
    row, column = corner(tl.program_id(0), T, S)
    start = end_of(which - 1, e0, e1, e2, e3, e4, e5, e6, e7) * C
    end = end_of(which, e0, e1, e2, e3, e4, e5, e6, e7) * C
    total = tl.zeros((T, S), dtype=tl.float32)
    if WHOLE:
        tl.assume(start < end)  # so that sums stay in the registers that tensor cores write
    for k in range(start, end, K):
        left = rows_of(x8, 0, row, rows, k, None, stride, T, K, WHOLE)
        right = rows_of(other_x8, 0, column, rows, k, None, stride, S, K, WHOLE)
        total = tl.dot(left, right.T, total, max_num_imprecise_acc=EXACT)
    value, base = total * factor, which * rows
    i, j = row + tl.arange(0, T), column + tl.arange(0, S)
    on = i[:, None] == j[None, :]
    has = (i >= column) & (i < column + S) & (i < rows)
    tl.store(diagonal + base + i, tl.sum(tl.where(on, value, 0.0), axis=1), mask=has)
    rest = rounded(tl.where(on, 0.0, value), gram, WHOLE)
    store_symmetric(gram, gram_turned, base, row, column, rows, rest, WHOLE)
    store_symmetric(gram8, gram8_turned, base, row, column, rows, _float8(rest.to(tl.float32) * scale), WHOLE)


@triton.jit
def _fp8_gram_sums_kernel(gram, diagonal, sums, rows, T: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of squares of T rows of a Gram matrix a program, with those of its diagonal."""
    which, program = tl.program_id(1), tl.program_id(0)
    beside = squares_summed(gram + which.to(tl.int64) * rows * rows, program * T, rows, T, K)
    i = program * T + tl.arange(0, T)
    on = tl.load(diagonal + which * rows + i, mask=i < rows, other=0.0)
    tl.store(sums + which * WIDTH + program, beside + tl.sum(on * on, axis=0))


@triton.jit
def _fp8_scale_gram_kernel(
    gram, gram8, diagonal, scaled_diagonal, sums, sizes, rows, programs, least, scale, T: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """t² A in the place of T rows of A a program, with t = |A|^-1/2 by the sums of squares; sizes: t of each matrix."""
    which, program, number = tl.program_id(1), tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(sums + which * WIDTH + number, mask=number < programs, other=0.0)
    square = 1.0 / tl.maximum(tl.sqrt(tl.sum(values, axis=0)), least)
    if program == 0:
        tl.store(sizes + which, tl.sqrt(square))
    i, k = program * T + tl.arange(0, T), tl.arange(0, K)[None, :]
    on = tl.load(diagonal + which * rows + i, mask=i < rows, other=0.0)
    tl.store(scaled_diagonal + which * rows + i, square * on, mask=i < rows)
    for start in range(0, rows, K):
        at = (which.to(tl.int64) * rows + i[:, None]) * rows + start + k
        mask = (i < rows)[:, None] & (start + k < rows)
        value = square * tl.load(gram + at, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, gram, False)
        tl.store(gram + at, value, mask=mask)
        tl.store(gram8 + at, _float8(value.to(tl.float32) * scale), mask=mask)


@triton.jit
def _fp8_square_kernel(
    gram, gram8, other_gram8, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor, scale,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """B = first + third A + fifth A A of a Gram matrix A, without its diagonal in FP8, and its diagonal."""
    base = tl.program_id(1) * rows
    row, column = corner(tl.program_id(0), T, S)
    diagonal += base
    total = tl.zeros((T, S), dtype=tl.float32)
    if WHOLE:
        tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = rows_of(gram8, base, row, rows, k, rows, rows, T, K, WHOLE)
        right = rows_of(other_gram8, base, column, rows, k, rows, rows, S, K, WHOLE)
        total = tl.dot(left, right.T, total, max_num_imprecise_acc=EXACT)
    total *= factor
    own = rows_of(gram, base, row, rows, column, rows, rows, T, S, WHOLE).to(tl.float32)
    i, j = row + tl.arange(0, T), column + tl.arange(0, S)
    d_i, d_j = tl.load(diagonal + i % rows), tl.load(diagonal + j % rows)
    value = third * own + fifth * (total + (d_i[:, None] + d_j[None, :]) * own)
    on = i[:, None] == j[None, :]
    squared = tl.sum(tl.where(on, total, 0.0), axis=1) + d_i * d_i
    even = first + third * d_i + fifth * squared
    tl.store(even_diagonal + base + i, even, mask=(i >= column) & (i < column + S) & (i < rows))
    # Of 16 bits, whose layout is then converted: of FP8 Triton 3.6 does so wrongly (`fault_of_compiled`).
    rest = rounded(tl.where(on, 0.0, value), gram, WHOLE)
    store_symmetric(even8, even8_turned, base, row, column, rows, _float8(rest.to(tl.float32) * scale), WHOLE)


@triton.jit(do_not_specialize=ENDS)
def _fp8_apply_kernel(
    x, x8, turned, out, even8, even_diagonal, sizes, rows, width, factor, scale, e0, e1, e2, e3, e4, e5, e6, e7,
    T: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr, SCALES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """B X in the place of X; X in FP8, turned, is read from `turned` and written to `out`.

    SCALES: what each matrix becomes is to be multiplied by its number in `sizes`.
    """
    index, row = tl.program_id(1), tl.program_id(0) * T
    which, column = matrix_of(index, e0, e1, e2, e3, e4, e5, e6), index * C
    base = which * rows
    total = tl.zeros((T, C), dtype=tl.float32)
    if WHOLE:
        tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = rows_of(even8, base, row, rows, k, rows, rows, T, K, WHOLE)
        right = rows_of(turned, 0, column, width, k, rows, rows.to(tl.int64), C, K, WHOLE)
        total = tl.dot(left, right.T, total)
    own = rows_of(x, 0, row, rows, column, None, width.to(tl.int64), T, C, WHOLE)
    even = tl.load(even_diagonal + base + (row + tl.arange(0, T)) % rows)
    value = even[:, None] * own.to(tl.float32) + total * factor
    if SCALES:
        value *= tl.load(sizes + which)
    _store_x(x, x8, out, value, row, column, rows, width, scale, LAST, WHOLE)


_SUMMED = 128
"""Terms of Gram matrices and their squares that a tensor core sums up by itself, in some 14 bits and towards zero: of
2,816 positive terms, as the diagonal has, it lost 3 %, while errors of other sums have random signs."""


_SCALED = 8, 256
"""Rows, at the least, and columns of a tile of a Gram matrix that is scaled."""


TILES: dict[int, Tiles] = {
    768: Tiles(Tile(64, 128, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 128, 128, 4, 3)),
    1024: Tiles(Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3)),
    2048: Tiles(Tile(64, 128, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(64, 128, 128, 4, 3)),
    1 << 30: Tiles(Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3)),
}
"""By the most rows that they are for: within 3 % of the fastest of `python -m benchmarks.bench_direction --sweep` on an
H200, but for symmetric products of 2,048 rows, where tiles of 64 x 64 take 11 % less."""
WHOLE_TILES: dict[int, Tiles] = {
    768: Tiles(Tile(64, 128, 128, 4, 3), Tile(64, 128, 128, 4, 3), Tile(128, 128, 128, 8, 3), whole=True),
    1024: Tiles(Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 8, 3), whole=True),
    2048: Tiles(Tile(64, 128, 128, 4, 3), Tile(64, 128, 128, 4, 3), Tile(128, 128, 128, 8, 3), whole=True),
    1 << 30: Tiles(Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 8, 3), whole=True),
}
"""The same through descriptors: the fastest of that sweep; those of 768 rows, which it left out, of single launches."""


def _checked_rows(tiles: Tiles, rows: int) -> int:
    """Rows of a small matrix, of several tiles, for which Triton compiles what it does for so many rows.

    It knows of a size whether it is a multiple of 16; whole tiles stay whole.
    """
    if tiles.whole:
        return next(checked for checked in itertools.count(384, 128) if are_whole(tiles, checked))
    return 392 if rows % 16 else 400


def fault_of_compiled(tiles: Tiles, rows: int, device: torch.device) -> str:
    """What is wrong where the kernels with these tiles differ from the reference for a matrix of so many rows, else "".

    Triton 3.6 stores wrong bytes where it converts the layout of a tensor in FP8, which these kernels do not ask for;
    but whether it does so is the choice of a version. Waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, rows + 200, generator=generator, device="cpu").to(device, torch.bfloat16)
    steps = [(3.4445, -4.7750, 2.0315)] * 3
    (expected,) = newton_schulz_fp8.orthogonalize_fp8([matrix], steps, schatten_norm=True)
    (found,) = _Group([matrix], tiles).steps(steps, schatten_norm=True)
    if (found.float() - expected.float()).norm() < 0.2 * expected.float().norm():
        return ""
    return f"Newton-Schulz in FP8 is compiled to wrong values by Triton {triton.__version__} on {device}"


_FAULTS: dict[tuple[Tiles, int, torch.device], str] = {}
"""What `fault_of_compiled` has found, by its arguments: once a process."""


def _fault(tiles: Tiles, rows: int, device: torch.device) -> str:
    """`fault_of_compiled` for matrices with so many rows; "" while a graph is captured and it is not known yet."""
    if device.type != "cuda":
        return ""
    checked = tiles, _checked_rows(tiles, rows), device
    if checked not in _FAULTS and not torch.cuda.is_current_stream_capturing():
        _FAULTS[checked] = fault_of_compiled(*checked)
    return _FAULTS.get(checked, "")


def runs_in_fp8(rows: int, device: torch.device) -> bool:
    """See `qgalore.kernels.runs_in_fp8`."""
    if fault := _fault(tiles_for(rows, torch.bfloat16, device, TILES, WHOLE_TILES), rows, device):
        warnings.warn(f"{fault}: steps are made in bfloat16 instead; please report the version", stacklevel=2)
    return not fault


def orthogonalize_fp8(
    matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]], *, schatten_norm: bool = False
) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize_fp8`."""
    rows, device = min(matrices[0].shape), matrices[0].device
    tiles = tiles_for(rows, matrices[0].dtype, device, TILES, WHOLE_TILES)
    if fault := _fault(tiles, rows, device):
        raise RuntimeError(f"{fault}: choose newton_schulz muon, in bfloat16, and report the version")
    found = []
    for part in even_groups(matrices):
        found += _Group(part, tiles).steps(polynomials, schatten_norm)
    return found


class _Group:
    """At most `GROUP_LIMIT` matrices whose shorter sides are equal."""

    def __init__(self, matrices: Sequence[Tensor], tiles: Tiles) -> None:
        self._tiles, self._tiled = tiles, Tiled(tiles.whole)
        self._side_by_side = group = SideBySide(matrices, tiles.apply.columns)
        self._rows, self._count, self._scale = group.rows, group.count, scale_of(group.rows)
        dtype, fp8, device = matrices[0].dtype, torch.float8_e4m3fn, matrices[0].device
        self._x, self._x8 = group.empty(dtype), group.empty(fp8)
        self._turned, self._out = torch.empty(2, group.width, group.rows, dtype=fp8, device=device).unbind()
        self._gram, self._gram8, self._even8 = group.squares(dtype), group.squares(fp8), group.squares(fp8)
        self._diagonals = torch.empty(2, self._count, self._rows, device=device).unbind()

    def steps(self, polynomials: Sequence[tuple[float, float, float]], schatten_norm: bool) -> list[Tensor]:
        """The results, in the buffer of X."""
        self._fill()
        for step, polynomial in enumerate(polynomials):
            scale = GRAM if step else FIRST_GRAM
            self._form_gram(scale)
            sizes = self._scale_gram(scale) if schatten_norm and step == 0 else None
            self._square(polynomial, scale)
            self._apply(step == len(polynomials) - 1, sizes)
            self._turned, self._out = self._out, self._turned
        return self._side_by_side.slots(self._x)

    def _fill(self) -> None:
        group = self._side_by_side
        sums, counts = partial_sums([matrix.contiguous() for matrix in group.matrices])
        factors = torch.empty(self._count, dtype=torch.float32, device=sums.device)
        _inverse_norm_kernel[(self._count,)](sums, factors, counts, WIDTH=SUMS, num_warps=4)
        for programs, arguments in group.fills():
            _fp8_fill_kernel[(programs,)](
                x=self._x, x8=self._x8, turned=self._turned, factors=factors, scale=self._scale, num_warps=4,
                **arguments,
            )  # fmt: skip

    def _form_gram(self, scale: float) -> None:
        tiled, group, (rows, columns, depth, warps, stages) = self._tiled, self._side_by_side, self._tiles.gram
        _fp8_gram_kernel[(tiles_below(self._rows, rows, columns), self._count)](
            tiled(self._x8, rows, depth), tiled(self._x8, columns, depth), tiled(self._gram, rows, columns),
            tiled(self._gram, columns, rows), tiled(self._gram8, rows, columns), tiled(self._gram8, columns, rows),
            self._diagonals[0], self._rows, group.width, self._scale**-2, scale, *group.ends, T=rows, S=columns,
            K=depth, C=group.columns, EXACT=min(_SUMMED, depth), WHOLE=self._tiles.whole, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip

    def _scale_gram(self, scale: float) -> Tensor:
        """t² A in the place of Gram matrices A, and the numbers t (count,)."""
        height = next_power_of_2(max(_SCALED[0], ceil_div(self._rows, SUMS)))
        programs = ceil_div(self._rows, height)
        sums = torch.empty(self._count, SUMS, device=self._gram.device)
        sizes = torch.empty(self._count, device=self._gram.device)
        shape = {"T": height, "K": _SCALED[1], "WIDTH": SUMS, "num_warps": 4}
        diagonal, scaled = self._diagonals
        _fp8_gram_sums_kernel[(programs, self._count)](self._gram, diagonal, sums, self._rows, **shape)
        _fp8_scale_gram_kernel[(programs, self._count)](
            self._gram, self._gram8, diagonal, scaled, sums, sizes, self._rows, programs, LEAST_GRAM_NORM, scale,
            **shape,
        )  # fmt: skip
        self._diagonals = scaled, diagonal
        return sizes

    def _square(self, polynomial: tuple[float, float, float], scale: float) -> None:
        tiled, (rows, columns, depth, warps, stages) = self._tiled, self._tiles.square
        _fp8_square_kernel[(tiles_below(self._rows, rows, columns), self._count)](
            tiled(self._gram, rows, columns), tiled(self._gram8, rows, depth), tiled(self._gram8, columns, depth),
            self._diagonals[0], tiled(self._even8, rows, columns), tiled(self._even8, columns, rows),
            self._diagonals[1], self._rows, *polynomial, scale**-2, FACTOR, T=rows, S=columns, K=depth,
            EXACT=min(_SUMMED, depth), WHOLE=self._tiles.whole, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _apply(self, last: bool, sizes: Tensor | None = None) -> None:
        tiled, group, (rows, columns, depth, warps, stages) = self._tiled, self._side_by_side, self._tiles.apply
        _fp8_apply_kernel[(ceil_div(self._rows, rows), group.width // columns)](
            tiled(self._x, rows, columns), tiled(self._x8, rows, columns), tiled(self._turned, columns, depth),
            tiled(self._out, columns, rows), tiled(self._even8, rows, depth), self._diagonals[1],
            self._diagonals[1] if sizes is None else sizes, self._rows, group.width, 1.0 / (FACTOR * self._scale),
            self._scale, *group.ends, T=rows, K=depth, C=columns, LAST=last, SCALES=sizes is not None,
            WHOLE=self._tiles.whole, num_warps=warps, num_stages=stages,
        )  # fmt: skip
