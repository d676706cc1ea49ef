"""‖g‖² of a gradient and whether it is finite, in Triton: two launches for a matrix of any size.

Layout: g flat and contiguous, any float dtype. The first kernel leaves one float32 sum a program, the second adds them
in a fixed order (no atomics: the same bits each time) and raises the flag where the sum is not finite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024


@triton.jit(do_not_specialize=["numel"])
def _partial_sums_kernel(grad, sums, numel, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * STEPS * BLOCK + tl.arange(0, BLOCK)
    for step in range(STEPS):
        at = start + step * BLOCK
        value = tl.load(grad + at, mask=at < numel, other=0).to(tl.float32)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _finish_kernel(sums, squared_norm, skip, count, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    total = tl.sum(tl.load(sums + at, mask=at < count, other=0.0), axis=0)
    tl.store(squared_norm, total)
    if (total < float("inf")) == 0:
        tl.store(skip, 1)


def check_gradient_(grad: Tensor, squared_norm: Tensor, skip: Tensor) -> None:
    """See `qgalore.kernels.check_gradient_`."""
    grad = grad.contiguous()
    block = 2048
    steps = triton.next_power_of_2(max(1, triton.cdiv(grad.numel(), block * _PROGRAMS)))
    programs = max(1, triton.cdiv(grad.numel(), block * steps))
    sums = torch.empty(programs, dtype=torch.float32, device=grad.device)
    _partial_sums_kernel[(programs,)](grad, sums, grad.numel(), STEPS=steps, BLOCK=block, num_warps=8)
    _finish_kernel[(1,)](sums, squared_norm, skip.view(torch.uint8), programs, WIDTH=triton.next_power_of_2(programs))
