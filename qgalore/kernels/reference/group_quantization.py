"""Group quantization in plain PyTorch.

A matrix is cut along each row into groups of `group_size` values; the last group of a row may be shorter and no group
straddles rows. A group stores codes 0 .. 2^bits - 1, a scale and a zero point, the value of code 0:

    value = code * scale + zero_point

Scale and zero point are bfloat16, rounded before the codes are computed: the zero point down and the scale up, so that
the codes cover the group and nothing is clamped. Since a code has at most 8 significant
bits and so has the scale, `code * scale` is exact in float32: a fused multiply-add gives the same bits as a product
followed by a sum, and a kernel can be held to `torch.equal`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import QuantizedMatrix, StepScalars
from qgalore.kernels.reference.random_bits import random_bits16
from qgalore.kernels.reference.rows import row_chunks

__all__ = ["dequantize", "quantize"]

SMALLEST_NORMAL = 2.0**-126
_BFLOAT16_MAX = 3.3895313892515355e38
_HALF_ULP = 2.0**-24


def _round_down_to_bfloat16(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits) & -0x10000
    return bits.view(torch.float32).clamp(-_BFLOAT16_MAX, _BFLOAT16_MAX)


def _round_up_to_bfloat16(x: Tensor) -> Tensor:
    """The same for x >= 0, upwards."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _group_bounds(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each group: (rows, groups) twice."""
    rows, columns = x.shape
    whole = columns // group_size * group_size
    low, high = x[:, :whole].reshape(rows, -1, group_size).aminmax(dim=2) if whole else (x[:, :0], x[:, :0])
    if whole < columns:
        tail_low, tail_high = x[:, whole:].aminmax(dim=1, keepdim=True)
        low, high = torch.cat((low, tail_low), dim=1), torch.cat((high, tail_high), dim=1)
    return low, high


def _spread(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """(rows, groups) -> (rows, columns): each group's value at its columns."""
    return per_group.float().repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_groups(x: Tensor, bits: int, group_size: int, random: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, columns) uint8 (one a byte), scale and zero point (rows, groups) bfloat16 of the float matrix x.

    Nearest rounding without random bits: |value - x| <= scale / 2. Stochastic with 16 of them for each value, as
    `random_bits16` gives them: the expected value is x, |value - x| < scale.
    """
    x = x.float()
    columns = x.shape[1]
    levels = (1 << bits) - 1
    low, high = _group_bounds(x, group_size)
    zero_point = _round_down_to_bfloat16(low)
    # Halved, so that the range of a group up to 3.4e38 does not overflow; a wider one dequantizes to infinity.
    exact = (high * 0.5 - zero_point * 0.5) * (2.0 / levels)
    # Less by what float32 cannot tell: else the rounding of a dequantized end would widen the group at every update.
    slack = torch.maximum(high.abs(), zero_point.abs()) * (_HALF_ULP / levels) + exact * (4 * _HALF_ULP)
    scale = _round_up_to_bfloat16((exact - slack).clamp_min(0.0))
    scale = torch.where(exact > 0, scale.clamp_min(SMALLEST_NORMAL), 0.0)
    # One division a group instead of one a value; of a scale of at least 2^-126 the inverse is finite.
    inverse = _spread(1.0 / torch.where(scale > 0, scale, 1.0), columns, group_size)
    position = (x - _spread(zero_point, columns, group_size)) * inverse
    # Everything is one higher than the code: of 1 to 2 a kernel makes a random float from its bits.
    above = position.add_(1.5 if random is None else (random.float() + 0.5) * 2.0**-16 + 1.0)
    return above.clamp_(max=levels + 1).sub_(1).to(torch.uint8), scale.bfloat16(), zero_point.bfloat16()


def dequantize_groups(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """code * scale + zero_point in float32, rounded once to `dtype`: (rows, columns)."""
    columns = codes.shape[1]
    value = codes.float().mul_(_spread(scale, columns, group_size)).add_(_spread(zero_point, columns, group_size))
    return value.to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """(rows, columns) uint8 of 0..15 -> (rows, ceil(columns / 2)): even columns in the low half of a byte."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_int4` for a matrix of `columns` columns."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], 2 * packed.shape[1])[:, :columns]


def quantize(
    x: Tensor, bits: int, group_size: int, row: Tensor | None, row_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qgalore.kernels.quantize`."""
    seed = None if row is None else StepScalars.unpack(row).seed
    chunks = row_chunks(*x.shape) or [(0, 0)]  # of a matrix without rows
    parts = [quantize_chunk(x[start:stop], bits, group_size, seed, row_start + start) for start, stop in chunks]
    # PyTorch lays them out as x is, and kernels read rows.
    qdata, scale, zero_point = (
        tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors) for tensors in zip(*parts, strict=True)
    )
    return qdata, scale, zero_point


def quantize_chunk(
    x: Tensor, bits: int, group_size: int, seed: int | None, row_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` of some rows of a matrix, of which the first has the number `row_start`."""
    random = None if seed is None else random_bits16(len(x), x.shape[1], seed, row_start, x.device)
    codes, scale, zero_point = quantize_groups(x, bits, group_size, random)
    return pack_int4(codes) if bits == 4 else codes, scale, zero_point


def dequantize(matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> list[Tensor]:
    """See `qgalore.kernels.dequantize`."""
    return [_dequantize(matrix, dtype) for matrix in matrices]


def _dequantize(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    qdata, scale, zero_point, columns, bits, group_size, out = matrix
    codes = unpack_int4(qdata, columns) if bits == 4 else qdata[:, :columns]
    value = dequantize_groups(codes, scale, zero_point, group_size, dtype)
    if out is None:
        return value
    out.zero_()
    out[: len(qdata), :columns] = value
    return out
