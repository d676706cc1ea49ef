"""The gradient of the cross-entropy over its logits, in Triton: one pass to read a row, one to overwrite it.

With m the largest of a row's V logits x, s = Σ exp(x - m) and t its target:

    loss = log(s) + m - x_t
    gradient = exp(x - m) / s - 1[column = t]

and both are zero where t is `ignore_index`. One program handles one row in blocks of columns: the first pass finds m
and s together (s shrinks by exp(m_old - m_new) when a block has a larger m), the second writes the gradient over the
logits. m, s, loss and gradient are float32 inside (float64 for float64 logits), the gradient is rounded once, when it
is stored. No sum is shared between programs, so the bits are always the same.

logits: (T, width), contiguous, any float dtype; the first V columns count, the rest is padding, which is overwritten
    with anything. A width that is a multiple of 16 lets a thread load and store several neighbours at once for any V.
targets: int64 (T,), contiguous. losses: float32 or float64 (T,), contiguous, written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 8192
_VALUES_A_THREAD = 32


@triton.jit
def _softmax_gradient_kernel(
    logits,
    targets,
    losses,
    ignore_index,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * WIDTH  # 64 bits: T * WIDTH may pass 2^31
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    dtype = losses.dtype.element_ty
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE_GRADIENT:
            zero = tl.zeros((BLOCK,), logits.dtype.element_ty)
            for start in range(0, COLUMNS, BLOCK):
                tl.store(logits + start + lane, zero, mask=start + lane < WIDTH)
    else:
        # A target outside the vocabulary makes the loss NaN.
        in_range = (target >= 0) & (target < COLUMNS)
        target_logit = tl.load(logits + target, mask=in_range, other=float("nan")).to(dtype)
        maximum = tl.full((), float("-inf"), dtype)
        total = tl.full((), 0.0, dtype)
        for start in range(0, COLUMNS, BLOCK):
            column = start + lane
            x = tl.load(logits + column, mask=column < WIDTH, other=0.0).to(dtype)
            block_maximum = tl.max(tl.where(column < COLUMNS, x, float("-inf")), axis=0)
            new_maximum = tl.maximum(maximum, block_maximum)
            # x * 0 is NaN for a value that is not finite: exp alone would hide an infinitely negative one.
            terms = tl.where(column < COLUMNS, tl.exp(x - new_maximum) + x * 0.0, 0.0)
            total = total * tl.exp(maximum - new_maximum) + tl.sum(terms, axis=0)
            maximum = new_maximum
        tl.store(losses + row, tl.log(total) + (maximum - target_logit))
        if WRITE_GRADIENT:
            tl.debug_barrier()  # every thread has read its part of the row before any overwrites the target's logit
            inverse = 1.0 / total
            for start in range(0, COLUMNS, BLOCK):
                column = start + lane
                x = tl.load(logits + column, mask=column < WIDTH, other=0.0).to(dtype)
                gradient = tl.exp(x - maximum) * inverse - (column == target).to(dtype)
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < WIDTH)


def softmax_gradient_(
    logits: Tensor, columns: int, targets: Tensor, ignore_index: int, losses: Tensor, write_gradient: bool
) -> None:
    """See `peft_pretraining.linear_cross_entropy.softmax_gradient_`."""
    rows, width = logits.shape
    # 128 threads at the least, and no fewer columns than threads.
    block = max(128, min(_MAX_BLOCK, triton.next_power_of_2(columns)))
    _softmax_gradient_kernel[(rows,)](
        logits,
        targets.contiguous(),
        losses,
        ignore_index,
        COLUMNS=columns,
        WIDTH=width,
        WRITE_GRADIENT=write_gradient,
        BLOCK=block,
        num_warps=max(4, block // (32 * _VALUES_A_THREAD)),
    )
