"""The one door to the arithmetic: checks arguments, chooses an implementation, and is all that the library calls.

`QGALORE_KERNELS` chooses: `reference` is plain PyTorch, on any device; `triton` the Triton kernels (on the CPU only
with `TRITON_INTERPRET=1`, for tests); `auto`, the default, Triton on CUDA where it is installed. Both give the same
bits for everything that is stored.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from qgalore.kernels import reference

_IMPLEMENTATIONS = ("auto", "reference", "triton")


def _use_triton(device: torch.device) -> bool:
    """Whether kernels run in Triton on this device; raises ValueError for an unknown `QGALORE_KERNELS`."""
    chosen = os.environ.get("QGALORE_KERNELS", "auto")
    if chosen not in _IMPLEMENTATIONS:
        raise ValueError(f"QGALORE_KERNELS={chosen!r} is unknown: it must be one of {', '.join(_IMPLEMENTATIONS)}")
    if chosen == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return chosen == "triton"


def _check_matrix(x: Tensor, name: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, not of shape {tuple(x.shape)}")


def _check_format(bits: int, group_size: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")


def random_bits16(rows: int, columns: int, seed: int, row_start: int, device: torch.device) -> Tensor:
    """16 random bits for each element of a matrix, from its position and a 64-bit seed: (rows, columns) int32.

    `row_start` is the number of the first row in the matrix that the seed belongs to.
    """
    if _use_triton(device):
        from qgalore.kernels import random_bits

        return random_bits.random_bits16(rows, columns, seed, row_start, device)
    return reference.random_bits16(rows, columns, seed, row_start, device)


def quantize(x: Tensor, bits: int, group_size: int, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a float matrix (rows, columns): stored codes, scale, zero point.

    Codes are uint8, (rows, columns) at 8 bits and packed two a byte, (rows, ceil(columns / 2)), at 4; scale and zero
    point are bfloat16, (rows, ceil(columns / group_size)). Nearest without a seed, stochastic with one.
    """
    _check_matrix(x, "x")
    _check_format(bits, group_size)
    parts = []
    for start, stop in reference.row_chunks(*x.shape):
        random = None if seed is None else random_bits16(stop - start, x.shape[1], seed, start, x.device)
        codes, scale, zero_point = reference.quantize_groups(x[start:stop], bits, group_size, random)
        parts.append((reference.pack_int4(codes) if bits == 4 else codes, scale, zero_point))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))  # type: ignore[return-value]


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, columns: int, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The float matrix (rows, columns) of stored codes, rounded once to `dtype`."""
    _check_matrix(qdata, "qdata")
    _check_format(bits, group_size)
    codes = reference.unpack_int4(qdata, columns) if bits == 4 else qdata
    return reference.dequantize_groups(codes, scale, zero_point, group_size, dtype)


def adam_step_8bit(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    block_size: int,
) -> Tensor:
    """One step of block-wise 8-bit Adam: moves the four state tensors in place and returns the direction, float32.

    grad float32 of any shape; exp_avg, exp_avg_sq uint8 like grad; the absmax tensors (ceil(numel / block_size),)
    float32; step counts from 1.
    """
    first = reference.dequantize_blocks(exp_avg, exp_avg_absmax, True, block_size)
    second = reference.dequantize_blocks(exp_avg_sq, exp_avg_sq_absmax, False, block_size)
    direction = reference.adam_direction(grad, first, second, step, betas, eps)
    for value, signed, codes, absmax in (
        (first, True, exp_avg, exp_avg_absmax),
        (second, False, exp_avg_sq, exp_avg_sq_absmax),
    ):
        new_codes, new_absmax = reference.quantize_blocks(value, signed, block_size)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
    return direction


def update_quantized_(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    direction: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    columns: int,
    bits: int,
    group_size: int,
    step_size: float,
    decay: float,
    seed: int | None,
) -> None:
    """W <- quantize(decay * W - step_size * leftᵀ N right) in place on the stored codes, scale and zero point.

    direction N is float32, (rank or rows, rank or columns); left (rank, rows) and right (rank, columns) are bases or
    None. Float32 inside, one rounding: nearest without a seed, stochastic with one.
    """
    for start, stop in reference.row_chunks(qdata.shape[0], columns):
        rows = slice(start, stop)
        weight = dequantize(qdata[rows], scale[rows], zero_point[rows], columns, bits, group_size, torch.float32)
        full = reference.project_back_rows(direction, left, right, start, stop)
        weight.mul_(decay).sub_(full, alpha=step_size)
        random = None if seed is None else random_bits16(stop - start, columns, seed, start, weight.device)
        codes, scale[rows], zero_point[rows] = reference.quantize_groups(weight, bits, group_size, random)
        qdata[rows] = reference.pack_int4(codes) if bits == 4 else codes


def update_float_(
    weight: Tensor,
    direction: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    step_size: float,
    decay: float,
    seed: int | None,
    row_start: int = 0,
) -> None:
    """W <- round(decay * W - step_size * leftᵀ N right) in place on a float tensor, float32 inside.

    With a seed a bfloat16 weight is rounded stochastically, since a nearest rounding loses every update below 1/512
    of the weight; other dtypes round to nearest. A vector is a matrix of one row; `row_start` is the number of the
    first row in the matrix that the seed belongs to.
    """
    matrix = weight.view(weight.shape[0], -1) if weight.dim() > 1 else weight.view(1, -1)
    direction = direction if left is not None or right is not None else direction.view(matrix.shape)
    for start, stop in reference.row_chunks(*matrix.shape):
        full = reference.project_back_rows(direction, left, right, start, stop)
        value = matrix[start:stop].float().mul(decay).sub_(full, alpha=step_size)
        if seed is not None and weight.dtype == torch.bfloat16:
            random = random_bits16(stop - start, matrix.shape[1], seed, row_start + start, weight.device)
            value = reference.round_stochastic_bfloat16(value, random)
        matrix[start:stop] = value


def project_back(direction: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """leftᵀ N right, float32: N itself where both bases are None."""
    if left is None and right is None:
        return direction
    rows = direction.shape[0] if left is None else left.shape[1]
    return reference.project_back_rows(direction, left, right, 0, rows)


row_chunks = reference.row_chunks
quantize_blocks = reference.quantize_blocks
dequantize_blocks = reference.dequantize_blocks
adam_direction = reference.adam_direction
