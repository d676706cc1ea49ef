"""Steps of Adam with one second moment a row, and the updates of float weights by them, in Triton.

    q_i = mean g_ij²,    v_i <- beta2 v_i + (1 - beta2) q_i,    N_ij = m_ij / (ahead (sqrt(v_i / c2) + eps))

with Nesterov's momentum m, which `adam.momentum_steps` moves first: its blocks of 8 bits may straddle rows. Without a
bias it is m / ahead, with ahead = 1 - beta1^(step + 1) by the first bias correction of the step row; c2 is the second.
So there are two launches for a group of matrices.

Layout: gradient, momentum (float32) and direction N (rows, columns) contiguous; v (rows,) float32. Float32 inside. One
program handles a row: it reads the gradient, then the momentum, in the place of which N may be.

A row is summed in one order, whatever rows and matrices are beside it: ranks have other rows of an embedding. That
order is the compiler's, by how many neighbouring values it knows a thread to be able to read at once; so by the tile,
by the dtype, by whether the width is a multiple of 16 and, if it is, by the address.

A weight whose rows are of whole blocks of an 8-bit momentum is updated in one launch, with the bits of the two and of
`float_update.update_float_`: momentum and direction stay in registers, so that of 26 bytes a value, in bfloat16, 8 are
moved. A program sums the squares of its row as ever, then goes through it again, with the gradient from the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, RowAdamUpdate, launches, next_power_of_2
from qgalore.kernels.triton.adam import ZERO_CODE, code_tables, looked_up, momentum_steps, quantized_blocks
from qgalore.kernels.triton.float_update import leaves_all, update_float_, updated_and_rounded
from qgalore.kernels.triton.tiles import chosen, matrix_of_program, read_step_row, to_float

__all__ = ["fuses_row_adam", "row_adam_steps", "row_adam_update_"]

_TILE = 2048  # values that a program reads at a time, at most
_VALUES = 512  # of them those of a warp
_ALIGNED = 16  # widths, and addresses in bytes, that are multiples of it are known to the compiler as such
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _read(grad, column, columns, multiplier, HAS_FACTOR: tl.constexpr):
    """Values of a row of the gradient, float32; 0 beyond its end."""
    g = tl.load(grad + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        g *= multiplier
    return g


@triton.jit
def _scale_of_row(
    grad, second, step_row, multiplier, columns, beta1, beta2, rest2, eps, N: tl.constexpr, HAS_FACTOR: tl.constexpr
):
    """What the momentum of a row is multiplied with, whose second moment is moved."""
    kept = tl.load(second)
    total = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, columns, N):
        g = _read(grad, start + tl.arange(0, N), columns, multiplier, HAS_FACTOR)
        total += g * g
    square = tl.div_rn(tl.sum(total, axis=0), columns * 1.0)
    moved = kept * beta2 + square * rest2
    tl.debug_barrier()  # every thread has read it, and one writes it
    tl.store(second, moved)
    inverse1 = tl.load(step_row + 4).to(tl.float32, bitcast=True)
    inverse2 = tl.load(step_row + 5).to(tl.float32, bitcast=True)
    ahead = 1.0 - beta1 * (1.0 - tl.div_rn(1.0, inverse1))
    return tl.div_rn(1.0, ahead * (tl.sqrt_rn(moved * inverse2) + eps))


@triton.jit(do_not_specialize=["beta1", "beta2", "rest2", "eps"])
def _row_adam_kernel(
    grad, momentum, second, out, factor, step_rows, columns, ends, skip, beta1, beta2, rest2, eps,
    N: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, row = matrix_of_program(ends)
    columns, second, step_row = chosen(which, columns), chosen(which, second) + row, chosen(which, step_rows)
    first = row.to(tl.int64) * columns
    grad, momentum, out = chosen(which, grad) + first, chosen(which, momentum) + first, chosen(which, out) + first
    multiplier = 1.0
    if HAS_FACTOR:
        multiplier = tl.load(chosen(which, factor))
    scale = _scale_of_row(grad, second, step_row, multiplier, columns, beta1, beta2, rest2, eps, N, HAS_FACTOR)
    # Of the same tile Triton would read 32 bytes a thread, too, and swap values between threads to write 16.
    for start in range(0, columns, N // 2):
        column = start + tl.arange(0, N // 2)
        value = tl.load(momentum + column, mask=column < columns, other=0.0) * scale
        tl.store(out + column, to_float(value, out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["row_start", "beta1", "rest1", "beta2", "rest2", "eps"])
def _row_adam_update_kernel(
    grad, exp_avg, exp_avg_absmax, second, weight, factor, step_rows, columns, ends, skip, map, borders, row_start,
    beta1, rest1, beta2, rest2, eps, DIRECTION: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, row = matrix_of_program(ends)
    columns, second, step_row = chosen(which, columns), chosen(which, second) + row, chosen(which, step_rows)
    first = row.to(tl.int64) * columns
    grad, exp_avg, weight = chosen(which, grad) + first, chosen(which, exp_avg) + first, chosen(which, weight) + first
    absmax = chosen(which, exp_avg_absmax) + first // BLOCK
    at = tl.arange(0, N // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = tl.max_contiguous(at, (1, 8))  # as in `adam._blocks`
    scalars = read_step_row(step_row)
    moves = not leaves_all(scalars)
    multiplier = 1.0
    if HAS_FACTOR:
        multiplier = tl.load(chosen(which, factor))
    scale = _scale_of_row(grad, second, step_row, multiplier, columns, beta1, beta2, rest2, eps, N, HAS_FACTOR)
    for start in range(0, columns, N):
        column, block = start + at, start // BLOCK + tl.arange(0, N // BLOCK)
        mask, present = column < columns, block * BLOCK < columns
        value = tl.load(weight + column, mask=mask, other=0).to(tl.float32)
        momentum = looked_up(map, tl.load(exp_avg + column, mask=mask, other=ZERO_CODE).to(tl.int32))
        momentum *= tl.load(absmax + block, mask=present, other=0)[:, None]
        g = _read(grad, column, columns, multiplier, HAS_FACTOR)
        momentum = momentum * beta1 + g * rest1
        direction = to_float((momentum * beta1 + g * rest1) * scale, DIRECTION).to(tl.float32)
        value = updated_and_rounded(
            value, direction, scalars, row_start + row, (block * BLOCK)[:, None], BLOCK, weight.dtype.element_ty,
            STOCHASTIC,
        )  # fmt: skip
        tl.store(weight + column, value, mask=mask & moves)
        code = quantized_blocks(momentum, absmax + block, present, borders, True)
        tl.store(exp_avg + column, code, mask=mask)


def row_adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.row_adam_steps`."""
    steps = [step._replace(grad=_aligned(step.grad)) for step in steps]
    momenta = momentum_steps([step._replace(dtype=torch.float32) for step in steps], block_size, skip)
    directions = [
        momentum if step.dtype == torch.float32 else torch.empty_like(momentum, dtype=step.dtype)
        for step, momentum in zip(steps, momenta, strict=True)
    ]

    def kind(step: AdamStep) -> tuple[object, ...]:
        columns = step.grad.shape[1]
        of_values = step.grad.dtype, step.dtype, step.betas, step.eps, step.factor is None
        return *of_values, _width(columns), columns % _ALIGNED == 0

    for indices in launches(steps, kind):
        of_each = [momenta[index] for index in indices], [directions[index] for index in indices]
        _launch([steps[index] for index in indices], *of_each, skip)
    return directions


