"""Products of Newton-Schulz whose operands are read by whole blocks: through descriptors (TMA), or without masks.

As the products of `newton_schulz` and `newton_schulz_fp8`, in whose layouts they read and write, with sums in their
order; of rows that are a multiple of all sides of tiles. Programs work on tiles in turn, so that the first blocks of
the next tile are read while one is stored. Of descriptors rows of 16-byte multiples are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qgalore.kernels.triton.matrix_groups import below_diagonal, tiles_below
from qgalore.kernels.triton.tiles import chosen, float8_bits, to_float

__all__: list[str] = []

MATRICES = 16
"""That one launch takes."""


class Blocks(NamedTuple):
    """How a product is computed."""

    tile: tuple[int, int, int, int, int]
    """Rows of a tile, its columns, a multiple of them, terms summed at a time, warps, stages."""
    tma: bool = True
    """Whether operands are read through descriptors; else through pointers, without masks."""
    programs: int = 0
    """At most so many programs take tiles in turn; 0: a program for each tile."""
    overlaps: bool = False
    """Whether blocks of the next tile are read during the end of one: `flatten` of Triton."""
    specialized: bool = False
    """Whether some warps load and others multiply: `warp_specialize` of Triton."""
    stores: bool = False
    """Whether the epilogue, too, reads and writes through descriptors."""
    twice: bool = False
    """Whether the columns of a tile are two sums, which in FP8 take half as many registers beside them."""


@triton.jit
def _block(source, row, column, stride, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """(R, C) of a matrix from (row, column) on."""
    if TMA:
        value = source.load([row, column])
    else:
        i, j = row + tl.arange(0, R), column + tl.arange(0, C)
        value = tl.load(source + i[:, None] * stride + j[None, :])
    return value


@triton.jit
def _store(target, row, column, stride, value, TMA: tl.constexpr):
    """Write a tile from (row, column) on."""
    if TMA:
        target.store([row, column], value)
    else:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(target + i[:, None].to(tl.int64) * stride + j[None, :], value)


@triton.jit
def _store_turned(target, row, column, stride, value, TMA: tl.constexpr):
    """Write a tile's transpose from (column, row) on."""
    _store(target, column, row, stride, tl.trans(value), TMA)


@triton.jit
def _store_symmetric(out, turned, base, row, column, stride, value, TMA: tl.constexpr, ONCE: tl.constexpr):
    """`matrix_groups.store_both` of a square from row `base` on; ONCE asks for pointers."""
    if ONCE and column + value.shape[1] - 1 > row:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(out + (base + i)[:, None] * stride + j[None, :], value, mask=i[:, None] >= j[None, :])
        tl.store(out + (base + j)[:, None] * stride + i[None, :], tl.trans(value), mask=j[:, None] < i[None, :])
    else:
        _store(out, base + row, column, stride, value, TMA)
        _store_turned(turned, row, base + column, stride, value, TMA)


