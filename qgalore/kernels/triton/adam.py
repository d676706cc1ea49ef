"""Adam's step, and one of momentum alone, on tensors of any shape, in Triton.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g²,  N = (m / c1) / (sqrt(v / c2) + eps)
    m <- beta m + (1 - beta) g,  N = beta m + (1 - beta) g

Layout: everything flat and contiguous; moments uint8 with a float32 absmax for each block of `block_size` values, or
float32. One program handles BLOCKS whole blocks, so that the largest magnitude of a block is found inside it. Float32
inside; the direction uses the moments before they are rounded to 8 bits, and Adam's is the only value whose division
and square root are not rounded to the last bit. Adam's steps of several weights are one launch: what belongs to one of
them comes as a tuple of as many elements as there are weights. One of momentum is a launch for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, launches
from qgalore.kernels.triton.block_quantization import (
    INTERVALS,
    blocks_of_program,
    inverse,
    nearest_code,
    program_of_blocks,
    tables,
)
from qgalore.kernels.triton.tiles import chosen, matrix_of_program, to_float

__all__ = ["adam_steps", "momentum_steps"]


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2", "eps"])
def _adam_kernel(
    grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, out, factor, step_rows, numel, ends, skip, map1,
    borders1, starts1, map2, borders2, starts2, beta1, rest1, beta2, rest2, eps, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, QUANTIZED: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_SKIP: tl.constexpr, FIRST: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    row = chosen(which, step_rows)
    inverse1 = tl.load(row + 4).to(tl.float32, bitcast=True)
    inverse2 = tl.load(row + 5).to(tl.float32, bitcast=True)
    grad, exp_avg, exp_avg_sq, out = (
        chosen(which, grad), chosen(which, exp_avg), chosen(which, exp_avg_sq), chosen(which, out),
    )  # fmt: skip
    start, at, mask, block, present = blocks_of_program(program, chosen(which, numel), BLOCK, WIDTH, BLOCKS)
    exp_avg += start
    exp_avg_sq += start
    g = tl.load(grad + start + at, mask=mask, other=0).to(tl.float32)
    if HAS_FACTOR:
        g *= tl.load(chosen(which, factor))
    first = tl.load(exp_avg + at, mask=mask, other=0)
    second = tl.load(exp_avg_sq + at, mask=mask, other=0)
    if QUANTIZED:
        exp_avg_absmax, exp_avg_sq_absmax = chosen(which, exp_avg_absmax), chosen(which, exp_avg_sq_absmax)
        first_absmax = tl.load(exp_avg_absmax + block, mask=present, other=0)[:, None]
        second_absmax = tl.load(exp_avg_sq_absmax + block, mask=present, other=0)[:, None]
        first = tl.load(map1 + first.to(tl.int32)) * first_absmax
        second = tl.load(map2 + second.to(tl.int32)) * second_absmax
    first = first * beta1 + g * rest1
    second = second * beta2 + (g * g) * rest2
    direction = (first * inverse1) / (tl.sqrt(second * inverse2) + eps)
    tl.store(out + start + at, to_float(direction, out.dtype.element_ty), mask=mask)
    if QUANTIZED:
        first, second = tl.where(mask, first, 0.0), tl.where(mask, second, 0.0)
        first_absmax = tl.max(tl.abs(first), axis=1)
        second_absmax = tl.max(second, axis=1)
        tl.store(exp_avg_absmax + block, first_absmax, mask=present)
        tl.store(exp_avg_sq_absmax + block, second_absmax, mask=present)
        first *= inverse(first_absmax)[:, None]
        second *= inverse(second_absmax)[:, None]
        first = nearest_code(first, borders1, starts1, True, FIRST, INTERVALS).to(tl.uint8)
        second = nearest_code(second, borders2, starts2, False, FIRST, INTERVALS).to(tl.uint8)
    tl.store(exp_avg + at, first, mask=mask)
    tl.store(exp_avg_sq + at, second, mask=mask)


@triton.jit(do_not_specialize=["numel", "beta", "rest"])
def _momentum_kernel(
    grad, exp_avg, exp_avg_absmax, out, factor, skip, map, borders, starts, numel, beta, rest, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, QUANTIZED: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_SKIP: tl.constexpr, FIRST: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    start, at, mask, block, present = blocks_of_program(tl.program_id(0), numel, BLOCK, WIDTH, BLOCKS)
    exp_avg += start
    g = tl.load(grad + start + at, mask=mask, other=0).to(tl.float32)
    if HAS_FACTOR:
        g *= tl.load(factor)
    momentum = tl.load(exp_avg + at, mask=mask, other=0)
    if QUANTIZED:
        absmax = tl.load(exp_avg_absmax + block, mask=present, other=0)[:, None]
        momentum = tl.load(map + momentum.to(tl.int32)) * absmax
    momentum = momentum * beta + g * rest
    tl.store(out + start + at, to_float(momentum * beta + g * rest, out.dtype.element_ty), mask=mask)
    if QUANTIZED:
        momentum = tl.where(mask, momentum, 0.0)
        absmax = tl.max(tl.abs(momentum), axis=1)
        tl.store(exp_avg_absmax + block, absmax, mask=present)
        momentum *= inverse(absmax)[:, None]
        momentum = nearest_code(momentum, borders, starts, True, FIRST, INTERVALS).to(tl.uint8)
    tl.store(exp_avg + at, momentum, mask=mask)


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.adam_steps`."""

    def kind(step: AdamStep) -> tuple[object, ...]:
        formats = step.grad.dtype, step.exp_avg.dtype, step.dtype, step.betas, step.eps
        return *formats, step.factor is None

    directions = [torch.empty(step.grad.shape, dtype=step.dtype, device=step.grad.device) for step in steps]
    for indices in launches(steps, kind):
        _launch([steps[index] for index in indices], [directions[index] for index in indices], block_size, skip)
    return directions