def _aligned(grad: Tensor) -> Tensor:
    """The gradient, contiguous; from an address that is a multiple of 16 bytes where its width lets all rows have one.

    What is allocated is so already, and so are views of some of its rows; one in a buffer of many may not be.
    """
    grad = grad.contiguous()
    return grad.clone() if grad.shape[1] % _ALIGNED == 0 and grad.data_ptr() % _ALIGNED else grad


def _width(columns: int) -> int:
    """Values of a row that a program reads at a time."""
    return min(_TILE, max(32, next_power_of_2(columns)))


def _launch(
    steps: Sequence[AdamStep], momenta: Sequence[Tensor], directions: Sequence[Tensor], skip: Tensor | None
) -> None:
    grads, _, _, seconds, _, step_rows, ((beta1, beta2), *_), (eps, *_), factors, _ = zip(*steps, strict=True)
    rows, columns = zip(*(grad.shape for grad in grads), strict=True)
    ends, width = tuple(itertools.accumulate(rows)), _width(columns[0])
    _row_adam_kernel[(ends[-1],)](
        grads, tuple(momenta), seconds, tuple(directions), None if factors[0] is None else factors, step_rows, columns,
        ends, skip, beta1, beta2, 1.0 - beta2, eps, N=width, HAS_FACTOR=factors[0] is not None,
        HAS_SKIP=skip is not None, enable_fp_fusion=False, num_warps=max(1, width // _VALUES),
    )  # fmt: skip


def row_adam_update_(updates: Sequence[RowAdamUpdate], block_size: int, skip: Tensor | None) -> None:
    """See `qgalore.kernels.row_adam_update_`."""
    fused = [update for update in updates if fuses_row_adam(update.step, block_size)]
    apart = [update for update in updates if not fuses_row_adam(update.step, block_size)]

    def kind(update: RowAdamUpdate) -> tuple[object, ...]:
        step = update.step
        of_values = step.grad.dtype, step.dtype, update.weight.dtype, step.betas, step.eps, step.factor is None
        return *of_values, update.row_start, _width(step.grad.shape[1])

    for indices in launches(fused, kind):
        _launch_update([fused[index] for index in indices], block_size, skip)
    if apart:
        directions = row_adam_steps([update.step for update in apart], block_size, skip)
        update_float_([update.with_direction(x) for update, x in zip(apart, directions, strict=True)], skip)


def fuses_row_adam(step: AdamStep, block_size: int) -> bool:
    """See `qgalore.kernels.fuses_row_adam`; of a gradient that can be read where it is."""
    grad, whole = step.grad, step.grad.shape[1] % block_size == 0 and block_size == next_power_of_2(block_size)
    readable = grad.is_contiguous() and grad.data_ptr() % _ALIGNED == 0
    return whole and readable and grad.numel() > 0 and step.exp_avg_absmax is not None and step.dtype in _TYPES


def _launch_update(updates: Sequence[RowAdamUpdate], block_size: int, skip: Tensor | None) -> None:
    weights, steps, (row_start, *_) = zip(*updates, strict=True)
    grads, exp_avgs, absmaxes, seconds, _, step_rows, (betas, *_), (eps, *_), factors, (dtype, *_) = zip(
        *steps, strict=True
    )
    rows, columns = zip(*(grad.shape for grad in grads), strict=True)
    ends, width, (beta1, beta2) = tuple(itertools.accumulate(rows)), _width(columns[0]), betas
    _row_adam_update_kernel[(ends[-1],)](
        grads, exp_avgs, absmaxes, seconds, weights, None if factors[0] is None else factors, step_rows, columns, ends,
        skip, *code_tables(True, grads[0].device), row_start, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps,
        DIRECTION=_TYPES[dtype], N=width, BLOCK=block_size, STOCHASTIC=weights[0].dtype != torch.float32,
        HAS_FACTOR=factors[0] is not None, HAS_SKIP=skip is not None, enable_fp_fusion=False,
        num_warps=max(1, width // _VALUES),
    )  # fmt: skip
