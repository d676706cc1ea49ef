"""Steps of Adam with one second moment a row, in Triton.

    q_i = mean g_ij²,    v_i <- beta2 v_i + (1 - beta2) q_i,    N_ij = m_ij / (ahead (sqrt(v_i / c2) + eps))

with Nesterov's momentum m, which `adam.momentum_steps` moves first: its blocks of 8 bits may straddle rows. Without a
bias it is m / ahead, with ahead = 1 - beta1^(step + 1) by the first bias correction of the step row; c2 is the second.
So there are two launches for a group of matrices.

Layout: gradient, momentum (float32) and direction N (rows, columns) contiguous; v (rows,) float32. Float32 inside. One
program handles a row: it reads the gradient, then the momentum, in the place of which N may be.

A row is summed in one order, whatever rows and matrices are beside it: ranks have other rows of an embedding. That
order is the compiler's, by how many neighbouring values it knows a thread to be able to read at once; so by the tile,
by the dtype, by whether the width is a multiple of 16 and, if it is, by the address.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, launches, next_power_of_2
from qgalore.kernels.triton.adam import momentum_steps
from qgalore.kernels.triton.tiles import chosen, matrix_of_program, to_float

__all__ = ["row_adam_steps"]

_TILE = 2048  # values that a program reads at a time, at most
_VALUES = 512  # of them those of a warp
_ALIGNED = 16  # widths, and addresses in bytes, that are multiples of it are known to the compiler as such


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
    if HAS_FACTOR:
        multiplier = tl.load(chosen(which, factor))
    kept = tl.load(second)
    total = tl.zeros((N,), dtype=tl.float32)
    for start in range(0, columns, N):
        column = start + tl.arange(0, N)
        g = tl.load(grad + column, mask=column < columns, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            g *= multiplier
        total += g * g
    square = tl.div_rn(tl.sum(total, axis=0), columns * 1.0)
    moved = kept * beta2 + square * rest2
    tl.debug_barrier()  # every thread has read it, and one writes it
    tl.store(second, moved)
    inverse1 = tl.load(step_row + 4).to(tl.float32, bitcast=True)
    inverse2 = tl.load(step_row + 5).to(tl.float32, bitcast=True)
    ahead = 1.0 - beta1 * (1.0 - tl.div_rn(1.0, inverse1))
    scale = tl.div_rn(1.0, ahead * (tl.sqrt_rn(moved * inverse2) + eps))
    # Of the same tile Triton would read 32 bytes a thread, too, and swap values between threads to write 16.
    for start in range(0, columns, N // 2):
        column = start + tl.arange(0, N // 2)
        value = tl.load(momentum + column, mask=column < columns, other=0.0) * scale
        tl.store(out + column, to_float(value, out.dtype.element_ty), mask=column < columns)


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
