"""Products of Newton-Schulz whose operands are read by whole blocks: through descriptors (TMA), or without masks.

As the products of `newton_schulz`, in whose layouts they read and write, with sums in their order; of rows that are a
multiple of all sides of tiles. Programs may work on tiles in turn, so that the first blocks of the next tile are read
while one is stored. Descriptors ask for rows of a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from qgalore.kernels.triton.matrix_groups import BlockProducts, Blocks, Tiles, below_diagonal, tiles_below
from qgalore.kernels.triton.tiles import chosen, to_float

__all__: list[str] = []

MATRICES = 16
"""That one launch takes."""


def usable(how: Blocks | None, rows: int, dtype: torch.dtype, device: torch.device) -> Blocks | None:
    """The blocks, or None where the card has no descriptors, or rows are no whole tiles or floats have 32 bits."""
    if how is None or any(rows % side for side in how.tile[:3]):
        return None
    if device.type == "cuda" and (torch.cuda.get_device_capability(device)[0] != 9 or dtype.itemsize > 2):
        return None
    return how


def usable_of(tiles: Tiles, rows: int, dtype: torch.dtype, device: torch.device) -> BlockProducts:
    """`usable` of each product."""
    return BlockProducts(*[usable(how, rows, dtype, device) for how in tiles.blocks])


def columns_of(tiles: Tiles, blocks: BlockProducts) -> int:
    """Of a tile of X, in which matrices are padded."""
    return blocks.apply.tile[1] if blocks.apply else tiles.full[1]


def reads_own(how: Blocks) -> bool:
    """Whether what a product is added to is read through a descriptor."""
    return how.stores if how.own is None else how.own


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel's programs start where there is room, and wait for what the kernel before has written."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def block(operand, row, column, stride, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """(R, C) of a matrix from (row, column) on."""
    if TMA:
        value = operand.load([row, column])
    else:
        i, j = row + tl.arange(0, R), column + tl.arange(0, C)
        value = tl.load(operand + i[:, None] * stride + j[None, :])
    return value


@triton.jit
def store(target, row, column, stride, value, TMA: tl.constexpr):
    """Write a tile from (row, column) on."""
    if TMA:
        target.store([row, column], value)
    else:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(target + i[:, None].to(tl.int64) * stride + j[None, :], value)


@triton.jit
def store_turned(target, row, column, stride, value, TMA: tl.constexpr):
    """Write a tile's transpose from (column, row) on."""
    store(target, column, row, stride, tl.trans(value), TMA)


@triton.jit
def store_symmetric(out, turned, base, row, column, stride, value, TMA: tl.constexpr, ONCE: tl.constexpr):
    """`matrix_groups.store_both` of a square from row `base` on; ONCE asks for pointers."""
    if ONCE and column + value.shape[1] - 1 > row:
        i, j = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        tl.store(out + (base + i)[:, None] * stride + j[None, :], value, mask=i[:, None] >= j[None, :])
        tl.store(out + (base + j)[:, None] * stride + i[None, :], tl.trans(value), mask=j[:, None] < i[None, :])
    else:
        store(out, base + row, column, stride, value, TMA)
        store_turned(turned, row, base + column, stride, value, TMA)


@triton.jit
def corner(index, T: tl.constexpr, S: tl.constexpr):
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
    row, column = corner(tile % below, T, S)
    start, end = tl.where(which > 0, chosen(which - 1, ends), 0) * C, chosen(which, ends) * C
    total = tl.zeros((T, S), dtype=tl.float32)
    tl.assume(start < end)  # else sums are not kept in the registers of the tensor cores' instructions
    for k in range(start, end, K):
        left = block(a, row, k, width, T, K, TMA)
        total = tl.dot(left, block(b, column, k, width, S, K, TMA).T, total)
    value = to_float(total * factor, out.dtype.element_ty if not STORES else out.dtype)
    store_symmetric(out, turned, which * rows, row, column, rows, value, STORES, ONCE)


