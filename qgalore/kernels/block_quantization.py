"""The door to block-wise 8-bit values, of which Adam's moments are made, as whole tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qgalore.kernels import reference
from qgalore.kernels.implementation import triton_or_none

PART = 1 << 20
"""Values that plain PyTorch reads or writes at a time, in whole blocks: what it makes of a part beside it is small."""


def quantize_blocks_(
    codes: Tensor, absmax: Tensor, x: Tensor, signed: bool, block_size: int, skip: Tensor | None = None
) -> None:
    """Write float values x, of any strides, in 8 bits; where the flag `skip` on the device is true nothing changes.

    codes uint8 of the shape of x, contiguous; absmax (ceil(numel / block_size),) float32, the largest magnitude of each
    block of the flattened x. Each value takes the nearest code of bitsandbytes' dynamic map, but an unsigned one above
    zero never becomes zero. Raises ValueError for codes of another shape or an absmax of another length.
    """
    if codes.shape != x.shape or absmax.numel() != -(-x.numel() // block_size):
        raise ValueError(f"codes {tuple(codes.shape)} and {absmax.numel()} blocks do not hold x {tuple(x.shape)}")
    triton = triton_or_none(x.device, "adam")
    if triton is not None:
        triton.quantize_blocks_(codes, absmax, x, signed, block_size, skip)
        return
    for part_x, *places in _parts(block_size, x.contiguous(), codes, absmax):
        for place, new in zip(places, reference.quantize_blocks(part_x, signed, block_size), strict=True):
            place.copy_(new if skip is None else torch.where(skip, place, new))


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of `quantize_blocks_`, shaped like codes (contiguous), rounded once to `dtype`."""
    triton = triton_or_none(codes.device, "adam")
    if triton is not None:
        return triton.dequantize_blocks(codes, absmax, signed, block_size, dtype)  # type: ignore[no-any-return]
    value = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, part_codes, part_absmax in _parts(block_size, value, codes, absmax):
        part.copy_(reference.dequantize_blocks(part_codes, part_absmax, signed, block_size))
    return value


def _parts(block_size: int, value: Tensor, codes: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flat views of values, their codes and absmax, of some whole blocks each."""
    blocks = max(1, PART // block_size)
    parts = (tensor.view(-1).split(blocks * block_size) for tensor in (value, codes))
    return zip(*parts, absmax.split(blocks), strict=True)
