"""The gradient of the cross-entropy over its logits, in Triton: one pass to read a row, one to overwrite it.

With m the largest of a row's V logits x, s = Σ exp(x - m) and t its target:

    loss = log(s) + m - x_t
    gradient = exp(x - m) / s - 1[column = t]

and both are zero where t is `ignore_index`. One program handles one row in blocks of columns: the first pass finds m
and s together (s shrinks by exp(m_old - m_new) when a block has a larger m), the second writes the gradient over the
logits. m, s, loss and gradient are float32 inside (float64 for float64 logits), the gradient is rounded once, when it
is stored. No sum is shared between programs, so the bits are always the same.

With codes the gradient is also written in FP8, e4m3(448 gradient): it is between -1 and 1, and near the ends where it
counts, so that one scale serves all rows.

Instructions count here as much as bytes: 1 / s is part of the exponent, only the last block has a mask, and the column
of the target is written by itself.

logits: (T, width), contiguous, any float dtype; the first V columns count, the rest is padding, which is overwritten
    with anything. A width that is a multiple of 16 lets a thread load and store several neighbours at once for any V.
targets: int64 (T,), contiguous. losses: float32 or float64 (T,), contiguous, written. codes: e4m3, as bytes (T, depth),
    contiguous, written, with zeros from column V on.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import next_power_of_2
from qgalore.kernels.triton.tiles import float8_bits

_MAX_BLOCK = 8192
_VALUES_A_THREAD = 32
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _with_block(maximum, total, x, inside):
    """m and s of a row with one block more; `inside` masks what is beyond the row, None nothing."""
    larger = tl.maximum(maximum, tl.max(x, axis=0))
    # x * 0 is NaN for a value that is not finite: the power alone would hide an infinitely negative one.
    terms = tl.exp2((x - larger) * _LOG2_E) + x * 0.0
    if inside is not None:
        terms = tl.where(inside, terms, 0.0)
    return larger, total * tl.exp2((maximum - larger) * _LOG2_E) + tl.sum(terms, axis=0)


@triton.jit
def _probability(x, maximum, shift):
    """exp(x - m) / s with -log2(s). m is taken off first: a fused sum of huge logits is not 0."""
    return tl.exp2((x - maximum) * _LOG2_E + shift)


@triton.jit
def _store(logits, codes, at, gradient, mask, HAS_CODES: tl.constexpr):
    """Write some of a gradient, in FP8 as well."""
    tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=mask)
    if HAS_CODES:
        tl.store(codes + at, float8_bits(gradient.to(tl.float32) * 448.0), mask=mask)


@triton.jit
def _softmax_gradient_kernel(
    logits, targets, losses, codes, ignore_index, DEPTH: tl.constexpr, HAS_CODES: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * WIDTH  # 64 bits: T * WIDTH may pass 2^31
    if HAS_CODES:
        codes += row * DEPTH
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    WHOLE: tl.constexpr = COLUMNS // BLOCK * BLOCK  # columns in blocks that need no mask
    last = WHOLE + lane
    dtype = losses.dtype.element_ty
    stored = logits.dtype.element_ty
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE_GRADIENT:
            zero = tl.zeros((BLOCK,), stored)
            for start in range(0, WHOLE, BLOCK):
                tl.store(logits + start + lane, zero)
            tl.store(logits + last, zero, mask=last < WIDTH)
        if HAS_CODES:
            for start in range(0, DEPTH, BLOCK):
                tl.store(codes + start + lane, tl.zeros((BLOCK,), tl.uint8), mask=start + lane < DEPTH)
    else:
        # A target outside the vocabulary makes the loss NaN.
        in_range = (target >= 0) & (target < COLUMNS)
        target_logit = tl.load(logits + target, mask=in_range, other=float("nan")).to(dtype)
        maximum = tl.full((), float("-inf"), dtype)
        total = tl.full((), 0.0, dtype)
        for start in range(0, WHOLE, BLOCK):
            x = tl.load(logits + start + lane).to(dtype)
            maximum, total = _with_block(maximum, total, x, None)
        if WHOLE < COLUMNS:
            x = tl.load(logits + last, mask=last < COLUMNS, other=float("-inf")).to(dtype)
            maximum, total = _with_block(maximum, total, x, last < COLUMNS)
        tl.store(losses + row, tl.log(total) + (maximum - target_logit))
        if WRITE_GRADIENT:
            shift = -tl.log2(total)
            tl.debug_barrier()  # every thread has read its part of the row before any overwrites the target's logit
            for start in range(0, WHOLE, BLOCK):
                x = tl.load(logits + start + lane).to(dtype)
                _store(logits, codes, start + lane, _probability(x, maximum, shift), None, HAS_CODES)
            if WHOLE < COLUMNS:
                x = tl.load(logits + last, mask=last < WIDTH, other=0.0).to(dtype)
                gradient = _probability(x, maximum, shift)
                tl.store(logits + last, gradient.to(stored), mask=last < WIDTH)
                if HAS_CODES:
                    code = float8_bits(tl.where(last < COLUMNS, gradient, 0.0).to(tl.float32) * 448.0)
                    tl.store(codes + last, code, mask=last < DEPTH)
            tl.debug_barrier()
            of_target = _probability(target_logit, maximum, shift) - 1.0  # of which little may be left
            _store(logits, codes, target, of_target, in_range, HAS_CODES)


def softmax_gradient_(
    logits: Tensor, columns: int, targets: Tensor, ignore_index: int, losses: Tensor, write_gradient: bool,
    codes: Tensor | None = None,
) -> None:  # fmt: skip
    """See `peft_pretraining.models.ops.linear_cross_entropy.softmax_gradient_`."""
    rows, width = logits.shape
    # 128 threads at the least, and no fewer columns than threads.
    block = max(128, min(_MAX_BLOCK, next_power_of_2(columns)))
    _softmax_gradient_kernel[(rows,)](
        logits,
        targets.contiguous(),
        losses,
        None if codes is None else codes.view(torch.uint8),
        ignore_index,
        DEPTH=0 if codes is None else codes.shape[1],
        HAS_CODES=codes is not None,
        COLUMNS=columns,
        WIDTH=width,
        WRITE_GRADIENT=write_gradient,
        BLOCK=block,
        num_warps=max(4, block // (32 * _VALUES_A_THREAD)),
    )
