"""‖g‖² of gradients and whether they are finite, in Triton: two launches for several matrices of any size.

Layout: each g flat and contiguous, all of one float dtype. The first kernel leaves one float32 sum a program in the row
of the gradient, the second adds a row in a fixed order (no atomics: the same bits each time, whatever the others are)
and raises the flag where the sum is not finite. Rows have one width, since the order in which a program adds depends on
what the compiler knows of the address.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div, launches, next_power_of_2
from qgalore.kernels.triton.tiles import chosen, matrix_of_program

__all__ = ["check_gradients_"]

_BLOCK = 2048
SUMS = 1024
"""Programs for one matrix, at most."""
_GROUP_LIMIT = 16  # gradients of a launch: those of a decoder layer


@triton.jit
def _partial_sums_kernel(grads, sums, numel, steps, ends, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    which, program = matrix_of_program(ends)
    grad, numel, steps = chosen(which, grads), chosen(which, numel), chosen(which, steps)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = program.to(tl.int64) * steps * BLOCK + tl.arange(0, BLOCK)
    for step in range(steps):
        at = start + step * BLOCK
        value = tl.load(grad + at, mask=at < numel, other=0).to(tl.float32)
        total += value * value
    tl.store(sums + which * WIDTH + program, tl.sum(total, axis=0))


@triton.jit
def _finish_kernel(sums, squared_norms, indices, counts, skip, WIDTH: tl.constexpr):
    which = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    values = tl.load(sums + which * WIDTH + at, mask=at < chosen(which, counts), other=0.0)
    total = tl.sum(values, axis=0)
    tl.store(squared_norms + (chosen(which, indices) >> 1) - 1, total)
    if (total < float("inf")) == 0:
        tl.store(skip, 1)


def check_gradients_(grads: Sequence[Tensor], squared_norms: Tensor, indices: Sequence[int], skip: Tensor) -> None:
    """See `qgalore.kernels.check_gradients_`."""
    for alike in launches(grads, lambda grad: grad.dtype, _GROUP_LIMIT):
        _launch([grads[i].contiguous() for i in alike], squared_norms, [indices[i] for i in alike], skip)


def _launch(grads: Sequence[Tensor], squared_norms: Tensor, indices: Sequence[int], skip: Tensor) -> None:
    """Gradients of one dtype."""
    sums, counts = partial_sums(grads)
    # For numbers that are 1 or multiples of 16 Triton would compile again, and indices differ from layer to layer.
    odd = tuple(2 * index + 3 for index in indices)
    _finish_kernel[(len(grads),)](sums, squared_norms, odd, counts, skip.view(torch.uint8), WIDTH=SUMS)


def partial_sums(matrices: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Sums of squares, rows (count, SUMS) float32, and how many of each row there are.

    matrices: contiguous, at most `_GROUP_LIMIT` of one dtype.
    """
    numel = tuple(matrix.numel() for matrix in matrices)
    steps = tuple(next_power_of_2(max(1, ceil_div(count, _BLOCK * SUMS))) for count in numel)
    counts = tuple(max(1, ceil_div(count, _BLOCK * step)) for count, step in zip(numel, steps, strict=True))
    ends = tuple(itertools.accumulate(counts))
    sums = torch.empty(len(matrices), SUMS, dtype=torch.float32, device=matrices[0].device)
    _partial_sums_kernel[(ends[-1],)](tuple(matrices), sums, numel, steps, ends, BLOCK=_BLOCK, WIDTH=SUMS, num_warps=8)
    return sums, counts
