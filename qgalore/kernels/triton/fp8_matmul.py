"""Factors of products in FP8, in Triton, and the product by cuBLASLt.

    rows:     codes = e4m3(x f / s), s = max |x f| / 448 of each row
    columns:  the same of each column, turned: a program finds its tile's maxima, another rounds
    weight:   the same of a quantized weight, s = max over its groups of (|zero point|, |last value|) / 448

Layout: x (rows, columns) float with any strides, or up to three of them that make one row; f (columns,) float32 of
each, or none; the codes of a weight as in
`group_quantization`. FP8 codes (rows, depth) row-major, or turned (depth, rows), which are written as bytes; depth is
that of the sum, padded with zeros to a multiple of 16, as cuBLASLt wants it; s float32 a row. Both factors of a product
are contiguous along the sum: Hopper's tensor cores take FP8 in no other order.

One program rounds some whole rows of activations, piece by piece, or a tile of a weight, whose rows' scales it finds by
itself: a group has 256 values and two numbers. All values are float32 inside. A program's instructions, and not its
bytes, were what these kernels waited for (docs/log/2026-11.md): so none is spent on lanes beyond a row that is no power
of two long, scales of a weight's rows serve several blocks of columns, and codes change places as words of four.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import Fp8Matrix, QuantizedMatrix, ceil_div, fp8_width, launches, next_power_of_2
from qgalore.kernels.reference import fp8_matmul
from qgalore.kernels.triton.tiles import chosen, float8_bits, float8_word, load_codes, matrix_of_program

__all__ = ["fp8_columns", "fp8_product", "fp8_rows", "fp8_turned_weights", "fp8_weight"]


class RowsTile(NamedTuple):
    """How `_fp8_rows_kernel` reads rows of one to three parts."""

    rows: int
    """Of a program."""
    columns: int
    """That are read by one instruction for each thread, or several; 256 to a warp let it have its rows for itself."""
    warps: int
    keeps: bool
    """Whether values wait in registers for the largest magnitude; else they are read again, from a cache."""
    registers: int | None = None
    """Of a thread at most, so that more programs are on a multiprocessor; None: as many as the compiler takes."""


class WeightTile(NamedTuple):
    """What a program that rounds a weight does."""

    rows: int
    columns: int
    """At most: a divisor of them that divides a group, of which more rows are taken then."""
    blocks: int
    """Of so many columns, one after the other: the scales of rows are found once for all."""
    warps: int


# From sweeps on an H200 (`benchmarks/bench_fp8_rounding.py`).
WEIGHT = {16: WeightTile(16, 256, 2, 8), 1 << 30: WeightTile(8, 256, 4, 4)}
"""Tiles by how many groups a row has at most."""
TURNED_WEIGHT = {16: WeightTile(64, 256, 1, 8), 1 << 30: WeightTile(64, 256, 2, 8)}
COLUMN_MAXIMA = 512, 64, 8
"""Rows, columns and warps of a program that finds the largest magnitudes of columns."""
COLUMNS = 128, 64, 8
"""Of one that rounds them, and turns what it has read."""

_LONGEST, _MOST_PARTS = 32768, 3
_LONGEST_KEPT = 16384  # values of a row that wait in registers
_PIECES = (2048, 1024, 512)  # columns that a program reads of a row at a time, at most 16 times
_MOST_LANES = 1.15  # for each value of a row, of which some lie beyond the end of a part
_LEAST_BLOCK = 64  # columns of a weight; a group that fewer divide has its scale read with every value
_BLOCK = 8192  # columns of a longer row, such as one of logits, that a program reads at a time


@triton.jit
def _scale_of_rows(largest):
    """The factor that values are multiplied with before they are rounded, and its inverse, the scale."""
    smallest = 7.703719777548943e-34  # 2^-110
    counts = largest >= smallest
    inverse = tl.where(
        counts, tl.div_rn(tl.full(largest.shape, 448.0, tl.float32), tl.where(counts, largest, 1.0)), 0.0
    )
    return inverse, tl.where(largest < smallest, 0.0, largest * 0.0022321429569274187)


@triton.jit
def _magnitude(value):
    """The bits of magnitudes: they are in their order, those of NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load(at, mask, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    """float32 of what is stored, 0 where it is not; WHOLE: all is."""
    if WHOLE:
        return tl.load(at, eviction_policy=EVICTION).to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def _read_piece(
    x, factor, row, inside, columns, stored, x_row, x_column, PART: tl.constexpr, START: tl.constexpr,
    MASKED: tl.constexpr, CUT: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, HAS_FACTOR: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """N columns float32 of a part of some rows, times their factors, with 0 beyond the columns.

    MASKED: not all of them are stored; CUT: nor are all that are stored to be read; EVEN: all rows are there;
    LAST: x is not read again, but factors are, by every program.
    """
    column = START + tl.arange(0, N)[None, :]
    mask = inside & (column < stored[PART])
    WHOLE: tl.constexpr = EVEN and not MASKED
    at = x[PART] + row[:, None] * x_row[PART] + column * x_column[PART]
    value = _load(at, mask, WHOLE, "evict_first" if LAST else "")
    if HAS_FACTOR:
        at = factor[PART] + row[:, None] * 0 + column  # in the same threads as x
        value = value * _load(at, mask, WHOLE, "")
    return tl.where(column < columns[PART], value, 0.0) if CUT else value


@triton.jit
def _write_piece(
    codes, value, row, inside, starts, ends, depth, PART: tl.constexpr, START: tl.constexpr, MASKED: tl.constexpr,
    N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    column = starts[PART] + START + tl.arange(0, N)[None, :]
    at = codes + row[:, None] * depth + column
    if EVEN and not MASKED:
        tl.store(at, float8_bits(value))
    else:
        tl.store(at, float8_bits(value), mask=inside & (column < ends[PART]))


@triton.jit
def _fp8_rows_kernel(
    x, factor, codes, row_scale, rows, columns, stored, x_row, x_column, starts, ends, depth, PIECES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, HAS_FACTOR: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    inside = (row < rows)[:, None]
    bits = tl.zeros((M, N), tl.int32)
    kept = ()
    for piece in tl.static_range(len(PIECES)):
        value = _read_piece(
            x, factor, row, inside, columns, stored, x_row, x_column, PIECES[piece][0], PIECES[piece][1],
            PIECES[piece][2], PIECES[piece][3], N, EVEN, HAS_FACTOR, KEEPS,
        )  # fmt: skip
        bits = tl.maximum(bits, _magnitude(value))
        if KEEPS:
            kept += (value,)  # type: ignore[assignment]
    inverse, scale = _scale_of_rows(tl.max(bits, axis=1).to(tl.float32, bitcast=True))
    tl.store(row_scale + row, scale, mask=row < rows)
    for piece in tl.static_range(len(PIECES)):
        if KEEPS:
            value = kept[piece]
        else:  # they come from a cache
            value = _read_piece(
                x, factor, row, inside, columns, stored, x_row, x_column, PIECES[piece][0], PIECES[piece][1],
                PIECES[piece][2], PIECES[piece][3], N, EVEN, HAS_FACTOR, True,
            )  # fmt: skip
        _write_piece(
            codes, value * inverse[:, None], row, inside, starts, ends, depth, PIECES[piece][0], PIECES[piece][1],
            PIECES[piece][2], N, EVEN,
        )  # fmt: skip


@triton.jit
def _read(x, factor, row, column, inside, columns, x_row, x_column, HAS_FACTOR: tl.constexpr):
    """Values float32 of some rows, times their factors, with 0 beyond the columns."""
    value = tl.load(x + row[:, None] * x_row + column * x_column, mask=inside & (column < columns), other=0.0)
    value = value.to(tl.float32)
    if HAS_FACTOR:
        value = value * tl.load(factor + column, mask=column < columns, other=0.0)
    return value


@triton.jit
def _fp8_long_rows_kernel(
    x, factor, codes, row_scale, columns, x_row, x_column, depth, BLOCK: tl.constexpr, HAS_FACTOR: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inside = (row >= 0)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    bits = tl.zeros((1, BLOCK), tl.int32)
    for start in range(0, columns, BLOCK):
        value = _read(x, factor, row, start + lane, inside, columns, x_row, x_column, HAS_FACTOR)
        bits = tl.maximum(bits, _magnitude(value))
    inverse, scale = _scale_of_rows(tl.max(bits, axis=1).to(tl.float32, bitcast=True))
    tl.store(row_scale + row, scale)
    # The row has just been read: it comes from a cache.
    for start in range(0, depth, BLOCK):
        value = _read(x, factor, row, start + lane, inside, columns, x_row, x_column, HAS_FACTOR)
        at = codes + row[:, None] * depth + start + lane
        tl.store(at, float8_bits(value * inverse[:, None]), mask=inside & (start + lane < depth))


@triton.jit
def _read_tile(x, row, column, rows, columns, stored, x_row, x_column, CUT: tl.constexpr):
    """A tile float32 of a matrix with 0 beyond it; CUT: of the columns that are stored not all are to be read."""
    mask = (row < rows)[:, None] & (column < stored)[None, :]
    at = x + row.to(tl.int64)[:, None] * x_row + column[None, :] * x_column
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.where((column < columns)[None, :], value, 0.0) if CUT else value


@triton.jit
def _column_maxima_kernel(
    x, largest, rows, columns, stored, x_row, x_column, M: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):
    row, column = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    value = _read_tile(x, row, column, rows, columns, stored, x_row, x_column, CUT)
    bits = tl.max(_magnitude(value), axis=0)
    tl.atomic_max(largest + column, bits, mask=column < columns, sem="relaxed")  # which has no order


@triton.jit
def _fp8_columns_kernel(
    x, largest, codes, scale, rows, columns, stored, x_row, x_column, padded_columns, depth, M: tl.constexpr,
    N: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    # From the end on: what has been read last, for the maxima, may be in the cache.
    row_block, column_block = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row, column = row_block * M + tl.arange(0, M), column_block * N + tl.arange(0, N)
    value = _read_tile(x, row, column, rows, columns, stored, x_row, x_column, CUT)
    bits = tl.load(largest + column, mask=column < padded_columns, other=0)
    inverse, own_scale = _scale_of_rows(bits.to(tl.float32, bitcast=True))
    if row_block == 0:
        tl.store(scale + column, own_scale, mask=column < padded_columns)
    at = codes + column[:, None].to(tl.int64) * depth + row[None, :]
    mask = (column < padded_columns)[:, None] & (row < depth)[None, :]
    tl.store(at, tl.trans(float8_bits(value * inverse[None, :])), mask=mask)


@triton.jit
def _scale_of_weight_rows(
    scale, zero_point, row, inside, groups, BITS: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr
):
    """`_scale_of_rows` of a bound of the largest magnitude of each row: of the first and last value of its groups."""
    bits = tl.zeros((row.shape[0], STEP), tl.int32)
    for start in tl.static_range(0, GROUPS, STEP):
        group = start + tl.arange(0, STEP)[None, :]
        at, mask = row[:, None] * groups + group, inside[:, None] & (group < groups)
        first = tl.load(zero_point + at, mask=mask, other=0.0).to(tl.float32)
        last = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32) * ((1 << BITS) - 1.0) + first
        bits = tl.maximum(bits, tl.maximum(_magnitude(first), _magnitude(last)))
    bits = tl.max(bits, axis=1)
    return _scale_of_rows(bits.to(tl.float32, bitcast=True))


@triton.jit
def _read_weight(
    qdata, scale, zero_point, row, inside, columns, q_stride, q_width, groups, start, GROUP: tl.constexpr,
    BITS: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """N columns float32, from `start` on, of some rows of a weight, with 0 beyond it.

    WHOLE: so many divide its columns. Where they divide a group, a row has one scale.
    """
    row, inside = row[:, None], inside[:, None]
    column = start + tl.arange(0, N)[None, :]
    code = load_codes(qdata, row, q_stride, q_width, inside, start, N, N, BITS).to(tl.float32)
    started = inside & (row * 0 + start < columns)
    mask = started if WHOLE else inside & (column < columns)
    if GROUP % N == 0:
        at, mask_of_group = row * groups + start // GROUP, started
    else:
        at, mask_of_group = row * groups + column // GROUP, mask
    step = tl.load(scale + at, mask=mask_of_group, other=0.0).to(tl.float32)
    offset = tl.load(zero_point + at, mask=mask_of_group, other=0.0).to(tl.float32)
    value = tl.fma(code, step, offset)  # the product within is exact
    return value if WHOLE else tl.where(mask, value, 0.0)


@triton.jit
def _fp8_weight_kernel(
    qdata, scale, zero_point, codes, row_scale, rows, columns, q_stride, q_width, groups, padded_rows, depth,
    GROUP: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    inside = row < rows
    inverse, own_scale = _scale_of_weight_rows(scale, zero_point, row, inside, groups, BITS, GROUPS, STEP)
    if tl.program_id(1) == 0:
        tl.store(row_scale + row, own_scale, mask=row < padded_rows)
    for block in tl.static_range(BLOCKS):
        start = (tl.program_id(1) * BLOCKS + block) * N
        value = _read_weight(
            qdata, scale, zero_point, row, inside, columns, q_stride, q_width, groups, start, GROUP, BITS, N, WHOLE
        )
        column = start + tl.arange(0, N)[None, :]
        mask = (row < padded_rows)[:, None] & (column < depth)
        tl.store(codes + row[:, None] * depth + column, float8_bits(value * inverse[:, None]), mask=mask)


@triton.jit
def _fp8_turned_weights_kernel(
    qdata, scale, zero_point, words, row_scale, ones, rows, padded_rows, starts, ends, columns, q_stride, q_width,
    groups, depth, stride, GROUP: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    which, program = matrix_of_program(ends)
    qdata, scale, zero_point = chosen(which, qdata), chosen(which, scale), chosen(which, zero_point)
    q_stride, q_width = chosen(which, q_stride), chosen(which, q_width)
    rows, padded_rows, first_row = chosen(which, rows), chosen(which, padded_rows), chosen(which, starts)
    words += tl.multiple_of(first_row // 4, 4)
    row = (program * M + tl.arange(0, M)).to(tl.int64)
    all_inverse, own_scale = _scale_of_weight_rows(scale, zero_point, row, row < rows, groups, BITS, GROUPS, STEP)
    if tl.program_id(1) == 0:
        tl.store(row_scale + first_row + row, own_scale, mask=row < padded_rows)
    # Four codes that become adjacent are one word before they change places.
    even, odd = tl.split(tl.reshape(all_inverse, (M // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    inverse = (first, second, third, fourth)
    word = program * (M // 4) + tl.arange(0, M // 4)
    for block in tl.static_range(BLOCKS):
        start = (tl.program_id(1) * BLOCKS + block) * N
        rounded = ()
        for index in tl.static_range(4):
            row = word.to(tl.int64) * 4 + index
            value = _read_weight(
                qdata, scale, zero_point, row, row < rows, columns, q_stride, q_width, groups, start, GROUP, BITS, N,
                WHOLE,
            )  # fmt: skip
            rounded += (value * inverse[index][:, None],)  # type: ignore[assignment]
        column = start + tl.arange(0, N)
        at = words + column[:, None].to(tl.int64) * tl.multiple_of(stride, 4) + word[None, :]
        mask = (column < depth)[:, None] & (word < tl.multiple_of(padded_rows // 4, 4))[None, :]
        tl.store(at, tl.trans(float8_word(*rounded)), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(ones + column, tl.full((N,), 1.0, tl.float32), mask=column < depth)


def can_handle(rows: Sequence[int], columns: Sequence[int]) -> bool:
    """Whether kernels take a factor of matrices with so many rows below one another, or columns beside one another.

    No side may be 1, which is a constant to Triton: all lanes but one are then known to be masked, and of such lanes
    ptxas made codes that are no zeros (Triton 3.6, H200). A row of one matrix may have any length.
    """
    if 1 in (*rows, *columns) or not max(columns):
        return False
    return len(columns) == 1 or (len(columns) <= _MOST_PARTS and fp8_width(max(columns)) * len(columns) <= _LONGEST)


@functools.cache
def rows_tile(columns: tuple[int, ...]) -> RowsTile:
    """The tile for rows of parts with so many columns: the longest pieces that leave few lanes without work."""
    widths = list(map(fp8_width, columns))
    depth = sum(widths)
    lanes = {piece: piece * sum(ceil_div(width, piece) for width in widths) for piece in _PIECES if depth >= 2 * piece}
    usable = [piece for piece, count in lanes.items() if count <= 16 * piece]
    if not usable:
        return RowsTile(4, 256, 4, keeps=True)  # a warp has a row
    fitting = (piece for piece in usable if lanes[piece] <= _MOST_LANES * depth)
    piece = next(fitting, min(usable, key=lambda piece: lanes[piece]))
    return RowsTile(1, piece, piece // 256, keeps=depth <= _LONGEST_KEPT)


@functools.cache
def _pieces(columns: tuple[int, ...], stored: tuple[int, ...], length: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Of a row the part and first column of each piece, and whether it is masked and cut: see `_read_piece`."""
    return tuple(
        (part, start, start + length > stored[part], start + length > count and stored[part] > count)
        for part, count in enumerate(columns) for start in range(0, fp8_width(count), length)
    )  # fmt: skip


def fp8_rows(parts: Sequence[Tensor], columns: Sequence[int], factors: Sequence[Tensor] | None) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_rows`."""
    rows, ends = parts[0].shape[0], tuple(itertools.accumulate(map(fp8_width, columns)))
    starts, depth = (0, *ends[:-1]), ends[-1]
    found = _empty(rows, depth, parts[0])
    x_row, x_column = zip(*(part.stride() for part in parts), strict=True)
    factor = tuple(parts if factors is None else factors)
    if rows and depth > _LONGEST:
        _fp8_long_rows_kernel[(rows,)](
            parts[0], factor[0], found.codes.view(torch.uint8), found.scale, columns[0], x_row[0], x_column[0], depth,
            BLOCK=_BLOCK, HAS_FACTOR=factors is not None, enable_fp_fusion=False, num_warps=8,
        )  # fmt: skip
    elif rows:
        tile = rows_tile(tuple(columns))
        # Padding that is stored is read with what is before it, and left out then.
        widths = zip(map(fp8_width, columns), parts, factor, strict=True)
        stored = tuple(min(width, part.shape[1], each.shape[-1]) for width, part, each in widths)
        pieces = _pieces(tuple(columns), stored, tile.columns)
        _fp8_rows_kernel[(ceil_div(rows, tile.rows),)](
            tuple(parts), factor, found.codes.view(torch.uint8), found.scale, rows, tuple(columns), stored, x_row,
            x_column, starts, ends, depth, PIECES=pieces, M=tile.rows, N=tile.columns, EVEN=rows % tile.rows == 0,
            HAS_FACTOR=factors is not None, KEEPS=tile.keeps, enable_fp_fusion=False, num_warps=tile.warps,
            maxnreg=tile.registers,
        )  # fmt: skip
    return found


def fp8_columns(x: Tensor, columns: int) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_columns`."""
    rows, padded, depth = x.shape[0], fp8_width(columns), fp8_width(x.shape[0])
    found = _empty(padded, depth, x)
    if not rows:  # nothing is launched
        found.scale.zero_()
    largest = torch.zeros(padded, dtype=torch.int32, device=x.device)  # magnitudes by their bits
    stored = min(padded, x.shape[1])  # with padding that is left out again, as in `fp8_rows`
    sizes = rows, columns, stored, *x.stride()
    block_rows, block_columns, warps = COLUMN_MAXIMA
    _column_maxima_kernel[ceil_div(depth, block_rows), ceil_div(padded, block_columns)](
        x, largest, *sizes, M=block_rows, N=block_columns, CUT=stored > columns, enable_fp_fusion=False, num_warps=warps
    )
    block_rows, block_columns, warps = COLUMNS
    _fp8_columns_kernel[ceil_div(depth, block_rows), ceil_div(padded, block_columns)](
        x, largest, found.codes.view(torch.uint8), found.scale, *sizes, padded, depth, M=block_rows, N=block_columns,
        CUT=stored > columns, enable_fp_fusion=False, num_warps=warps,
    )  # fmt: skip
    return found


def fp8_weight(weight: QuantizedMatrix | Tensor) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_weight`."""
    if isinstance(weight, Tensor):
        return fp8_matmul.with_padded_rows(fp8_rows([weight], [weight.shape[1]], None))
    rows, depth = fp8_width(weight.qdata.shape[0]), fp8_width(weight.columns)
    found = _empty(rows, depth, weight.qdata)
    grid_rows, grid_columns, options = _weight_launch(weight, WEIGHT)
    _fp8_weight_kernel[ceil_div(rows, grid_rows), grid_columns](
        *weight[:3], found.codes.view(torch.uint8), found.scale, len(weight.qdata), weight.columns,
        weight.qdata.stride(0), weight.qdata.shape[1], weight.scale.shape[1], rows, depth, **options,
    )  # fmt: skip
    return found


def fp8_turned_weights(weights: Sequence[QuantizedMatrix | Tensor]) -> tuple[Fp8Matrix, list[Tensor]]:
    """See `qgalore.kernels.fp8_turned_weights`."""
    stored = [weight for weight in weights if not isinstance(weight, Tensor)]
    if len(stored) < len(weights):
        return fp8_matmul.turned([fp8_weight(weight) for weight in weights])
    counts = [fp8_width(weight.qdata.shape[0]) for weight in stored]
    found = _empty(fp8_width(stored[0].columns), sum(counts), stored[0].qdata)
    scales = found.scale.new_empty(sum(counts))
    starts = list(itertools.accumulate(counts, initial=0))
    if not sum(counts):  # nothing is launched
        return Fp8Matrix(found.codes, found.scale.fill_(1.0)), list(scales.split(counts))
    words = found.codes.view(torch.int32)
    for indices in launches(stored, lambda weight: weight[3:6]):
        some = [stored[index] for index in indices]
        grid_rows, grid_columns, options = _weight_launch(some[0], TURNED_WEIGHT)
        padded = tuple(counts[index] for index in indices)
        ends = tuple(itertools.accumulate(ceil_div(count, grid_rows) for count in padded))
        qdata, scale, zero_point, (columns, *_), *_ = zip(*some, strict=True)
        _fp8_turned_weights_kernel[ends[-1], grid_columns](
            qdata, scale, zero_point, words, scales, found.scale, tuple(map(len, qdata)), padded,
            tuple(starts[index] for index in indices), ends, columns, tuple(x.stride(0) for x in qdata),
            tuple(x.shape[1] for x in qdata), scale[0].shape[1], len(found.codes), words.stride(0), **options,
        )  # fmt: skip
    return found, list(scales.split(counts))


def _weight_launch(weight: QuantizedMatrix, tiles: Mapping[int, WeightTile]) -> tuple[int, int, dict[str, Any]]:
    """Rows of a program that rounds such a weight, programs for all columns, and options of its kernel."""
    _, scale, _, columns, bits, group_size, _ = weight
    rows, most_columns, blocks, warps = next(tile for groups, tile in tiles.items() if scale.shape[1] <= groups)
    width = math.gcd(group_size, most_columns)
    width = width if width >= _LEAST_BLOCK else most_columns
    rows, blocks = rows * (most_columns // width), min(blocks, ceil_div(fp8_width(columns), width))
    groups = next_power_of_2(scale.shape[1])
    step = max(min(groups, 16), groups // 16)  # groups whose scales are read at a time
    options = {
        "GROUP": group_size, "BITS": bits, "M": rows, "N": width, "BLOCKS": blocks,
        "GROUPS": ceil_div(scale.shape[1], step) * step, "STEP": step, "WHOLE": columns % width == 0,
        "enable_fp_fusion": False, "num_warps": warps,
    }  # fmt: skip
    return rows, ceil_div(fp8_width(columns), width * blocks), options


def fp8_product(a: Fp8Matrix, b: Fp8Matrix, width: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """See `qgalore.kernels.fp8_product`."""
    if not a.codes.is_cuda:
        return fp8_matmul.fp8_product(a, b, width, dtype, exact)
    return fp8_matmul.with_columns(by_library(a, b, exact), width).to(dtype)


def by_library(a: Fp8Matrix, b: Fp8Matrix, exact: bool) -> Tensor:
    """a bᵀ (rows of a, rows of b) bfloat16 by cuBLASLt, or by CUTLASS where that is older than CUDA 12.9."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        a.codes, b.codes.T, a.scale[:, None], by_row, b.scale[None, :], by_row, output_dtype=torch.bfloat16,
        use_fast_accum=not exact,
    )  # fmt: skip


def _empty(rows: int, columns: int, like: Tensor) -> Fp8Matrix:
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=like.device)
    return Fp8Matrix(codes, torch.empty(rows, dtype=torch.float32, device=like.device))
