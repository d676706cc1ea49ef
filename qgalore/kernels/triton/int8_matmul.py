"""Products of a layer in INT8 tensor cores, in Triton: activations are quantized a row, weights multiplied as codes.

    forward:   y = x Wᵀ = a (s (q kᵀ) + o Σ q)         q, a: codes and scale of a row of x
    backward:  gx = g W = b (h k) + Σ g o              h, b: codes and scale of a row of g s

with W = s k + o a row, k = code - 128 signed, o = zero point + 128 s. Three kernels. The first quantizes rows and gives
the sum that the offsets o need: Σ q, or Σ g o. The second makes the weight's codes signed and turns them, where the
product wants it, so that both factors are contiguous along the sum: tensor cores take INT8 in no other order. The third
multiplies codes into int32, exactly, and applies the rest in float32 to the result, which is rounded once.

Layout: x or g (rows, columns) float with any strides; its codes int8 (rows, depth), row-major; scale and sum float32 a
row. The weight's codes uint8 (out, in), rows at any distance; signed int8 (out, depth), or (in, depth) backward. depth
is that of the sum, padded with zeros to a multiple of 128. Output (rows, width) in the float type asked for, zeros
beyond the matrix's own columns.

One program quantizes one tile of whole rows, one signs a square of codes, and one multiplies a tile of the output, in
an order in which neighbours share rows of the left factor and columns of the right one. Tile sizes follow from the
number of rows alone and change no bit: sums of integers have no order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, dtype, empty, float32, int8

from qgalore.kernels.arguments import ceil_div, next_power_of_2
from qgalore.kernels.triton.group_quantization import block_of_group, warps_of_block
from qgalore.kernels.triton.tiles import to_float

__all__ = ["int8_linear", "int8_linear_backward"]

_LONGEST_ROW = 16384
_DEPTH = 128  # codes are padded to a multiple along the sum: whole steps of every tile
_SQUARE = 64  # codes of a weight that a program signs, each way


@triton.jit
def _quantize_rows_kernel(
    x, scale, zero_point, codes, row_scale, row_sum, rows, columns, x_row, x_column, width, G: tl.constexpr,
    M: tl.constexpr, FOLDS_SCALE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    column = tl.arange(0, G)[None, :]
    inside = (row < rows)[:, None]
    at = x + row[:, None] * x_row + column * x_column
    value = tl.load(at, mask=inside & (column < columns), other=0.0).to(tl.float32)
    if FOLDS_SCALE:
        factor = tl.load(scale + column, mask=column < columns, other=0.0).to(tl.float32)
        offset = tl.load(zero_point + column, mask=column < columns, other=0.0).to(tl.float32) + 128.0 * factor
        total = tl.sum(value * offset, axis=1)
        value = value * factor
    # The bits of magnitudes are in the order of the magnitudes, and those of NaN above all.
    absmax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    smallest = 3.009265538105056e-36  # 2^-118
    counts = absmax >= smallest
    inverse = tl.where(counts, tl.div_rn(tl.full(absmax.shape, 127.0, tl.float32), tl.where(counts, absmax, 1.0)), 0.0)
    scaled = value * inverse[:, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    # To the nearest whole number, ties to even: below 2^22 float32 has no fraction left there.
    rounded = (scaled + 12582912.0) - 12582912.0
    if not FOLDS_SCALE:
        total = tl.sum(rounded.to(tl.int32), axis=1).to(tl.float32)
    tl.store(codes + row[:, None] * width + column, rounded.to(tl.int8), mask=inside & (column < width))
    tl.store(row_scale + row, tl.where(absmax < smallest, 0.0, absmax * 0.007874015748031496), mask=row < rows)
    tl.store(row_sum + row, total, mask=row < rows)


@triton.jit
def _signed_kernel(codes, signed, rows, columns, row_stride, depth, TURNS: tl.constexpr, S: tl.constexpr):
    row = (tl.program_id(0) * S + tl.arange(0, S)).to(tl.int64)
    column = tl.program_id(1) * S + tl.arange(0, S)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    code = tl.load(codes + row[:, None] * row_stride + column[None, :], mask=inside, other=128) ^ 128
    if TURNS:
        at, code = signed + column[:, None].to(tl.int64) * depth + row[None, :], tl.trans(code)
        tl.store(at, code.to(tl.int8, bitcast=True), mask=(column < columns)[:, None] & (row < depth)[None, :])
    else:
        at = signed + row[:, None] * depth + column[None, :]
        tl.store(at, code.to(tl.int8, bitcast=True), mask=(row < rows)[:, None] & (column < depth)[None, :])


@triton.jit
def _int8_matmul_kernel(
    a, b, row_scale, row_sum, scale, zero_point, out, rows, columns, width, DEPTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr, SCALES_COLUMNS: tl.constexpr,
):  # fmt: skip
    # NEIGHBOURS tiles below each other are computed before the next column of tiles, so that both factors are cached.
    row_tiles, column_tiles = tl.cdiv(rows, M), tl.cdiv(width, N)
    band = tl.program_id(0) // (NEIGHBOURS * column_tiles)
    in_band = tl.minimum(row_tiles - band * NEIGHBOURS, NEIGHBOURS)
    index = tl.program_id(0) % (NEIGHBOURS * column_tiles)
    row = (band * NEIGHBOURS + index % in_band) * M + tl.arange(0, M)
    column = index // in_band * N + tl.arange(0, N)
    k = tl.arange(0, K)
    # What is beyond an end is read from the beginning, and not stored: the loop needs no masks.
    a_at = a + (row % rows)[:, None].to(tl.int64) * DEPTH + k[None, :]
    b_at = b + (column % columns)[None, :].to(tl.int64) * DEPTH + k[:, None]
    product = tl.zeros((M, N), dtype=tl.int32)
    for _ in range(0, DEPTH, K):
        product = tl.dot(tl.load(a_at), tl.load(b_at), product, out_dtype=tl.int32)
        a_at += K
        b_at += K
    value = product.to(tl.float32)
    factor = tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    total = tl.load(row_sum + row, mask=row < rows, other=0.0)[:, None]
    if SCALES_COLUMNS:
        own = tl.load(scale + column, mask=column < columns, other=0.0).to(tl.float32)
        offset = tl.load(zero_point + column, mask=column < columns, other=0.0).to(tl.float32) + 128.0 * own
        value = factor * (value * own[None, :] + total * offset[None, :])
    else:
        value = factor * value + total
    value = tl.where((column < columns)[None, :], value, 0.0)
    at = out + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, to_float(value, out.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


def tile(rows: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a program's tile, its warps and stages, for so many rows; the depth divides 128.

    Fixed instead of tried out, so that a run launches the same kernels every time. The largest take 96 KiB of shared
    memory; consumer cards have 99.
    """
    if rows >= 128:
        return 128, 128, 128, 8, 3
    return max(16, next_power_of_2(rows)), 128, 64, 4, 4


