"""Group quantization in Triton: `dequantize`, `quantize` and an update of a quantized matrix, group by group.

    dequantize:  out = code * scale + zero_point
    quantize:    (codes, scale, zero_point) of x
    update:      (codes, scale, zero_point) of decay * W - step_size * N

Layout: qdata (rows, columns or more) uint8, or (rows, ceil(columns / 2) or more) at 4 bits, read and written to the end
of its rows, with zeros beyond the matrix; scale and zero point (rows, groups) bfloat16; the float operand (rows,
columns) with any strides; out (rows or more, columns or more) with any row stride. One program handles one group of
BLOCK_ROWS rows. Values are float32 inside and rounded once; the bits are those of `reference`.

Several matrices share a launch: what belongs to one of them comes as a tuple of as many elements as there are matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import QuantizedMatrix, QuantizedUpdate, ceil_div, launches, next_power_of_2
from qgalore.kernels.triton.tiles import (
    chosen,
    load_codes,
    matrix_of_program,
    quantize_group,
    read_step_row,
    readable,
    store_codes,
    to_float,
    updated,
)

__all__ = ["dequantize", "quantize"]


@triton.jit
def _dequantize_kernel(
    qdata, scale, zero_point, out, rows, columns, q_stride, q_width, out_rows, out_columns, out_stride, groups, ends,
    GROUP: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    which, program = matrix_of_program(ends)
    rows, columns, groups = chosen(which, rows), chosen(which, columns), chosen(which, groups)
    qdata, scale, zero_point = chosen(which, qdata), chosen(which, scale), chosen(which, zero_point)
    q_stride, q_width = chosen(which, q_stride), chosen(which, q_width)
    out, out_stride = chosen(which, out), chosen(which, out_stride)
    out_rows, out_columns = chosen(which, out_rows), chosen(which, out_columns)
    row_blocks = tl.cdiv(out_rows, M)
    row = ((program % row_blocks) * M + tl.arange(0, M)[:, None]).to(tl.int64)
    group = program // row_blocks
    start = group * GROUP
    # What lies below the matrix, or beside its groups, is 0 * 0 + 0.
    row_mask = row < tl.where(start < columns, rows, 0)
    codes = load_codes(qdata, row, q_stride, q_width, row_mask, start, GROUP, G, BITS, BITS).to(tl.float32)
    factor = tl.load(scale + row * groups + group, mask=row_mask, other=0).to(tl.float32)
    offset = tl.load(zero_point + row * groups + group, mask=row_mask, other=0).to(tl.float32)
    column = start + tl.arange(0, G)[None, :]
    value = tl.where(column < columns, tl.fma(codes, factor, offset), 0.0)  # the product is exact
    mask = (row < out_rows) & (column < tl.minimum(start + GROUP, out_columns))
    tl.store(out + row * out_stride + column, to_float(value, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_start"])
def _update_kernel(
    qdata, scale, zero_point, x, step_rows, rows, columns, q_stride, q_width, groups, x_row, x_column, x_end, ends,
    skip, row_start, GROUP: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, ALONG: tl.constexpr,
    STOCHASTIC: tl.constexpr, UPDATE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    seed_low, seed_high = 0, 0
    if STOCHASTIC or UPDATE:
        seed_low, seed_high, step_size, decay, growing = read_step_row(chosen(which, step_rows))
        if UPDATE:
            if (step_size == 0.0) & (decay == 1.0):
                return
    rows, columns, groups = chosen(which, rows), chosen(which, columns), chosen(which, groups)
    row_blocks = tl.cdiv(rows, M)
    row = ((program % row_blocks) * M + tl.arange(0, M)[:, None]).to(tl.int64)
    group = program // row_blocks
    start = group * GROUP
    end = tl.minimum(start + GROUP, columns)
    column = start + tl.arange(0, G)[None, :]
    row_mask = row < rows
    by_row, by_column, x_end = chosen(which, x_row), chosen(which, x_column), chosen(which, x_end)
    # What is read beyond the matrix is not looked at.
    if ALONG == "rows":
        by_row, mask = 1, (row < x_end) & (column < end)
    elif ALONG == "columns":
        by_column, mask = 1, row_mask & (column < tl.minimum(start + GROUP, x_end))
    else:
        mask = row_mask & (column < end)
    value = tl.load(chosen(which, x) + row * by_row + column.to(tl.int64) * by_column, mask=mask, other=0)
    value = value.to(tl.float32)
    qdata, q_stride, q_width = chosen(which, qdata), chosen(which, q_stride), chosen(which, q_width)
    scale, zero_point = chosen(which, scale), chosen(which, zero_point)
    at = row * groups + group
    if UPDATE:
        codes = load_codes(qdata, row, q_stride, q_width, row_mask, start, GROUP, G, BITS).to(tl.float32)
        factor = tl.load(scale + at, mask=row_mask, other=0).to(tl.float32)
        offset = tl.load(zero_point + at, mask=row_mask, other=0).to(tl.float32)
        # The first product is exact.
        value = updated(tl.fma(codes, factor, offset), value, step_size, decay, growing)
    number = (row_start + row).to(tl.int32)
    codes, factor, offset = quantize_group(value, number, start, end, seed_low, seed_high, G, BITS, STOCHASTIC)
    store_codes(qdata, codes, row, q_stride, q_width, row_mask, start, end, GROUP, G, BITS)
    tl.store(scale + at, factor[:, None].to(tl.bfloat16), mask=row_mask)
    tl.store(zero_point + at, offset[:, None].to(tl.bfloat16), mask=row_mask)


_LARGEST_GROUP = 16384


def block_of_group(group_size: int, values: int = 2048) -> tuple[int, int]:
    """(rows, columns) of a program's tile: one group, and rows for about so many values."""
    columns = max(16, next_power_of_2(group_size))
    return max(1, values // columns), columns


def warps_of_block(rows: int, columns: int, least: int = 4) -> int:
    """Warps for a tile: at most 32 values a thread, from `least` warps up, so that a long group stays in registers."""
    return max(least, rows * columns // 1024)


def can_handle(group_size: int) -> bool:
    """Whether a group is whole bytes and whole calls of the random generator, and fits a tile."""
    return group_size % 8 == 0 and group_size <= _LARGEST_GROUP


def dequantize(matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> list[Tensor]:
    """See `qgalore.kernels.dequantize`."""
    outs = [
        torch.empty(matrix.qdata.shape[0], matrix.columns, dtype=dtype, device=matrix.qdata.device)
        if matrix.out is None
        else matrix.out
        for matrix in matrices
    ]
    if len(matrices) == 1:
        _launch_dequantize(matrices, outs)
        return outs
    pairs = list(zip(matrices, outs, strict=True))
    for indices in launches(pairs, _stored_alike):
        _launch_dequantize([matrices[index] for index in indices], [outs[index] for index in indices])
    return outs


def _stored_alike(pair: tuple[QuantizedMatrix, Tensor]) -> tuple[object, ...]:
    matrix, out = pair
    # One ragged matrix in a launch would make the loads and stores of all others as narrow as its own.
    in_vectors = all(x % 16 == 0 for x in (out.shape[1], out.stride(0), matrix.qdata.stride(0)))
    return matrix.bits, matrix.group_size, in_vectors


_DEQUANTIZE_VALUES, _DEQUANTIZE_WARPS = 4096, 4
"""Of a tile: 32 values share what a thread does once."""


def _launch_dequantize(matrices: Sequence[QuantizedMatrix], outs: Sequence[Tensor]) -> None:
    """Matrices that are stored alike."""
    qdata, scale, zero_point, columns, (bits, *_), (group_size, *_), _ = zip(*matrices, strict=True)
    block_rows, block_columns = block_of_group(group_size, _DEQUANTIZE_VALUES)
    rows, width = zip(*(x.shape for x in outs), strict=True)
    stored_rows, stored_width = zip(*(x.shape for x in qdata), strict=True)
    groups = [ceil_div(columns, group_size) for columns in width]
    ends = tuple(itertools.accumulate(ceil_div(r, block_rows) * g for r, g in zip(rows, groups, strict=True)))
    _dequantize_kernel[(ends[-1],)](
        qdata, scale, zero_point, tuple(outs), stored_rows, columns, tuple(x.stride(0) for x in qdata), stored_width,
        rows, width, tuple(x.stride(0) for x in outs), tuple(x.stride(0) for x in scale), ends, GROUP=group_size,
        G=block_columns, M=block_rows, BITS=bits, enable_fp_fusion=False,
        num_warps=warps_of_block(block_rows, block_columns, _DEQUANTIZE_WARPS),
    )  # fmt: skip


def quantize(
    x: Tensor, bits: int, group_size: int, row: Tensor | None, row_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qgalore.kernels.quantize`."""
    rows, columns = x.shape
    groups = ceil_div(columns, group_size)
    qdata = torch.empty(rows, columns if bits == 8 else (columns + 1) // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=x.device)
    zero_point = torch.empty_like(scale)
    without_row = torch.empty(0, dtype=torch.int32, device=x.device) if row is None else row
    parts = QuantizedUpdate(
        qdata, scale, zero_point, x, None, None, columns, bits, group_size, without_row, row is not None
    )
    write_groups_([parts], None, update=False, row_start=row_start)
    return qdata, scale, zero_point


def write_groups_(
    updates: Sequence[QuantizedUpdate], skip: Tensor | None, update: bool = True, row_start: int = 0
) -> None:
    """Write codes, scale and zero point of decay * W - step_size * N for weights that are stored and rounded alike.

    N without bases; without `update`, of N itself, whose step row is read where the rounding is stochastic. The rows
    are row_start: of the matrix that the seed belongs to.
    """
    for indices in launches(updates, lambda part: _read_along(part.direction)):
        _launch_update([updates[index] for index in indices], skip, update, row_start)


def _read_along(x: Tensor) -> tuple[str, bool]:
    """What neighbours in memory are neighbours along, and whether they can all be read 16 bytes at a time."""
    along = "columns" if x.stride(1) == 1 else "rows" if x.stride(0) == 1 else ""
    return along, x.stride(0 if along == "columns" else 1) % 16 == 0 and readable(x) % 16 == 0


_UPDATE_VALUES, _UPDATE_WARPS = 4096, 4
"""Of a tile: with groups of 256 it has 16 rows, so that of a turned direction 32 neighbouring bytes are read."""


def _launch_update(
    updates: Sequence[QuantizedUpdate], skip: Tensor | None, update: bool = True, row_start: int = 0
) -> None:
    """Updates whose directions are read alike."""
    qdata, scale, zero_point, x, _, _, columns, (bits, *_), (group_size, *_), step_rows, (stochastic, *_) = zip(
        *updates, strict=True
    )
    block_rows, block_columns = block_of_group(group_size, _UPDATE_VALUES)
    rows, q_width = zip(*(codes.shape for codes in qdata), strict=True)
    programs = (ceil_div(r, block_rows) * ceil_div(c, group_size) for r, c in zip(rows, columns, strict=True))
    ends = tuple(itertools.accumulate(programs))
    x_row, x_column = zip(*(each.stride() for each in x), strict=True)
    _update_kernel[(ends[-1],)](
        qdata, scale, zero_point, x, step_rows if update or stochastic else None, rows, columns,
        tuple(codes.stride(0) for codes in qdata), q_width, tuple(each.stride(0) for each in scale), x_row, x_column,
        tuple(readable(each) for each in x), ends, skip, row_start, GROUP=group_size, G=block_columns, M=block_rows,
        BITS=bits, ALONG=_read_along(x[0])[0], STOCHASTIC=stochastic, UPDATE=update, HAS_SKIP=skip is not None,
        enable_fp_fusion=False,
        num_warps=warps_of_block(block_rows, block_columns, _UPDATE_WARPS),
    )  # fmt: skip
