"""16 random bits for each element of a matrix, in Triton: the bits of `reference.random_bits16`.

Element (i, j) takes half-word j % 8 of Philox4x32-10 with key = seed and counter = (j // 8, row_start + i, 0, 0). One
program makes BLOCK calls of one row and writes 8 * BLOCK neighbours. In plain PyTorch the ten rounds are 150 launches,
which for the small weights of a model cost more than everything else in an update.

out: int32 (rows, columns), contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["seed_low", "seed_high", "row_start"])
def _random_bits16_kernel(out, columns, seed_low, seed_high, row_start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    call = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = call * 0
    low, high = seed_low.to(tl.uint32).to(tl.uint64), seed_high.to(tl.uint32).to(tl.uint64)
    words = tl.philox((high << 32) | low, call, zero + (row_start + row).to(tl.int32), zero, zero)
    for lane in tl.static_range(8):
        half = (words[lane // 2].to(tl.uint32, bitcast=True) >> (16 * (lane % 2))) & 0xFFFF
        column = call * 8 + lane
        tl.store(out + row.to(tl.int64) * columns + column, half.to(tl.int32), mask=column < columns)


def random_bits16(rows: int, columns: int, seed: int, row_start: int, device: torch.device) -> Tensor:
    """See `qgalore.kernels.random_bits16`."""
    out = torch.empty(rows, columns, dtype=torch.int32, device=device)
    calls = triton.cdiv(columns, 8)
    block = min(128, triton.next_power_of_2(calls))
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    _random_bits16_kernel[(rows, triton.cdiv(calls, block))](out, columns, low, high, row_start, BLOCK=block)
    return out
