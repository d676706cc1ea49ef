"""Project back, add and requantize a group of weights in one pass, in Triton: no full-precision matrix is written.

    W <- quantize(decay * W - step_size * A B),   A (rows, rank), B (rank, columns)

A B is the full-size direction: with a left basis A = leftᵀ and B = N, with a right one A = N and B = right. Layout:
A and B float (bfloat16 for the tensor cores, or float32), the values of a row of B next to one another, those of a row
or of a column of A; qdata, scale and zero point as in `group_quantization`. Codes and B are read to the end of their
rows as they are stored, beyond the matrix's own columns, where both hold zeros. One program computes M rows of one
group of columns of one weight, products accumulate in float32; the group's new scale and zero point are found in the
program, and its codes are written once, rounded stochastically.

Weights with two bases, and those whose groups are no tile of the tensor cores, take two passes: rows of the direction
are projected back, then added and requantized. For those without a basis the second one is all that there is.

What belongs to one weight comes as a tuple of as many elements as there are weights. What a weight becomes does not
depend on the others of its launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import QuantizedUpdate, ceil_div, launches
from qgalore.kernels.reference.rows import project_back, row_chunks
from qgalore.kernels.triton.group_quantization import can_handle as can_handle
from qgalore.kernels.triton.group_quantization import write_groups_
from qgalore.kernels.triton.tiles import (
    chosen,
    load_codes,
    matrix_of_program,
    quantize_group,
    read_step_row,
    store_codes,
    updated,
)

__all__ = ["update_quantized_"]


@triton.jit
def _add_product(
    product, a, b, row, column, rows, rank, a_stride, b_width, BY_COLUMNS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """product + A B at (M,) rows and (G,) columns, float32; nothing is added beyond `rows` and `b_width`."""
    k = tl.arange(0, K)
    if BY_COLUMNS:
        a_at = a + row[:, None] + k[None, :] * a_stride
        a_step = K * a_stride
    else:
        a_at = a + row[:, None] * a_stride + k[None, :]
        a_step = K
    b_at = b + k[:, None].to(tl.int64) * b_width + column[None, :]
    a_mask, b_mask = (row < rows)[:, None], (column < b_width)[None, :]
    for done in range(0, rank, K):
        inside = k < rank - done
        a_tile = tl.load(a_at, mask=a_mask & inside[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=inside[:, None] & b_mask, other=0.0)
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
        a_at += a_step
        b_at += K * b_width
    return product


@triton.jit
def _low_rank_update_kernel(
    qdata, scale, zero_point, a, b, step_rows, rows, columns, rank, q_stride, q_width, groups, a_stride, b_width,
    a_by_columns, ends, skip, GROUP: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, LAYOUTS: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    seed_low, seed_high, step_size, decay, growing = read_step_row(chosen(which, step_rows))
    if (step_size == 0.0) & (decay == 1.0):
        return
    rows, columns, rank = chosen(which, rows), chosen(which, columns), chosen(which, rank)
    a, b, a_stride, b_width = chosen(which, a), chosen(which, b), chosen(which, a_stride), chosen(which, b_width)
    # Neighbouring programs share the rows of B: a group's K x G block of it stays in the cache.
    row_blocks = tl.cdiv(rows, M)
    row = ((program % row_blocks) * M + tl.arange(0, M)).to(tl.int64)
    group = program // row_blocks
    start = group * GROUP
    end = tl.minimum(start + GROUP, columns)
    column = (start + tl.arange(0, G)).to(tl.int64)
    product = tl.zeros((M, G), dtype=tl.float32)
    # One loop or the other has no steps: after a branch around them the tensor cores would wait for every product.
    by_columns = 0 if LAYOUTS == "rows" else rank if LAYOUTS == "columns" else rank * chosen(which, a_by_columns)
    if LAYOUTS != "columns":
        product = _add_product(
            product, a, b, row, column, rows, rank - by_columns, a_stride, b_width, False, K, PRECISION
        )
    if LAYOUTS != "rows":
        product = _add_product(product, a, b, row, column, rows, by_columns, a_stride, b_width, True, K, PRECISION)
    qdata, q_stride, q_width = chosen(which, qdata), chosen(which, q_stride), chosen(which, q_width)
    row_mask = (row < rows)[:, None]
    codes = load_codes(qdata, row[:, None], q_stride, q_width, row_mask, start, GROUP, G, BITS).to(tl.float32)
    at = row[:, None] * chosen(which, groups) + group
    scale, zero_point = chosen(which, scale), chosen(which, zero_point)
    factor = tl.load(scale + at, mask=row_mask, other=0).to(tl.float32)
    offset = tl.load(zero_point + at, mask=row_mask, other=0).to(tl.float32)
    # The first product is exact.
    value = updated(tl.fma(codes, factor, offset), product, step_size, decay, growing)
    number = row[:, None].to(tl.int32)
    new, factor, offset = quantize_group(value, number, start, end, seed_low, seed_high, G, BITS, STOCHASTIC)
    store_codes(qdata, new, row[:, None], q_stride, q_width, row_mask, start, end, GROUP, G, BITS)
    tl.store(scale + at, factor[:, None].to(tl.bfloat16), mask=row_mask)
    tl.store(zero_point + at, offset[:, None].to(tl.bfloat16), mask=row_mask)


_GROUP_SIZES = (32, 64, 128, 256)  # that are tiles of the tensor cores
_ROWS, _WARPS, _STAGES, _DEPTH_BYTES = 64, 4, 4, 64
"""The tile: rows of a program, and bytes of a row of A that a stage holds.

