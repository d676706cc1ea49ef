"""Project back, add and requantize in one pass, in Triton: a full-precision matrix is never written.

    W <- quantize(decay * W - step_size * A B),   A (rows, rank), B (rank, columns)

A B is the full-size direction: with a left basis A = leftᵀ and B = N, with a right one A = N and B = right. Layout:
A and B float (bfloat16 for the tensor cores, or float32) with any strides; qdata, scale and zero point as in
`group_quantization`. One program computes M rows of one group of columns, products accumulate in float32; the group's
new scale and zero point are found in the program, and its codes are written once, rounded stochastically.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.triton_tiles import load_codes, quantize_group, read_numbers, shared_memory, store_codes


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_size", "decay"])
def _low_rank_update_kernel(
    qdata, scale, zero_point, a, b, skip, numbers, rows, columns, q_stride, groups, a_row, a_rank, b_rank, b_column,
    seed_low, seed_high, step_size, decay, RANK: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_NUMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    if HAS_NUMBERS:
        seed_low, seed_high, step_size, decay = read_numbers(numbers)
        if (step_size == 0.0) & (decay == 1.0):
            return
    # Neighbouring programs share the rows of B: a group's K x G block of it stays in the cache.
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    group = tl.program_id(1)
    start = group * GROUP
    end = tl.minimum(start + GROUP, columns)
    column = (start + tl.arange(0, G)).to(tl.int64)
    k = tl.arange(0, K)
    a_at = a + row[:, None] * a_row + k[None, :] * a_rank
    b_at = b + k[:, None].to(tl.int64) * b_rank + column[None, :] * b_column
    a_mask, b_mask = (row < rows)[:, None], (column < end)[None, :]
    product = tl.zeros((M, G), dtype=tl.float32)
    for done in range(0, RANK, K):
        inside = k < RANK - done
        a_tile = tl.load(a_at, mask=a_mask & inside[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=inside[:, None] & b_mask, other=0.0)
        product = tl.dot(a_tile, b_tile, product, input_precision=PRECISION)
        a_at += K * a_rank
        b_at += K * b_rank
    row_mask = (row < rows)[:, None]
    codes = load_codes(qdata, row[:, None], q_stride, row_mask, start, end, G, BITS).to(tl.float32)
    at = row[:, None] * groups + group
    factor = tl.load(scale + at, mask=row_mask, other=0).to(tl.float32)
    offset = tl.load(zero_point + at, mask=row_mask, other=0).to(tl.float32)
    value = (codes * factor + offset) * decay - product * step_size
    mask = row_mask & b_mask
    number = row[:, None].to(tl.int32)
    new, factor, offset = quantize_group(value, mask, number, start, seed_low, seed_high, G, BITS, STOCHASTIC)
    store_codes(qdata, new, row[:, None], q_stride, row_mask, start, end, G, BITS)
    tl.store(scale + at, factor[:, None].to(tl.bfloat16), mask=row_mask)
    tl.store(zero_point + at, offset[:, None].to(tl.bfloat16), mask=row_mask)


def can_handle(group_size: int) -> bool:
    """Whether a group is a tile that the tensor cores take."""
    return group_size in (32, 64, 128, 256)


def _tile(rows: int, groups: int, shared_memory: int) -> tuple[int, int, int]:
    """Rows of a program, its warps and stages: small matrices want many programs, large ones large tiles.

    Measured on an H100, which has room for 128 programs at a time; the bits are those of any other choice.
    """
    programs = triton.cdiv(rows, 64) * groups
    if programs <= 64:
        return 32, 8, 3
    if shared_memory < 1 << 17:
        return 64, 4, 3
    return (64, 8, 4) if programs <= 128 else (128, 8, 3)


def low_rank_update_(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, a: Tensor, b: Tensor, columns: int, bits: int, group_size: int,
    step_size: float, decay: float, seed: int | None, skip: Tensor | None, numbers: Tensor | None,
) -> None:  # fmt: skip
    """W <- quantize(decay * W - step_size * a b) in place; a (rows, rank), b (rank, columns) of one dtype."""
    rows, rank = a.shape
    number = seed or 0
    block_rows, warps, stages = _tile(rows, triton.cdiv(columns, group_size), shared_memory(a.device))
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(columns, group_size))
    _low_rank_update_kernel[grid](
        qdata, scale, zero_point, a, b, skip, numbers, rows, columns, qdata.stride(0), scale.stride(0), *a.stride(),
        *b.stride(), number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF, step_size, decay, RANK=rank, GROUP=group_size,
        G=group_size, M=block_rows, K=64 if a.element_size() == 2 else 32, BITS=bits, STOCHASTIC=seed is not None,
        HAS_SKIP=skip is not None, HAS_NUMBERS=numbers is not None, PRECISION="ieee", enable_fp_fusion=False,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
