"""W <- round(decay * W - step_size * N) on float matrices, in Triton, with stochastic rounding to 16 bits.

Layout: W (rows, columns) contiguous, bfloat16, float16 or float32; N (rows, columns) contiguous float. One program
handles BLOCK neighbouring columns of M rows; the random bits of element (i, j) are those of `reference`. Float32
inside, rounded once. Matrices of about one width are one launch: what belongs to one of them comes as a tuple of as
many elements as there are matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import FloatUpdate, ceil_div, launches, next_power_of_2
from qgalore.kernels.reference.rows import project_back, row_chunks
from qgalore.kernels.triton.tiles import (
    chosen,
    matrix_of_program,
    random_bits16,
    read_step_row,
    round_stochastic,
    to_float,
    updated,
)

__all__ = ["update_float_"]


@triton.jit(do_not_specialize=["row_start"])
def _update_float_kernel(
    weight, direction, step_rows, rows, columns, ends, skip, row_start, M: tl.constexpr, BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    seed_low, seed_high, step_size, decay, growing = read_step_row(chosen(which, step_rows))
    if (step_size == 0.0) & (decay == 1.0):
        return
    weight, direction, width = chosen(which, weight), chosen(which, direction), chosen(which, columns)
    across = tl.cdiv(width, BLOCK)
    row = program // across * M + tl.arange(0, M)[:, None]
    start = program % across * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = (row < chosen(which, rows)) & (column < width)
    at = row.to(tl.int64) * width + column
    value = tl.load(weight + at, mask=mask, other=0).to(tl.float32)
    value = updated(value, tl.load(direction + at, mask=mask, other=0).to(tl.float32), step_size, decay, growing)
    if STOCHASTIC:
        random = random_bits16(row_start + row, start, seed_low, seed_high, BLOCK)
        tl.store(weight + at, round_stochastic(value, random, weight.dtype.element_ty), mask=mask)
    else:
        tl.store(weight + at, to_float(value, weight.dtype.element_ty), mask=mask)


def update_float_(updates: Sequence[FloatUpdate], skip: Tensor | None) -> None:
    """See `qgalore.kernels.update_float_`; of contiguous matrices."""
    whole = [update for update in updates if not _has_bases(update)]
    for update in updates:
        for start, stop in row_chunks(*update.weight.shape) if _has_bases(update) else ():
            full = project_back(update.direction, update.left, update.right, start, stop)
            part = update._replace(weight=update.weight[start:stop], direction=full, row_start=update.row_start + start)
            _launch([part], skip)

    def kind(update: FloatUpdate) -> tuple[object, ...]:
        formats = update.weight.dtype, update.direction.dtype, update.stochastic
        return *formats, update.row_start, _block(update.weight.shape[1])

    for indices in launches(whole, kind):
        _launch([whole[index] for index in indices], skip)


def _has_bases(update: FloatUpdate) -> bool:
    return update.left is not None or update.right is not None


def _block(columns: int) -> int:
    block: int = min(512, max(16, next_power_of_2(columns)))
    return block


def _launch(updates: Sequence[FloatUpdate], skip: Tensor | None) -> None:
    """Updates of one kind, without bases."""
    shapes, block = [update.weight.shape for update in updates], _block(updates[0].weight.shape[1])
    block_rows = max(1, 2048 // block)
    programs = (ceil_div(rows, block_rows) * ceil_div(columns, block) for rows, columns in shapes)
    ends = tuple(itertools.accumulate(programs))
    _update_float_kernel[(ends[-1],)](
        tuple(update.weight for update in updates), tuple(update.direction for update in updates),
        tuple(update.row for update in updates), *zip(*shapes, strict=True), ends, skip, updates[0].row_start,
        M=block_rows, BLOCK=block, STOCHASTIC=updates[0].stochastic, HAS_SKIP=skip is not None,
        enable_fp_fusion=False,
    )  # fmt: skip