@triton.jit(do_not_specialize=["ends", "below", "tiles"])
def _block_gram_kernel(
    a, b, out, turned, rows, width, factor, below, tiles, ends, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, ONCE: tl.constexpr, TURNS: tl.constexpr,
    OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
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
    S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, OWN: tl.constexpr, SCALES: tl.constexpr,
    SECOND: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    which = tile // below
    row, column = corner(tile % below, T, S)
    base = which * rows
    total = tl.zeros((T, S), dtype=tl.float32)
    for k in range(0, rows, K):
        left = block(a, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, block(b, base + column, k, rows, S, K, TMA).T, total)
    own = block(own_a, base + row, column, rows, T, S, OWN).to(tl.float32)
    if SCALES:
        square = tl.load(scale + which)
        first, product = first * square, product * square
        if SCALES == 2:
            product *= square
    value = first * own + product * total
    if SECOND:
        value += second * block(own_b, base + row, column, rows, T, S, OWN).to(tl.float32)
    value = to_float(value, out.dtype.element_ty if not STORES else out.dtype)
    store_symmetric(out, turned, base, row, column, rows, value, STORES, ONCE)


@triton.jit(do_not_specialize=["below", "tiles"])
def _block_square_kernel(
    a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, tiles, T: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, STORES: tl.constexpr, OWN: tl.constexpr, SCALES: tl.constexpr,
    SECOND: tl.constexpr, ONCE: tl.constexpr, TURNS: tl.constexpr, OVERLAPS: tl.constexpr, SPECIALIZED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    if not SPECIALIZED:  # which Triton 3.6 does not compile beside it
        tl.assume(rows > 0)
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _square_tile(
                tile, a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, T, S, K, TMA,
                STORES, OWN, SCALES, SECOND, ONCE,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _square_tile(
            tile, a, b, own_a, own_b, out, turned, scale, rows, product, first, second, below, T, S, K, TMA, STORES,
            OWN,
            SCALES, SECOND, ONCE,
        )  # fmt: skip


@triton.jit
def _apply_tile(
    tile, even, x, own_x, scale, out, rows, width, first, ends, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr, OWN: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    index, row = tile // (rows // T), (tile % (rows // T)) * T
    which = matrix_at(index, ends)
    base, column = which * rows, index * C
    total = tl.zeros((T, C), dtype=tl.float32)
    for k in range(0, rows, K):
        left = block(even, base + row, k, rows, T, K, TMA)
        total = tl.dot(left, block(x, k, column, width, K, C, TMA), total)
    value = first * block(own_x, row, column, width, T, C, OWN).to(tl.float32) + total
    if SCALES:
        value *= tl.sqrt(tl.load(scale + which))
    store(out, row, column, width, to_float(value, out.dtype.element_ty if not STORES else out.dtype), STORES)


@triton.jit
def matrix_at(index, ends):
    which = index * 0
    for other in tl.static_range(len(ends) - 1):
        which += (index >= ends[other]).to(tl.int32)
    return which


@triton.jit(do_not_specialize=["ends", "tiles"])
def _block_apply_kernel(
    even, x, own_x, scale, out, rows, width, first, tiles, ends, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    TMA: tl.constexpr, STORES: tl.constexpr, OWN: tl.constexpr, SCALES: tl.constexpr, TURNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SPECIALIZED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    if not SPECIALIZED:  # which Triton 3.6 does not compile beside it
        tl.assume(rows > 0)
    if TURNS:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAPS, warp_specialize=SPECIALIZED
        ):
            _apply_tile(tile, even, x, own_x, scale, out, rows, width, first, ends, T, K, C, TMA, STORES, OWN, SCALES)
    else:
        tile = tl.program_id(0)
        _apply_tile(tile, even, x, own_x, scale, out, rows, width, first, ends, T, K, C, TMA, STORES, OWN, SCALES)


def source(tensor: Tensor, height: int, columns: int, tma: bool) -> Any:
    """An operand of a kernel: a descriptor of blocks, or the tensor."""
    if not tma:
        return tensor
    flat = tensor.flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [height, columns])


def grid_of(how: Blocks, tiles: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and arguments that all kernels have."""
    turns = 0 < how.programs < tiles
    options = {"launch_pdl": True} if how.early else {}
    return (how.programs if turns else tiles,), options | {
        "tiles": tiles, "K": how.tile[2], "TMA": how.tma, "STORES": how.stores, "TURNS": turns,
        "OVERLAPS": how.overlaps, "SPECIALIZED": how.specialized, "EARLY": how.early, "num_warps": how.tile[3],
        "num_stages": how.tile[4],
    }  # fmt: skip


def padded(ends: Sequence[int]) -> tuple[int, ...]:
    return (*ends, *[ends[-1]] * (MATRICES - len(ends)))


def _stores_once(how: Blocks, once: bool) -> Blocks:
    """Descriptors cannot store one side of the diagonal alone."""
    return how._replace(stores=False, own=reads_own(how)) if once else how


def gram(how: Blocks, x: Tensor, out: Tensor, ends: Sequence[int], columns: int, factor: float, once: bool) -> None:
    """out = factor X Xᵀ of each matrix; ends: tiles of so many columns up to the end of each."""
    (rows, width), (height, across, depth), how = x.shape, how.tile[:3], _stores_once(how, once)
    below = tiles_below(rows, height, across)
    grid, arguments = grid_of(how, below * len(out))
    _block_gram_kernel[grid](
        source(x, height, depth, how.tma), source(x, across, depth, how.tma),
        source(out, height, across, how.stores), source(out, across, height, how.stores), rows, width, factor, below,
        ends=padded(ends), T=height, S=across, C=columns, ONCE=once, **arguments,
    )  # fmt: skip


def square(
    how: Blocks, a: Tensor, b: Tensor, out: Tensor, factors: tuple[float, float, float], scale: Tensor | None,
    scales: int, once: bool,
) -> None:  # fmt: skip
    """out = factors · (a b, a, b), as `newton_schulz._square_kernel` has it."""
    rows, (height, across, depth), how = a.shape[-1], how.tile[:3], _stores_once(how, once)
    below = tiles_below(rows, height, across)
    grid, arguments = grid_of(how, below * len(out))
    _block_square_kernel[grid](
        source(a, height, depth, how.tma), source(b, across, depth, how.tma),
        source(a, height, across, reads_own(how)), source(b, height, across, reads_own(how)),
        source(out, height, across, how.stores), source(out, across, height, how.stores),
        a if scale is None else scale, rows, *factors, below, T=height, S=across, SCALES=scales,
        SECOND=factors[2] != 0.0, ONCE=once, OWN=reads_own(how), **arguments,
    )  # fmt: skip


def apply(
    how: Blocks, x: Tensor, even: Tensor, out: Tensor, ends: Sequence[int], first: float, scale: Tensor | None
) -> None:
    """out = (first X + even X) sqrt(scale); ends: tiles of as many columns as those of `how` up to that of each."""
    (rows, width), (height, columns, depth) = x.shape, how.tile[:3]
    grid, arguments = grid_of(how, rows // height * (width // columns))
    _block_apply_kernel[grid](
        source(even, height, depth, how.tma), source(x, depth, columns, how.tma),
        source(x, height, columns, reads_own(how)), even if scale is None else scale,
        source(out, height, columns, how.stores), rows, width, first, ends=padded(ends), T=height, C=columns,
        SCALES=scale is not None, OWN=reads_own(how), **arguments,
    )  # fmt: skip
