"""W <- round(decay * W - step_size * N) on a float matrix, in Triton, with stochastic rounding to bfloat16.

Layout: W (rows, columns) contiguous, bfloat16 or another float dtype; N (rows, columns) contiguous float. One program
handles BLOCK neighbouring columns of one row; the random bits of element (i, j) are those of `reference`. Float32
inside, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.triton.tiles import random_bits16, read_numbers, round_stochastic_bfloat16, to_float


@triton.jit(do_not_specialize=["seed_low", "seed_high", "row_start", "step_size", "decay"])
def _update_float_kernel(
    weight, direction, skip, numbers, rows, columns, seed_low, seed_high, row_start, step_size, decay, M: tl.constexpr,
    BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_NUMBERS: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    if HAS_NUMBERS:
        seed_low, seed_high, step_size, decay = read_numbers(numbers)
        if (step_size == 0.0) & (decay == 1.0):
            return
    row = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    value = tl.load(weight + at, mask=mask, other=0).to(tl.float32) * decay
    value -= tl.load(direction + at, mask=mask, other=0).to(tl.float32) * step_size
    if STOCHASTIC:
        random = random_bits16(row_start + row, start, seed_low, seed_high, BLOCK)
        tl.store(weight + at, round_stochastic_bfloat16(value, random), mask=mask)
    else:
        tl.store(weight + at, to_float(value, weight.dtype.element_ty), mask=mask)


def update_float_(
    weight: Tensor, direction: Tensor, step_size: float, decay: float, seed: int | None, row_start: int,
    skip: Tensor | None, numbers: Tensor | None,
) -> None:  # fmt: skip
    """W <- round(decay * W - step_size * N) in place; both (rows, columns) and contiguous."""
    rows, columns = weight.shape
    block = min(512, max(16, triton.next_power_of_2(columns)))
    block_rows = max(1, 2048 // block)
    number = seed or 0
    _update_float_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(columns, block))](
        weight, direction, skip, numbers, rows, columns, number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF, row_start,
        step_size,
        decay, M=block_rows, BLOCK=block, STOCHASTIC=seed is not None and weight.dtype == torch.bfloat16,
        HAS_SKIP=skip is not None, HAS_NUMBERS=numbers is not None, enable_fp_fusion=False,
    )  # fmt: skip