def can_handle(tokens: int, rows: int, columns: int) -> bool:
    """Whether there are tokens, and a row of activations, of either side of a weight of this shape, fits a tile."""
    return tokens > 0 and max(rows, columns) <= _LONGEST_ROW


def int8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """See `qgalore.kernels.int8_linear`."""
    quantized = _quantize_rows(x, qdata.shape[1], None, None)
    return _multiply(quantized, _signed(qdata, turns=False), scale, zero_point, width, x.dtype, forward=True)


def int8_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """See `qgalore.kernels.int8_linear_backward`."""
    quantized = _quantize_rows(grad, qdata.shape[0], scale, zero_point)
    return _multiply(quantized, _signed(qdata, turns=True), scale, zero_point, width, grad.dtype, forward=False)


def _quantize_rows(
    x: Tensor, columns: int, scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, depth) int8, scale and sum (rows,) float32 of the first columns of x."""
    rows, depth = x.shape[0], _depth(columns)
    codes = empty(rows, depth, dtype=int8, device=x.device)
    row_scale, row_sum = empty(2, rows, dtype=float32, device=x.device)
    block_rows, block_columns = block_of_group(depth)
    _quantize_rows_kernel[(ceil_div(rows, block_rows),)](
        x, scale, zero_point, codes, row_scale, row_sum, rows, columns, *x.stride(), depth, G=block_columns,
        M=block_rows, FOLDS_SCALE=scale is not None, enable_fp_fusion=False,
        num_warps=warps_of_block(block_rows, block_columns),
    )  # fmt: skip
    return codes, row_scale, row_sum


def _signed(qdata: Tensor, turns: bool) -> Tensor:
    """Codes (out, in) as signed ones, (out, depth) or `turns` (in, depth)."""
    if qdata.stride(1) != 1:
        qdata = qdata.contiguous()
    rows, columns = qdata.shape
    depth = _depth(rows if turns else columns)
    covered = (depth, columns) if turns else (rows, depth)
    signed = empty(columns if turns else rows, depth, dtype=int8, device=qdata.device)
    _signed_kernel[(ceil_div(covered[0], _SQUARE), ceil_div(covered[1], _SQUARE))](
        qdata, signed, rows, columns, qdata.stride(0), depth, TURNS=turns, S=_SQUARE, num_warps=4
    )
    return signed


def _multiply(
    quantized: tuple[Tensor, Tensor, Tensor], signed: Tensor, scale: Tensor, zero_point: Tensor, width: int,
    type: dtype, forward: bool,
) -> Tensor:  # fmt: skip
    a, row_scale, row_sum = quantized
    (rows, depth), columns = a.shape, signed.shape[0]
    out = empty(rows, width, dtype=type, device=a.device)
    block_rows, block_columns, block_depth, warps, stages = tile(rows)
    grid = (ceil_div(rows, block_rows) * ceil_div(width, block_columns),)
    _int8_matmul_kernel[grid](
        a, signed, row_scale, row_sum, scale, zero_point, out, rows, columns, width, DEPTH=depth, M=block_rows,
        N=block_columns, K=block_depth, NEIGHBOURS=8, SCALES_COLUMNS=forward, enable_fp_fusion=False, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def _depth(size: int) -> int:
    return -(-size // _DEPTH) * _DEPTH