So two programs share a multiprocessor of an H100, one multiplying while the other rounds, and one fits any consumer
card (82 KB). The best from 130M to 7B on an H200, at 60M 1 us a layer above it (`kernel_tuning.csv`, frozen); the bits
are those of any other.
"""


def _factors(update: QuantizedUpdate) -> tuple[Tensor, Tensor]:
    """A and B of the kernel, B with columns of zeros up to a multiple of 16."""
    a, b = (update.direction, update.right) if update.left is None else (update.left.T, update.direction)
    assert b is not None
    if b.shape[1] % 16:  # rows at any address would be loaded one value at a time
        b = torch.nn.functional.pad(b, (0, -b.shape[1] % 16))
    return a if 1 in a.stride() else a.contiguous(), b.contiguous()


def update_quantized_(updates: Sequence[QuantizedUpdate], skip: Tensor | None) -> None:
    """See `qgalore.kernels.update_quantized_`."""

    def kind(update: QuantizedUpdate) -> tuple[object, ...]:
        bases = (update.left is not None) + (update.right is not None)
        one_pass = bases == 1 and update.group_size in _GROUP_SIZES
        return one_pass, bases == 0, update.bits, update.group_size, update.direction.dtype, update.stochastic

    for indices in launches(updates, kind):
        alike = [updates[index] for index in indices]
        one_pass, whole, *_ = kind(alike[0])
        if one_pass:
            _launch(alike, skip)
        elif whole:
            write_groups_(alike, skip)
        else:
            for update in alike:
                _update_by_rows_(update, skip)


def _update_by_rows_(update: QuantizedUpdate, skip: Tensor | None) -> None:
    for start, stop in row_chunks(update.qdata.shape[0], update.columns):
        full = project_back(update.direction, update.left, update.right, start, stop)
        qdata, scale, zero_point = (part[start:stop] for part in update[:3])
        part = update._replace(qdata=qdata, scale=scale, zero_point=zero_point, direction=full)
        write_groups_([part], skip, row_start=start)


def _launch(updates: Sequence[QuantizedUpdate], skip: Tensor | None) -> None:
    """Weights that are stored and rounded alike."""
    _, _, _, _, _, _, _, bits, group_size, _, stochastic = updates[0]
    factors = [_factors(update) for update in updates]
    a, b = zip(*factors, strict=True)
    rows, groups = [x.shape[0] for x in a], [ceil_div(update.columns, group_size) for update in updates]
    by_columns = [x.stride(1) != 1 for x in a]
    ends = list(itertools.accumulate(ceil_div(r, _ROWS) * g for r, g in zip(rows, groups, strict=True)))
    qdata, scale, zero_point = zip(*(update[:3] for update in updates), strict=True)
    _low_rank_update_kernel[(ends[-1],)](
        qdata, scale, zero_point, a, b, tuple(update.row for update in updates),
        tuple(rows), tuple(update.columns for update in updates), tuple(x.shape[1] for x in a),
        tuple(x.stride(0) for x in qdata), tuple(x.shape[1] for x in qdata), tuple(x.stride(0) for x in scale),
        tuple(x.stride(1 if turned else 0) for x, turned in zip(a, by_columns, strict=True)),
        tuple(x.shape[1] for x in b), tuple(map(int, by_columns)), tuple(ends), skip, GROUP=group_size,
        G=group_size, M=_ROWS, K=_DEPTH_BYTES // a[0].element_size(), BITS=bits,
        LAYOUTS="mixed" if len(set(by_columns)) == 2 else "columns" if by_columns[0] else "rows",
        STOCHASTIC=stochastic, HAS_SKIP=skip is not None, PRECISION="ieee", enable_fp_fusion=False, num_warps=_WARPS,
        num_stages=_STAGES,
    )  # fmt: skip
