"""Random bits and stochastic rounding in plain PyTorch.

Stochastic rounding takes 16 random bits a value from Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011: seven rounds are the fewest that pass BigCrush) with key = seed and counter = (column // 8, row,
0, 0): one call serves eight neighbours. A value between two codes goes to floor(position + (bits + 1/2) / 2^16).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words a counter, as int64 in [0, 2^32), by Philox4x32 with the 64-bit key `seed`."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        # The 64-bit products wrap as signed integers; their bits are those of the unsigned products.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def random_bits16(rows: int, columns: int, seed: int, row_start: int, device: torch.device) -> Tensor:
    """Random integers in [0, 2^16) for the elements of a matrix, from position and seed: (rows, columns) int32.

    `row_start` is the number of the first row in the matrix that the seed belongs to.

    Element (i, j) takes half-word j % 8 of the Philox call with counter (j // 8, row_start + i, 0, 0), low ones first.
    """
    calls = (columns + 7) // 8
    c0 = torch.arange(calls, device=device, dtype=torch.int64).expand(rows, calls)
    c1 = torch.arange(row_start, row_start + rows, device=device, dtype=torch.int64)[:, None].expand(rows, calls)
    zero = torch.zeros((), device=device, dtype=torch.int64).expand(rows, calls)
    words = torch.stack(philox((c0, c1, zero, zero), seed), dim=-1)  # (rows, calls, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (rows, calls, 4, 2)
    return halves.reshape(rows, calls * 8)[:, :columns].to(torch.int32)


def round_stochastic_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 x rounded to bfloat16 up or down, by 16 random bits a value, so that the expected value is x."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + random) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def round_stochastic_float16(x: Tensor, random: Tensor) -> Tensor:
    """The same to float16, by the lower 13 of the 16 bits: the digits that float32 has beyond it.

    Below 2^-14 the steps of float16 stay 2^-24. Beside 2^-14, which is added and taken off again, 13 digits are less.
    """
    size = x.abs()
    added = (size < _SMALLEST_NORMAL_FLOAT16) * _SMALLEST_NORMAL_FLOAT16
    bits = (size + added).view(torch.int32)
    rounded = ((bits + (random & 0x1FFF)) & -0x2000).view(torch.float32) - added
    return torch.where(x.isfinite(), rounded.copysign(x), x).half()


def round_stochastic(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x rounded stochastically to a type of 16 bits."""
    return (round_stochastic_float16 if dtype == torch.float16 else round_stochastic_bfloat16)(x, random)
