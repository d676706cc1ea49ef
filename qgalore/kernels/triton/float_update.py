"""W <- round(decay * W - step_size * N) on a float matrix, in Triton, with stochastic rounding to bfloat16.

Layout: W (rows, columns) contiguous, bfloat16 or another float dtype; N (rows, columns) contiguous float. One program
handles BLOCK neighbouring columns of one row; the random bits of element (i, j) are those of `reference`. Float32
inside, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.reference.rows import project_back, row_chunks
from qgalore.kernels.triton.tiles import random_bits16, read_step_row, round_stochastic_bfloat16, to_float

__all__ = ["update_float_"]


@triton.jit(do_not_specialize=["row_start"])
def _update_float_kernel(
    weight, direction, skip, step_row, rows, columns, row_start, M: tl.constexpr, BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    seed_low, seed_high, step_size, decay = read_step_row(step_row)
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
    weight: Tensor, direction: Tensor, left: Tensor | None, right: Tensor | None, row: Tensor, stochastic: bool,
    row_start: int, skip: Tensor | None,
) -> None:  # fmt: skip
    """See `qgalore.kernels.update_float_`; of a contiguous matrix."""
    whole, columns = left is None and right is None, weight.shape[1]
    block = min(512, max(16, triton.next_power_of_2(columns)))
    block_rows = max(1, 2048 // block)
    for start, stop in [(0, len(weight))] if whole else row_chunks(*weight.shape):
        part = weight if whole else weight[start:stop]
        full = direction if whole else project_back(direction, left, right, start, stop)
        _update_float_kernel[(triton.cdiv(stop - start, block_rows), triton.cdiv(columns, block))](
            part, full, skip, row, stop - start, columns, row_start + start, M=block_rows, BLOCK=block,
            STOCHASTIC=stochastic, HAS_SKIP=skip is not None, enable_fp_fusion=False,
        )  # fmt: skip
