"""Block-wise 8-bit values on tensors of any shape, in Triton.

Layout: everything flat and contiguous; codes uint8 with a float32 absmax for each block of `block_size` values. One
program handles BLOCKS whole blocks, so that the largest magnitude of a block is found inside it. Float32 inside.

The nearest of 256 codes is found without a search: the upper 16 bits of |x| choose an entry of a table that holds the
lowest code of that interval, in which at most one border between two codes lies; one comparison with it decides.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.reference.block_quantization import dynamic_map
from qgalore.kernels.triton.tiles import to_float

__all__ = ["dequantize_blocks", "quantize_blocks_"]

# Intervals of |x|: seven bits of mantissa for each exponent from 2^-24 to below 1, and 1 itself.
_FIRST_INTERVAL = (127 - 24) << 7
_INTERVALS = 24 * 128 + 1
INTERVALS = {"FIRST": _FIRST_INTERVAL, "INTERVALS": _INTERVALS}

_VALUES, _WARPS = 256, 1
"""Of a program: a block to a warp, in which its largest value is found. us for a layer of 1B (H100): 60, and 64 to 80
for two to eight times as many values in one to eight warps."""


@functools.lru_cache(maxsize=8)
def tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the codes and borders between them, (256,) float32; the lowest code of each interval, uint8.

    In bytes, because the entries that a warp looks up lie in as many cache lines as they are wide.
    """
    values = dynamic_map(signed, torch.device("cpu"))
    middle = (values[:-1] + values[1:]) / 2
    bits = (torch.arange(_INTERVALS, dtype=torch.int32) + _FIRST_INTERVAL) << 16
    low, high = bits.view(torch.float32).clone(), (bits + 0xFFFF).view(torch.float32)
    low[0], high[-1] = 0.0, 1.0
    starts = [torch.bucketize(low, middle), torch.bucketize(-high, middle)]
    ends = [torch.bucketize(high, middle), torch.bucketize(-low, middle)]
    start, end = torch.cat(starts), torch.cat(ends)
    assert bool((end - start <= 1).all()), "two borders between codes in one interval"
    borders = torch.cat((middle, torch.tensor([float("inf")])))
    return values.to(device), borders.to(device), start.to(torch.uint8).to(device)


@triton.jit
def nearest_code(x, borders, starts, SIGNED: tl.constexpr, FIRST: tl.constexpr, INTERVALS: tl.constexpr):
    """The nearest code of x in [-1, 1]."""
    interval = (tl.abs(x).to(tl.int32, bitcast=True) >> 16) - FIRST
    interval = tl.minimum(tl.maximum(interval, 0), INTERVALS - 1)
    if SIGNED:
        interval += tl.where(x < 0, INTERVALS, 0)
    low = tl.load(starts + interval).to(tl.int32)
    code = low + (tl.load(borders + low) < x).to(tl.int32)
    if not SIGNED:
        code = tl.maximum(code, (x > 0).to(tl.int32))
    return code


@triton.jit
def inverse(absmax):
    smallest_normal = 1.1754943508222875e-38
    return tl.where(absmax >= smallest_normal, tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax), 0.0)


@triton.jit
def blocks_of_program(program, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """A program's first value, the offsets of its values from there and which exist; its blocks and which exist."""
    program = program.to(tl.int64)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, WIDTH)[None, :]
    start = program * (BLOCKS * BLOCK)
    mask = at < numel - start
    if WIDTH > BLOCK:
        mask = mask & (tl.arange(0, WIDTH)[None, :] < BLOCK)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    return start, at, mask, block, block * BLOCK < numel


@triton.jit
def _quantize_blocks_kernel(
    x, codes, absmax, skip, map, borders, starts, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr, HAS_SKIP: tl.constexpr, FIRST: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    start, at, mask, block, present = blocks_of_program(tl.program_id(0), numel, BLOCK, WIDTH, BLOCKS)
    value = tl.load(x + start + at, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    tl.store(absmax + block, largest, mask=present)
    code = nearest_code(value * inverse(largest)[:, None], borders, starts, SIGNED, FIRST, INTERVALS)
    tl.store(codes + start + at, code.to(tl.uint8), mask=mask)


@triton.jit
def _dequantize_blocks_kernel(
    codes, absmax, out, map, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    start, at, mask, block, present = blocks_of_program(tl.program_id(0), numel, BLOCK, WIDTH, BLOCKS)
    code = tl.load(codes + start + at, mask=mask, other=0).to(tl.int32)
    value = tl.load(map + code) * tl.load(absmax + block, mask=present, other=0)[:, None]
    tl.store(out + start + at, to_float(value, out.dtype.element_ty), mask=mask)


def program_of_blocks(block_size: int) -> tuple[int, dict[str, int]]:
    """Values of a program, and how it is launched."""
    width = triton.next_power_of_2(block_size)
    blocks = max(1, _VALUES // width)
    how = {"BLOCK": block_size, "WIDTH": width, "BLOCKS": blocks, "enable_fp_fusion": False, "num_warps": _WARPS}
    return block_size * blocks, how


def quantize_blocks_(
    codes: Tensor, absmax: Tensor, x: Tensor, signed: bool, block_size: int, skip: Tensor | None = None
) -> None:
    """See `qgalore.kernels.quantize_blocks_`."""
    values, how = program_of_blocks(block_size)
    _quantize_blocks_kernel[(triton.cdiv(x.numel(), values),)](
        x.contiguous(), codes, absmax, skip, *tables(signed, x.device), x.numel(), SIGNED=signed,
        HAS_SKIP=skip is not None, **INTERVALS, **how,
    )  # fmt: skip


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `qgalore.kernels.dequantize_blocks`."""
    value = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    values, how = program_of_blocks(block_size)
    _dequantize_blocks_kernel[(triton.cdiv(value.numel(), values),)](
        codes, absmax, value, tables(signed, codes.device)[0], value.numel(), **how
    )
    return value
