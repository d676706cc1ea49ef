"""Products of Newton-Schulz in FP8 whose operands are read by whole blocks (`block_products`).

As the products of `newton_schulz_fp8`, in whose layouts they read and write, with sums in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.triton.block_products import (
    begin,
    block,
    corner,
    grid_of,
    matrix_at,
    padded,
    source,
    store,
    store_symmetric,
    store_turned,
)
from qgalore.kernels.triton.matrix_groups import Blocks, tiles_below
from qgalore.kernels.triton.tiles import chosen, float8_bits, to_float

__all__: list[str] = []


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
        left = block(a, row, k, stride, T, K, TMA)
        total = tl.dot(left, block(b, column, k, stride, S, K, TMA).T, total, max_num_imprecise_acc=EXACT)
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
        left = block(a, row, k, stride, T, K, TMA)
        first = tl.dot(left, block(b, column, k, stride, S, K, TMA).T, first, max_num_imprecise_acc=EXACT)
        second = tl.dot(left, block(b, column + S, k, stride, S, K, TMA).T, second, max_num_imprecise_acc=EXACT)
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
    store_symmetric(gram, gram_turned, base, row, column, rows, rest, STORES, False)
    rest8 = _float8(rest.to(tl.float32) * scale)
    store_symmetric(gram8, gram8_turned, base, row, column, rows, rest8, STORES, False)


@triton.jit
def _fp8_gram_tile(
    tile, a, b, gram, gram_turned, gram8, gram8_turned, diagonal, rows, width, factor, scale, below, ends,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
    TWICE: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    which = tile // below
    row, column = corner(tile % below, T, S)
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
    SPECIALIZED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
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
    own = block(own, base + row, column, rows, T, S, STORES).to(tl.float32)
    d_i, d_j = tl.load(diagonal + base + i), tl.load(diagonal + base + j)
    value = third * own + fifth * (total + (d_i[:, None] + d_j[None, :]) * own)
    on = i[:, None] == j[None, :]
    squared = tl.sum(tl.where(on, total, 0.0), axis=1) + d_i * d_i
    even = first + third * d_i + fifth * squared
    tl.store(even_diagonal + base + i, even, mask=(i >= column) & (i < column + S))
    rest = to_float(tl.where(on, 0.0, value), TYPE)
    rest8 = _float8(rest.to(tl.float32) * scale)
    store_symmetric(even8, even8_turned, base, row, column, rows, rest8, STORES, False)


@triton.jit
def _fp8_square_tile(
    tile, a, b, own, diagonal, even8, even8_turned, even_diagonal, rows, first, third, fifth, factor, scale, below,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, TWICE: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    base = tile // below * rows
    row, column = corner(tile % below, T, S)
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
    EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    if not SPECIALIZED:  # which Triton 3.6 does not compile beside it
        tl.assume(rows > 0)
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
    base, column = matrix_at(index, ends) * rows, index * C
    total = tl.zeros((T, C), dtype=tl.float32)
    for k in range(0, rows, K):
        left = block(even8, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, block(turned, column, k, rows, C, K, TMA).T, total)
    even = tl.load(even_diagonal + base + row + tl.arange(0, T))
    value = even[:, None] * block(own, row, column, width, T, C, STORES).to(tl.float32) + total * factor
    value = to_float(value, TYPE)
    store(x, row, column, width, value, STORES)
    if not LAST:
        value8 = _float8(value.to(tl.float32) * scale)
        store(x8, row, column, width, value8, STORES)
        store_turned(out, row, column, rows, value8, STORES)


@triton.jit(do_not_specialize=["ends", "tiles"])
def _block_fp8_apply_kernel(
    even8, turned, own, x, x8, out, even_diagonal, rows, width, factor, scale, tiles, ends, T: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, LAST: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr,
    TURNS: tl.constexpr, OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    if not SPECIALIZED:  # which Triton 3.6 does not compile beside it
        tl.assume(rows > 0)
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
    return source(out, height, across, stores), source(out, across, height, stores)


def gram(
    how: Blocks, x8: Tensor, gram: Tensor, gram8: Tensor, diagonal: Tensor, ends: Sequence[int], columns: int,
    factor: float, scale: float, exact: int,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_gram_kernel` writes."""
    (rows, width), (height, across, depth) = x8.shape, how.tile[:3]
    below, part = tiles_below(rows, height, across), across // (1 + how.twice)
    grid, arguments = grid_of(how, below * len(gram))
    _block_fp8_gram_kernel[grid](
        source(x8, height, depth, how.tma), source(x8, part, depth, how.tma),
        *_symmetric(gram, height, part, how.stores), *_symmetric(gram8, height, part, how.stores), diagonal, rows,
        width, factor, scale, below, ends=padded(ends), T=height, S=across, C=columns, TYPE=_TYPES[gram.dtype],
        EXACT=min(exact, depth), TWICE=how.twice, **arguments,
    )  # fmt: skip


def square(
    how: Blocks, gram: Tensor, gram8: Tensor, diagonal: Tensor, even8: Tensor, even_diagonal: Tensor,
    factors: tuple[float, float, float, float, float], exact: int,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_square_kernel` writes; factors: three of the polynomial, of sums, of the result."""
    rows, (height, across, depth) = gram.shape[-1], how.tile[:3]
    below, part = tiles_below(rows, height, across), across // (1 + how.twice)
    grid, arguments = grid_of(how, below * len(gram))
    _block_fp8_square_kernel[grid](
        source(gram8, height, depth, how.tma), source(gram8, part, depth, how.tma),
        source(gram, height, part, how.stores), diagonal, *_symmetric(even8, height, part, how.stores),
        even_diagonal, rows, *factors, below, T=height, S=across, TYPE=_TYPES[gram.dtype],
        EXACT=min(exact, depth), TWICE=how.twice, **arguments,
    )  # fmt: skip


def apply(
    how: Blocks, x: Tensor, x8: Tensor, turned: Tensor, out: Tensor, even8: Tensor, even_diagonal: Tensor,
    ends: Sequence[int], factor: float, scale: float, last: bool,
) -> None:  # fmt: skip
    """What `newton_schulz_fp8._fp8_apply_kernel` writes."""
    (rows, width), (height, columns, depth) = x.shape, how.tile[:3]
    grid, arguments = grid_of(how, rows // height * (width // columns))
    _block_fp8_apply_kernel[grid](
        source(even8, height, depth, how.tma), source(turned, columns, depth, how.tma),
        *[source(x, height, columns, how.stores)] * 2, source(x8, height, columns, how.stores),
        source(out, columns, height, how.stores), even_diagonal, rows, width, factor, scale, ends=padded(ends),
        T=height, C=columns, TYPE=_TYPES[x.dtype], LAST=last, **arguments,
    )  # fmt: skip
