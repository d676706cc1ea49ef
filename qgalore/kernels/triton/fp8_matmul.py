"""Factors of products in FP8, in Triton, and the product by cuBLASLt.

    rows:     codes = e4m3(x f / s), s = max |x f| / 448 of each row
    columns:  the same of each column, turned: a program finds its tile's maxima, another rounds
    weight:   the same of a quantized weight, s = max over its groups of (|zero point|, |last value|) / 448

Layout: x (rows, columns) float with any strides, or up to three of them that make one row; f (columns,) float32 of
each, or none; the codes of a weight as in
`group_quantization`. FP8 codes (rows, depth) row-major, or turned (depth, rows), which are written as bytes; depth is
that of the sum, padded with zeros to a multiple of 16, as cuBLASLt wants it; s float32 a row. Both factors of a product
are contiguous along the sum: Hopper's tensor cores take FP8 in no other order.

One program rounds one tile of whole rows of activations, a long row in blocks, or a tile of a weight, whose rows'
scales it finds by itself: a group has 256 values and two numbers. All values are float32 inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import Fp8Matrix, QuantizedMatrix, ceil_div, fp8_width, next_power_of_2
from qgalore.kernels.reference import fp8_matmul
from qgalore.kernels.triton.group_quantization import block_of_group, warps_of_block
from qgalore.kernels.triton.tiles import float8_bits, load_codes

__all__ = ["fp8_columns", "fp8_product", "fp8_rows", "fp8_turned_weights", "fp8_weight"]

_LONGEST_ROW, _LONGEST_JOINED, _MOST_PARTS = 16384, 32768, 3
_BLOCK = 8192  # columns of a longer row, such as one of logits, that a program reads at a time
_TILE_TURNED = 128, 64  # rows and columns of activations that a program rounds by columns
_TILE = 64, 128  # rows and columns of a weight that a program rounds


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
def _read(x, factor, row, column, inside, columns, x_row, x_column, HAS_FACTOR: tl.constexpr):
    """Values float32 of some rows, times their factors, with 0 beyond the columns."""
    value = tl.load(x + row[:, None] * x_row + column * x_column, mask=inside & (column < columns), other=0.0)
    value = value.to(tl.float32)
    if HAS_FACTOR:
        value = value * tl.load(factor + column, mask=column < columns, other=0.0)
    return value


@triton.jit
def _magnitudes(value):
    """The bits of the largest magnitude of each row: they are in the order of magnitudes, those of NaN above all."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _fp8_rows_kernel(
    x, factor, codes, row_scale, rows, columns, x_row, x_column, starts, ends, depth, PARTS: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    column = tl.arange(0, G)[None, :]
    inside = (row < rows)[:, None]
    first = _read(x[0], factor[0], row, column, inside, columns[0], x_row[0], x_column[0], HAS_FACTOR)
    largest = _magnitudes(first)
    second, third = first, first
    if PARTS > 1:
        second = _read(x[1], factor[1], row, column, inside, columns[1], x_row[1], x_column[1], HAS_FACTOR)
        largest = tl.maximum(largest, _magnitudes(second))
    if PARTS > 2:
        third = _read(x[2], factor[2], row, column, inside, columns[2], x_row[2], x_column[2], HAS_FACTOR)
        largest = tl.maximum(largest, _magnitudes(third))
    inverse, scale = _scale_of_rows(largest.to(tl.float32, bitcast=True))
    at = codes + row[:, None] * depth + column
    tl.store(at, float8_bits(first * inverse[:, None]), mask=inside & (column < ends[0]))
    if PARTS > 1:
        mask = inside & (column < ends[1] - starts[1])
        tl.store(at + starts[1], float8_bits(second * inverse[:, None]), mask=mask)
    if PARTS > 2:
        mask = inside & (column < ends[2] - starts[2])
        tl.store(at + starts[2], float8_bits(third * inverse[:, None]), mask=mask)
    tl.store(row_scale + row, scale, mask=row < rows)


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
        bits = tl.maximum(bits, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    inverse, scale = _scale_of_rows(tl.max(bits, axis=1).to(tl.float32, bitcast=True))
    tl.store(row_scale + row, scale)
    # The row has just been read: it comes from a cache.
    for start in range(0, depth, BLOCK):
        value = _read(x, factor, row, start + lane, inside, columns, x_row, x_column, HAS_FACTOR)
        at = codes + row[:, None] * depth + start + lane
        tl.store(at, float8_bits(value * inverse[:, None]), mask=inside & (start + lane < depth))


@triton.jit
def _read_tile(x, rows, columns, x_row, x_column, M: tl.constexpr, N: tl.constexpr):
    """A tile (M, N) float32 of a matrix with 0 beyond it, and the numbers of its rows and columns."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :] * x_column, mask=mask, other=0.0)
    return value.to(tl.float32), row, column


@triton.jit
def _column_maxima_kernel(x, largest, rows, columns, x_row, x_column, M: tl.constexpr, N: tl.constexpr):
    value, _, column = _read_tile(x, rows, columns, x_row, x_column, M, N)
    bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    tl.atomic_max(largest + column, bits, mask=column < columns, sem="relaxed")  # which has no order


@triton.jit
def _fp8_columns_kernel(
    x, largest, codes, scale, rows, columns, x_row, x_column, padded_columns, depth, M: tl.constexpr, N: tl.constexpr
):
    value, row, column = _read_tile(x, rows, columns, x_row, x_column, M, N)
    bits = tl.load(largest + column, mask=column < padded_columns, other=0)
    inverse, own_scale = _scale_of_rows(bits.to(tl.float32, bitcast=True))
    if tl.program_id(0) == 0:
        tl.store(scale + column, own_scale, mask=column < padded_columns)
    at = codes + column[:, None].to(tl.int64) * depth + row[None, :]
    mask = (column < padded_columns)[:, None] & (row < depth)[None, :]
    tl.store(at, tl.trans(float8_bits(value * inverse[None, :])), mask=mask)


@triton.jit
def _fp8_weight_kernel(
    qdata, scale, zero_point, codes, row_scale, ones, rows, columns, q_stride, q_width, groups, padded_rows, depth,
    stride, GROUP: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    inside = row < rows
    # A bound of the largest magnitude of each row: that of the first and the last value of each of its groups.
    group = tl.arange(0, GROUPS)[None, :]
    at, mask = row[:, None] * groups + group, inside[:, None] & (group < groups)
    first = tl.load(zero_point + at, mask=mask, other=0.0).to(tl.float32)
    last = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32) * ((1 << BITS) - 1.0) + first
    bits = tl.maximum(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, last.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    inverse, own_scale = _scale_of_rows(tl.max(bits, axis=1).to(tl.float32, bitcast=True))
    if tl.program_id(1) == 0:
        tl.store(row_scale + row, tl.where(inside, own_scale, 0.0), mask=row < padded_rows)
    start = tl.program_id(1) * N
    column = start + tl.arange(0, N)[None, :]
    code = load_codes(qdata, row[:, None], q_stride, q_width, inside[:, None], start, N, N, BITS).to(tl.float32)
    mask = inside[:, None] & (column < columns)
    if GROUP % N == 0:
        at, mask_of_group = (
            row[:, None] * groups + start // GROUP,
            inside[:, None] & (row[:, None] * 0 + start < columns),
        )
    else:
        at, mask_of_group = row[:, None] * groups + column // GROUP, mask
    step = tl.load(scale + at, mask=mask_of_group, other=0.0).to(tl.float32)
    offset = tl.load(zero_point + at, mask=mask_of_group, other=0.0).to(tl.float32)
    value = tl.where(mask, tl.fma(code, step, offset), 0.0) * inverse[:, None]  # the product within is exact
    rounded = float8_bits(value)
    if TURNS:
        turned = start + tl.arange(0, N)
        at = codes + turned[:, None].to(tl.int64) * stride + row[None, :]
        tl.store(at, tl.trans(rounded), mask=(turned < depth)[:, None] & (row < padded_rows)[None, :])
        if tl.program_id(0) == 0:
            tl.store(ones + turned, tl.full((N,), 1.0, tl.float32), mask=turned < depth)
    else:
        at = codes + row[:, None] * stride + column
        tl.store(at, rounded, mask=(row < padded_rows)[:, None] & (column < depth))


def can_handle(longest: int, parts: int = 1) -> bool:
    """Whether a kernel takes rows of so many columns, in so many parts; those of one part may have any length."""
    if not 0 < parts <= _MOST_PARTS or longest <= 0:
        return False
    return parts == 1 or block_of_group(longest)[1] * parts <= _LONGEST_JOINED


def fp8_rows(parts: Sequence[Tensor], columns: Sequence[int], factors: Sequence[Tensor] | None) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_rows`."""
    rows, ends = parts[0].shape[0], tuple(itertools.accumulate(map(fp8_width, columns)))
    starts, depth = (0, *ends[:-1]), ends[-1]
    found = _empty(rows, depth, parts[0])
    block_rows, block_columns = block_of_group(max(map(fp8_width, columns)))
    x_row, x_column = zip(*(part.stride() for part in parts), strict=True)
    factor = tuple(parts if factors is None else factors)
    if rows and block_columns * len(parts) > (_LONGEST_ROW if len(parts) == 1 else _LONGEST_JOINED):
        _fp8_long_rows_kernel[(rows,)](
            parts[0], factor[0], found.codes.view(torch.uint8), found.scale, columns[0], x_row[0], x_column[0], depth,
            BLOCK=_BLOCK, HAS_FACTOR=factors is not None, enable_fp_fusion=False, num_warps=8,
        )  # fmt: skip
    elif rows:
        _fp8_rows_kernel[(ceil_div(rows, block_rows),)](
            tuple(parts), factor, found.codes.view(torch.uint8), found.scale, rows, tuple(columns), x_row, x_column,
            starts, ends, depth, PARTS=len(parts), G=block_columns, M=block_rows,
            HAS_FACTOR=factors is not None, enable_fp_fusion=False,
            num_warps=next_power_of_2(warps_of_block(block_rows, block_columns * len(parts))),
        )  # fmt: skip
    return found


def fp8_columns(x: Tensor, columns: int) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_columns`."""
    rows, padded, depth = x.shape[0], fp8_width(columns), fp8_width(x.shape[0])
    found = _empty(padded, depth, x)
    if not rows:  # nothing is launched
        found.scale.zero_()
    largest = torch.zeros(padded, dtype=torch.int32, device=x.device)  # magnitudes by their bits
    block_rows, block_columns = _TILE_TURNED
    grid = ceil_div(depth, block_rows), ceil_div(padded, block_columns)
    _column_maxima_kernel[grid](
        x, largest, rows, columns, *x.stride(), M=block_rows, N=block_columns, enable_fp_fusion=False, num_warps=8
    )
    _fp8_columns_kernel[grid](
        x, largest, found.codes.view(torch.uint8), found.scale, rows, columns, *x.stride(), padded, depth, M=block_rows,
        N=block_columns, enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
    return found


def fp8_weight(weight: QuantizedMatrix | Tensor) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_weight`."""
    if isinstance(weight, Tensor):
        return fp8_matmul.with_padded_rows(fp8_rows([weight], [weight.shape[1]], None))
    rows, depth = fp8_width(weight.qdata.shape[0]), fp8_width(weight.columns)
    found = _empty(rows, depth, weight.qdata)
    _round_weight(weight, found.codes, found.scale, None)
    return found


def fp8_turned_weights(weights: Sequence[QuantizedMatrix | Tensor]) -> tuple[Fp8Matrix, list[Tensor]]:
    """See `qgalore.kernels.fp8_turned_weights`."""
    stored = [weight for weight in weights if not isinstance(weight, Tensor)]
    if len(stored) < len(weights):
        return fp8_matmul.turned([fp8_weight(weight) for weight in weights])
    counts = [fp8_width(weight.qdata.shape[0]) for weight in stored]
    found = _empty(fp8_width(stored[0].columns), sum(counts), stored[0].qdata)
    if not sum(counts):  # nothing is launched
        found.scale.fill_(1.0)
    scales = list(torch.empty(sum(counts), dtype=torch.float32, device=found.codes.device).split(counts))
    for weight, codes, scale in zip(stored, found.codes.split(counts, dim=1), scales, strict=True):
        _round_weight(weight, codes, scale, found.scale)
    return found, scales


def _round_weight(weight: QuantizedMatrix, codes: Tensor, row_scale: Tensor, ones: Tensor | None) -> None:
    """Write codes and scales of rows; turned, where there are ones to write."""
    qdata, scale, zero_point, columns, bits, group_size, _ = weight
    rows = qdata.shape[0]
    padded_rows, depth, turned = fp8_width(rows), fp8_width(columns), ones is not None
    block_rows, block_columns = _TILE
    _fp8_weight_kernel[(ceil_div(padded_rows, block_rows), ceil_div(depth, block_columns))](
        qdata, scale, zero_point, codes.view(torch.uint8), row_scale, ones, rows, columns, qdata.stride(0),
        qdata.shape[1], scale.shape[1], padded_rows, depth, codes.stride(0), GROUP=group_size, BITS=bits, M=block_rows,
        N=block_columns, GROUPS=next_power_of_2(scale.shape[1]), TURNS=turned, enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip


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