def _launch(steps: Sequence[AdamStep], directions: Sequence[Tensor], block_size: int, skip: Tensor | None) -> None:
    """Steps of one kind."""
    grads, exp_avgs, absmaxes, exp_avg_sqs, sq_absmaxes, rows, betas, epses, factors, _ = zip(*steps, strict=True)
    device, quantized, (beta1, beta2) = grads[0].device, absmaxes[0] is not None, betas[0]
    values, how = program_of_blocks(block_size)
    both_tables = (*tables(True, device), *tables(False, device)) if quantized else (None,) * 6
    ends = tuple(itertools.accumulate(triton.cdiv(grad.numel(), values) for grad in grads))
    _adam_kernel[(ends[-1],)](
        tuple(grad.contiguous() for grad in grads), exp_avgs, absmaxes if quantized else None, exp_avg_sqs,
        sq_absmaxes if quantized else None, tuple(directions), None if factors[0] is None else factors,
        rows, tuple(grad.numel() for grad in grads), ends, skip, *both_tables, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        epses[0], QUANTIZED=quantized, HAS_FACTOR=factors[0] is not None, HAS_SKIP=skip is not None, **INTERVALS, **how,
    )  # fmt: skip


def momentum_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.momentum_steps`."""
    return [_momentum_step(step, block_size, skip) for step in steps]


def _momentum_step(step: AdamStep, block_size: int, skip: Tensor | None) -> Tensor:
    grad, absmax, factor, beta = step.grad.contiguous(), step.exp_avg_absmax, step.factor, step.betas[0]
    ahead = torch.empty(grad.shape, dtype=step.dtype, device=grad.device)
    values, how = program_of_blocks(block_size)
    table = tables(True, grad.device) if absmax is not None else (None,) * 3
    _momentum_kernel[(triton.cdiv(grad.numel(), values),)](
        grad, step.exp_avg, absmax, ahead, factor, skip, *table, grad.numel(), beta, 1.0 - beta,
        QUANTIZED=absmax is not None, HAS_FACTOR=factor is not None, HAS_SKIP=skip is not None, **INTERVALS, **how,
    )  # fmt: skip
    return ahead