@triton.jit
def _corner(index, T: tl.constexpr, S: tl.constexpr):
    """First row and column of a tile among those that reach below the diagonal."""
    EACH: tl.constexpr = S // T
    row, column = below_diagonal(index // EACH)
    return (row * EACH + index % EACH) * T, column * S


@triton.jit
def _gram_tile(
    tile, a, b, out, turned, rows, width, factor, below, ends, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    which = tile // below
    row, column = _corner(tile % below, T, S)
    start, end = tl.where(which > 0, chosen(which - 1, ends), 0) * C, chosen(which, ends) * C
    total = tl.zeros((T, S), dtype=tl.float32)
    tl.assume(start < end)  # else sums are not kept in the registers of the tensor cores' instructions
    for k in range(start, end, K):
        left = _block(a, row, k, width, T, K, TMA)
        total = tl.dot(left, _block(b, column, k, width, S, K, TMA).T, total)
    value = to_float(total * factor, out.dtype.element_ty if not STORES else out.dtype)
    _store_symmetric(out, turned, which * rows, row, column, rows, value, STORES, ONCE)


@triton.jit(do_not_specialize=["ends", "below", "tiles"])
def _block_gram_kernel(
    a, b, out, turned, rows, width, factor, below, tiles, ends, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, ONCE: tl.constexpr, TURNS: tl.constexpr,
    OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _gram_tile(tile, a, b, out, turned, rows, width, factor, below, ends, T, S, K, C, TMA, STORES, ONCE)
    else:
        tile = tl.program_id(0)
        _gram_tile(tile, a, b, out, turned, rows, width, factor, below, ends, T, S, K, C, TMA, STORES, ONCE)


@triton.jit
def _square_tile(
    tile, a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, T: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, SCALES: tl.constexpr,
    SECOND: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    which = tile // below
    row, column = _corner(tile % below, T, S)
    base = which * rows
    total = tl.zeros((T, S), dtype=tl.float32)
    tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = _block(a, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, _block(b, base + column, k, rows, S, K, TMA).T, total)
    own = _block(own_a, base + row, column, rows, T, S, STORES).to(tl.float32)
    if SCALES:
        square = tl.load(scale + which)
        first, product = first * square, product * square
        if SCALES == 2:
            product *= square
    value = first * own + product * total
    if SECOND:
        value += second * _block(own_b, base + row, column, rows, T, S, STORES).to(tl.float32)
    value = to_float(value, out.dtype.element_ty if not STORES else out.dtype)
    _store_symmetric(out, turned, base, row, column, rows, value, STORES, ONCE)


@triton.jit(do_not_specialize=["below", "tiles"])
def _block_square_kernel(
    a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, tiles, T: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, SCALES: tl.constexpr,
    SECOND: tl.constexpr, ONCE: tl.constexpr, TURNS: tl.constexpr, OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _square_tile(
                tile, a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, T, S, K, TMA,
                STORES, SCALES, SECOND, ONCE,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _square_tile(
            tile, a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, T, S, K, TMA, STORES,
            SCALES, SECOND, ONCE,
        )  # fmt: skip


@triton.jit
def _apply_tile(
    tile, even, x, own_x, scale, out, rows, width, first, ends, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    index, row = tile // (rows // T), (tile % (rows // T)) * T
    which = _matrix_of(index, ends)
    base, column = which * rows, index * C
    total = tl.zeros((T, C), dtype=tl.float32)
    tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = _block(even, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, _block(x, k, column, width, K, C, TMA), total)
    value = first * _block(own_x, row, column, width, T, C, STORES).to(tl.float32) + total
    if SCALES:
        value *= tl.sqrt(tl.load(scale + which))
    _store(out, row, column, width, to_float(value, out.dtype.element_ty if not STORES else out.dtype), STORES)


@triton.jit
def _matrix_of(index, ends):
    which = index * 0
    for other in tl.static_range(len(ends) - 1):
        which += (index >= ends[other]).to(tl.int32)
    return which


@triton.jit(do_not_specialize=["ends", "tiles"])
def _block_apply_kernel(
    even, x, own_x, scale, out, rows, width, first, tiles, ends, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr, SCALES: tl.constexpr, TURNS: tl.constexpr, OVERLAPS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _apply_tile(tile, even, x, own_x, scale, out, rows, width, first, ends, T, K, C, TMA, STORES, SCALES)
    else:
        tile = tl.program_id(0)
        _apply_tile(tile, even, x, own_x, scale, out, rows, width, first, ends, T, K, C, TMA, STORES, SCALES)


def _source(tensor: Tensor, height: int, columns: int, tma: bool) -> Any:
    """An operand of a kernel: a descriptor of blocks, or the tensor."""
    if not tma:
        return tensor
    flat = tensor.flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [height, columns])


def _launch(how: Blocks, tiles: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and arguments that all kernels have."""
    turns = 0 < how.programs < tiles
    return (how.programs if turns else tiles,), {
        "tiles": tiles, "K": how.tile[2], "TMA": how.tma, "STORES": how.stores, "TURNS": turns,
        "OVERLAPS": how.overlaps, "SPECIALIZED": how.specialized, "num_warps": how.tile[3],
        "num_stages": how.tile[4],
    }  # fmt: skip


def _padded(ends: Sequence[int]) -> tuple[int, ...]:
    return (*ends, *[ends[-1]] * (MATRICES - len(ends)))


def gram(how: Blocks, x: Tensor, out: Tensor, ends: Sequence[int], columns: int, factor: float, once: bool) -> None:
    """out = factor X Xᵀ of each matrix; ends: tiles of so many columns up to the end of each."""
    (rows, width), (height, across, depth) = x.shape, how.tile[:3]
    below = tiles_below(rows, height, across)
    grid, arguments = _launch(how, below * len(out))
    _block_gram_kernel[grid](
        _source(x, height, depth, how.tma), _source(x, across, depth, how.tma),
        _source(out, height, across, how.stores), _source(out, across, height, how.stores), rows, width, factor, below,
        ends=_padded(ends), T=height, S=across, C=columns, ONCE=once, **arguments,
    )  # fmt: skip


def square(
    how: Blocks, a: Tensor, b: Tensor, out: Tensor, factors: tuple[float, float, float], scale: Tensor | None,
    scales: int, once: bool,
) -> None:  # fmt: skip
    """out = factors · (a b, a, b), as `newton_schulz._square_kernel` has it."""
    rows, (height, across, depth) = a.shape[-1], how.tile[:3]
    below = tiles_below(rows, height, across)
    grid, arguments = _launch(how, below * len(out))
    _block_square_kernel[grid](
        _source(a, height, depth, how.tma), _source(b, across, depth, how.tma),
        _source(a, height, across, how.stores), _source(b, height, across, how.stores),
        _source(out, height, across, how.stores), _source(out, across, height, how.stores),
        a if scale is None else scale, rows, *factors, below, T=height, S=across, SCALES=scales,
        SECOND=factors[2] != 0.0, ONCE=once, **arguments,
    )  # fmt: skip


def apply(
    how: Blocks, x: Tensor, even: Tensor, out: Tensor, ends: Sequence[int], first: float, scale: Tensor | None
) -> None:
    """out = (first X + even X) sqrt(scale); ends: tiles of as many columns as those of `how` up to that of each."""
    (rows, width), (height, columns, depth) = x.shape, how.tile[:3]
    grid, arguments = _launch(how, rows // height * (width // columns))
    _block_apply_kernel[grid](
        _source(even, height, depth, how.tma), _source(x, depth, columns, how.tma),
        _source(x, height, columns, how.stores), even if scale is None else scale,
        _source(out, height, columns, how.stores), rows, width, first, ends=_padded(ends), T=height, C=columns,
        SCALES=scale is not None, **arguments,
    )  # fmt: skip


@triton.jit
def _float8(x):
    return float8_bits(x).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _fp8_sums(
    a, b, row, column, start, end, stride, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Sums of products of rows of a and of b."""
    total = tl.zeros((T, S), dtype=tl.float32)
    tl.assume(start < end)
    for k in range(start, end, K):
        left = _block(a, row, k, stride, T, K, TMA)
        total = tl.dot(left, _block(b, column, k, stride, S, K, TMA).T, total, max_num_imprecise_acc=EXACT)
    return total


@triton.jit
def _fp8_two_sums(
    a, b, row, column, start, end, stride, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The same of S columns and of the S next to them: half as many registers hold what is not yet added."""
    first = tl.zeros((T, S), dtype=tl.float32)
    second = tl.zeros((T, S), dtype=tl.float32)
    tl.assume(start < end)
    for k in range(start, end, K):
        left = _block(a, row, k, stride, T, K, TMA)
        first = tl.dot(left, _block(b, column, k, stride, S, K, TMA).T, first, max_num_imprecise_acc=EXACT)
        second = tl.dot(left, _block(b, column + S, k, stride, S, K, TMA).T, second, max_num_imprecise_acc=EXACT)
    return first, second


@triton.jit
def _fp8_gram_end(
    total, gram, gram_turned, gram8, gram8_turned, diagonal, base, row, column, rows, factor, scale,
    TYPE: tl.constexpr, T: tl.constexpr, S: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    i, j = row + tl.arange(0, T), column + tl.arange(0, S)
    value = total * factor
    on = i[:, None] == j[None, :]
    tl.store(diagonal + base + i, tl.sum(tl.where(on, value, 0.0), axis=1), mask=(i >= column) & (i < column + S))
    rest = to_float(tl.where(on, 0.0, value), TYPE)
    _store_symmetric(gram, gram_turned, base, row, column, rows, rest, STORES, False)
    rest8 = _float8(rest.to(tl.float32) * scale)
    _store_symmetric(gram8, gram8_turned, base, row, column, rows, rest8, STORES, False)


@triton.jit
def _fp8_gram_tile(
    tile, a, b, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, below, ends,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
    TWICE: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    which = tile // below
    row, column = _corner(tile % below, T, S)
    start, end = tl.where(which > 0, chosen(which - 1, ends), 0) * C, chosen(which, ends) * C
    base = which * rows
    if TWICE:
        H: tl.constexpr = S // 2
        first, second = _fp8_two_sums(a, b, row, column, start, end, width, T, H, K, TMA, EXACT)
        _fp8_gram_end(
            first, gram, gram_turned, gram8, gram8_turned, diagonal, base, row, column, rows, factor, scale, TYPE, T,
            H, STORES,
        )  # fmt: skip
        _fp8_gram_end(
            second, gram, gram_turned, gram8, gram8_turned, diagonal, base, row, column + H, rows, factor, scale,
            TYPE, T, H, STORES,
        )  # fmt: skip
    else:
        total = _fp8_sums(a, b, row, column, start, end, width, T, S, K, TMA, EXACT)
        _fp8_gram_end(
            total, gram, gram_turned, gram8, gram8_turned, diagonal, base, row, column, rows, factor, scale, TYPE, T,
            S, STORES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ends", "below", "tiles"])
def _block_fp8_gram_kernel(
    a, b, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, below, tiles, ends,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
    TWICE: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, TURNS: tl.constexpr, OVERLAPS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _fp8_gram_tile(
                tile, a, b, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, below, ends,
                T, S, K, C, TYPE, EXACT, TWICE, TMA, STORES,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _fp8_gram_tile(
            tile, a, b, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, below, ends, T,
            S, K, C, TYPE, EXACT, TWICE, TMA, STORES,
        )  # fmt: skip


@triton.jit
def _fp8_square_end(
    total, own, diagonal, even8, even8_turned, even_diagonal, base, row, column, rows, first, third, fifth, factor,
    scale, TYPE: tl.constexpr, T: tl.constexpr, S: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    i, j = row + tl.arange(0, T), column + tl.arange(0, S)
    total *= factor
    own = _block(own, base + row, column, rows, T, S, STORES).to(tl.float32)
    d_i, d_j = tl.load(diagonal + base + i), tl.load(diagonal + base + j)
    value = third * own + fifth * (total + (d_i[:, None] + d_j[None, :]) * own)
    on = i[:, None] == j[None, :]
    squared = tl.sum(tl.where(on, total, 0.0), axis=1) + d_i * d_i
    even = first + third * d_i + fifth * squared
    tl.store(even_diagonal + base + i, even, mask=(i >= column) & (i < column + S))
    rest = to_float(tl.where(on, 0.0, value), TYPE)
    rest8 = _float8(rest.to(tl.float32) * scale)
    _store_symmetric(even8, even8_turned, base, row, column, rows, rest8, STORES, False)


@triton.jit
def _fp8_square_tile(
    tile, a, b, own, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor, scale, below,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, TWICE: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    base = tile // below * rows
    row, column = _corner(tile % below, T, S)
    if TWICE:
        H: tl.constexpr = S // 2
        one, two = _fp8_two_sums(a, b, base + row, base + column, 0, rows, rows, T, H, K, TMA, EXACT)
        _fp8_square_end(
            one, own, diagonal, even8, even8_turned, even_diagonal, base, row, column, rows, first, third, fifth,
            factor, scale, TYPE, T, H, STORES,
        )  # fmt: skip
        _fp8_square_end(
            two, own, diagonal, even8, even8_turned, even_diagonal, base, row, column + H, rows, first, third, fifth,
            factor, scale, TYPE, T, H, STORES,
        )  # fmt: skip
    else:
        total = _fp8_sums(a, b, base + row, base + column, 0, rows, rows, T, S, K, TMA, EXACT)
        _fp8_square_end(
            total, own, diagonal, even8, even8_turned, even_diagonal, base, row, column, rows, first, third, fifth,
            factor, scale, TYPE, T, S, STORES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["below", "tiles"])
def _block_fp8_square_kernel(
    a, b, own, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor, scale, below, tiles,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, TWICE: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr, TURNS: tl.constexpr, OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _fp8_square_tile(
                tile, a, b, own, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor,
                scale, below, T, S, K, TYPE, EXACT, TWICE, TMA, STORES,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _fp8_square_tile(
            tile, a, b, own, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor, scale,
            below, T, S, K, TYPE, EXACT, TWICE, TMA, STORES,
        )  # fmt: skip


@triton.jit
def _fp8_apply_tile(
    tile, even8, turned, own, x, x8, out, even_diagonal, rows, width, factor, scale, ends, T: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, LAST: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    index, row = tile // (rows // T), (tile % (rows // T)) * T
    base, column = _matrix_of(index, ends) * rows, index * C
    total = tl.zeros((T, C), dtype=tl.float32)
    tl.assume(rows > 0)
    for k in range(0, rows, K):
        left = _block(even8, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, _block(turned, column, k, rows, C, K, TMA).T, total)
    even = tl.load(even_diagonal + base + row + tl.arange(0, T))
    value = even[:, None] * _block(own, row, column, width, T, C, STORES).to(tl.float32) + total * factor
    value = to_float(value, TYPE)
    _store(x, row, column, width, value, STORES)
    if not LAST:
        value8 = _float8(value.to(tl.float32) * scale)
        _store(x8, row, column, width, value8, STORES)
        _store_turned(out, row, column, rows, value8, STORES)


@triton.jit(do_not_specialize=["ends", "tiles"])
def _block_fp8_apply_kernel(
    even8, turned, own, x, x8, out, even_diagonal, rows, width, factor, scale, tiles, ends, T: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, LAST: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr,
    TURNS: tl.constexpr, OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _fp8_apply_tile(
                tile, even8, turned, own, x, x8, out, even_diagonal, rows, width, factor, scale, ends, T, K, C, TYPE,
                LAST, TMA, STORES,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _fp8_apply_tile(
            tile, even8, turned, own, x, x8, out, even_diagonal, rows, width, factor, scale, ends, T, K, C, TYPE, LAST,
            TMA, STORES,
        )  # fmt: skip


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _symmetric(out: Tensor, height: int, across: int, stores: bool) -> tuple[Any, Any]:
    return _source(out, height, across, stores), _source(out, across, height, stores)


def fp8_gram(
    how: Blocks, x8: Tensor, gram: Tensor, gram8: Tensor, diagonal: Tensor, ends: Sequence[int], columns: int,
    factor: float, scale: float, exact: int,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_gram_kernel` writes."""
    (rows, width), (height, across, depth) = x8.shape, how.tile[:3]
    below, part = tiles_below(rows, height, across), across // (1 + how.twice)
    grid, arguments = _launch(how, below * len(gram))
    _block_fp8_gram_kernel[grid](
        _source(x8, height, depth, how.tma), _source(x8, part, depth, how.tma),
        *_symmetric(gram, height, part, how.stores), *_symmetric(gram8, height, part, how.stores), diagonal, rows,
        width, factor, scale, below, ends=_padded(ends), T=height, S=across, C=columns, TYPE=_TYPES[gram.dtype],
        EXACT=min(exact, depth), TWICE=how.twice, **arguments,
    )  # fmt: skip


def fp8_square(
    how: Blocks, gram: Tensor, gram8: Tensor, diagonal: Tensor, even8: Tensor, even_diagonal: Tensor,
    factors: tuple[float, float, float, float, float], exact: int,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_square_kernel` writes; factors: three of the polynomial, of sums, of the result."""
    rows, (height, across, depth) = gram.shape[-1], how.tile[:3]
    below, part = tiles_below(rows, height, across), across // (1 + how.twice)
    grid, arguments = _launch(how, below * len(gram))
    _block_fp8_square_kernel[grid](
        _source(gram8, height, depth, how.tma), _source(gram8, part, depth, how.tma),
        _source(gram, height, part, how.stores), diagonal, *_symmetric(even8, height, part, how.stores),
        even_diagonal, rows, *factors, below, T=height, S=across, TYPE=_TYPES[gram.dtype],
        EXACT=min(exact, depth), TWICE=how.twice, **arguments,
    )  # fmt: skip


def fp8_apply(
    how: Blocks, x: Tensor, x8: Tensor, turned: Tensor, out: Tensor, even8: Tensor, even_diagonal: Tensor,
    ends: Sequence[int], factor: float, scale: float, last: bool,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_apply_kernel` writes."""
    (rows, width), (height, columns, depth) = x.shape, how.tile[:3]
    grid, arguments = _launch(how, rows // height * (width // columns))
    _block_fp8_apply_kernel[grid](
        _source(even8, height, depth, how.tma), _source(turned, columns, depth, how.tma),
        *[_source(x, height, columns, how.stores)] * 2, _source(x8, height, columns, how.stores),
        _source(out, columns, height, how.stores), even_diagonal, rows, width, factor, scale, ends=_padded(ends),
        T=height, C=columns, TYPE=_TYPES[x.dtype], LAST=last, **arguments,
    )  # fmt: skip
