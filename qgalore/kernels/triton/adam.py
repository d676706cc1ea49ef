"""Adam's step, one of momentum alone, and block-wise 8-bit moments as such, on tensors of any shape, in Triton.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g²,  N = (m / c1) / (sqrt(v / c2) + eps)
    m <- beta m + (1 - beta) g,  N = beta m + (1 - beta) g

Layout: everything flat and contiguous; moments uint8 with a float32 absmax for each block of `block_size` values, or
float32. One program handles BLOCKS whole blocks, so that the largest magnitude of a block is found inside it. Float32
inside; the direction uses the moments before they are rounded to 8 bits, and Adam's is the only value whose division
and square root are not rounded to the last bit. The steps of a group of weights are one launch: what belongs to one of
them comes as a tuple of as many elements as there are weights.

The nearest of 256 codes is found without a search: codes lie evenly within a power of ten, so that a sum of ramps gives
it or a neighbour, and one comparison with the border between them decides.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, ceil_div, launches, next_power_of_2
from qgalore.kernels.reference.adam import dynamic_map
from qgalore.kernels.triton.tiles import PORTABLE, chosen, matrix_of_program, to_float

__all__ = ["adam_steps", "dequantize_blocks", "momentum_steps", "quantize_blocks_"]

_VALUES, _MOMENTUM_VALUES, _WARPS = 512, 1024, 1
"""Of a program: whole blocks to a warp, so that nothing goes through shared memory, and two of 256, so that what a
program does once is shared by 16 values a thread; four where a thread keeps one moment alone."""

_ZERO = tl.constexpr(127)  # the signed code of zero
_WHOLE = tl.constexpr(12582912.0)
"""1.5 * 2^23: a small number that is added to it is rounded, and is the lowest bits of the sum."""


@functools.lru_cache(maxsize=8)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of the codes, and the borders below them, of which the first is -inf: (256,) float32 each."""
    values = dynamic_map(signed, torch.device("cpu"))
    borders = torch.cat((torch.tensor([float("-inf")], device="cpu"), (values[:-1] + values[1:]) / 2))
    return values.to(device), borders.to(device)


_LOOK_UP = tl.constexpr("""{
    .reg .b64 at;
    mad.wide.s32 at, $2, 4, $1;
    ld.global.nc.f32 $0, [at];
}""")
_RAMP = tl.constexpr("fma.rn.sat.f32 $0, $1, $2, $3;")
_BYTES = tl.constexpr("""{
    .reg .b32 low, high;
    prmt.b32 low, $1, $2, 0x0040;
    prmt.b32 high, $3, $4, 0x0040;
    prmt.b32 $0, low, high, 0x5410;
}""")


@triton.jit
def _looked_up(table, index):
    """table[index], float32: for a load of scattered values Triton would deal all others anew to the threads."""
    if PORTABLE:
        return tl.load(table + index)
    else:
        table = table.to(tl.int64)
        return tl.inline_asm_elementwise(_LOOK_UP, "=f,l,r", [table, index], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _ramp(x, slope, offset):
    """slope * x + offset between 0 and 1; 0 of what is not a number."""
    if PORTABLE:
        return tl.minimum(tl.maximum(tl.fma(x, x * 0 + slope, x * 0 + offset), 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(_RAMP, "=f,f,f,f", [x, slope, offset], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _bytes(code):
    """The lowest byte of int32, as uint8."""
    if PORTABLE:
        return code.to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(_BYTES, "=r,r,r,r,r", [code], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def _code(value, inverse, borders, SIGNED: tl.constexpr):
    """The nearest code of value * inverse, which is in [-1, 1], uint8.

    Codes lie evenly within a power of ten, twice as many as in the one below. So a sum of ramps of the size, one for
    each power (the lowest two of the signed map share one), gives the code or the one above it. At most one ramp is
    neither 0 nor 1, so that the sum is rounded once.
    """
    x, size = value * inverse, tl.abs(value) * inverse
    if SIGNED:
        above = tl.fma(_ramp(size, 1 / 9e-6, 0.5 / 9), 3.0, _WHOLE + 128.0)
    else:
        above = tl.fma(_ramp(size, 1e6 / 0.9, -1 / 9), 2.0, _WHOLE + 1.0)
    for power in tl.static_range(2 if SIGNED else 1, 7):
        above = tl.fma(_ramp(size, 10.0 ** (6 - power) / 0.9, -1 / 9), 2.0 ** (power + (not SIGNED)), above)
    code = above.to(tl.int32, bitcast=True)
    if SIGNED:  # codes of negative values are mirrored
        code ^= x.to(tl.int32, bitcast=True) >> 31
    code &= 255
    code -= (_looked_up(borders, code) >= x).to(tl.int32)
    if not SIGNED:
        code = tl.maximum(code, (x > 0).to(tl.int32))
    return _bytes(code)


@triton.jit
def _inverse(absmax):
    smallest_normal = 1.1754943508222875e-38
    return tl.where(absmax >= smallest_normal, tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax), 0.0)


@triton.jit
def _blocks(program, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """A program's first value, the offsets of its values from there and which exist; its blocks and which exist."""
    program = program.to(tl.int64)
    start = program * (BLOCKS * BLOCK)
    left = tl.minimum(numel - start, BLOCKS * BLOCK).to(tl.int32)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, WIDTH)[None, :]
    # 16 neighbouring codes a thread would be another layout than that of what has 16 bits, and values would be swapped.
    at = tl.max_contiguous(at, (1, 8))
    mask = at < left
    if WIDTH > BLOCK:
        mask = mask & (tl.arange(0, WIDTH)[None, :] < BLOCK)
    first = tl.arange(0, BLOCKS)
    return start, at, mask, program * BLOCKS + first, first * BLOCK < left


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2", "eps"])
def _adam_kernel(
    grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, out, factor, step_rows, numel, ends, skip, map1,
    borders1, map2, borders2, beta1, rest1, beta2, rest2, eps, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, QUANTIZED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    row = chosen(which, step_rows)
    inverse1 = tl.load(row + 4).to(tl.float32, bitcast=True)
    inverse2 = tl.load(row + 5).to(tl.float32, bitcast=True)
    grad, exp_avg, exp_avg_sq, out = (
        chosen(which, grad), chosen(which, exp_avg), chosen(which, exp_avg_sq), chosen(which, out),
    )  # fmt: skip
    start, at, mask, block, present = _blocks(program, chosen(which, numel), BLOCK, WIDTH, BLOCKS)
    exp_avg += start
    exp_avg_sq += start
    g = tl.load(grad + start + at, mask=mask, other=0).to(tl.float32)
    if HAS_FACTOR:
        g *= tl.load(chosen(which, factor))
    first = tl.load(exp_avg + at, mask=mask, other=_ZERO if QUANTIZED else 0)
    second = tl.load(exp_avg_sq + at, mask=mask, other=0)
    if QUANTIZED:
        exp_avg_absmax, exp_avg_sq_absmax = chosen(which, exp_avg_absmax), chosen(which, exp_avg_sq_absmax)
        first_absmax = tl.load(exp_avg_absmax + block, mask=present, other=0)[:, None]
        second_absmax = tl.load(exp_avg_sq_absmax + block, mask=present, other=0)[:, None]
        first = _looked_up(map1, first.to(tl.int32)) * first_absmax
        second = _looked_up(map2, second.to(tl.int32)) * second_absmax
    first = first * beta1 + g * rest1
    second = second * beta2 + (g * g) * rest2
    direction = (first * inverse1) / (tl.sqrt(second * inverse2) + eps)
    tl.store(out + start + at, to_float(direction, out.dtype.element_ty), mask=mask)
    if QUANTIZED:
        first_absmax = tl.max(tl.abs(first), axis=1)
        second_absmax = tl.max(second, axis=1)
        tl.store(exp_avg_absmax + block, first_absmax, mask=present)
        tl.store(exp_avg_sq_absmax + block, second_absmax, mask=present)
        first = _code(first, _inverse(first_absmax)[:, None], borders1, True)
        second = _code(second, _inverse(second_absmax)[:, None], borders2, False)
    tl.store(exp_avg + at, first, mask=mask)
    tl.store(exp_avg_sq + at, second, mask=mask)


@triton.jit(do_not_specialize=["beta", "rest"])
def _momentum_kernel(
    grad, exp_avg, exp_avg_absmax, out, factor, numel, ends, skip, map, borders, beta, rest, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, QUANTIZED: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    which, program = matrix_of_program(ends)
    grad, exp_avg, out = chosen(which, grad), chosen(which, exp_avg), chosen(which, out)
    start, at, mask, block, present = _blocks(program, chosen(which, numel), BLOCK, WIDTH, BLOCKS)
    exp_avg += start
    g = tl.load(grad + start + at, mask=mask, other=0).to(tl.float32)
    if HAS_FACTOR:
        g *= tl.load(chosen(which, factor))
    momentum = tl.load(exp_avg + at, mask=mask, other=_ZERO if QUANTIZED else 0)
    if QUANTIZED:
        exp_avg_absmax = chosen(which, exp_avg_absmax)
        absmax = tl.load(exp_avg_absmax + block, mask=present, other=0)[:, None]
        momentum = _looked_up(map, momentum.to(tl.int32)) * absmax
    momentum = momentum * beta + g * rest
    tl.store(out + start + at, to_float(momentum * beta + g * rest, out.dtype.element_ty), mask=mask)
    if QUANTIZED:
        absmax = tl.max(tl.abs(momentum), axis=1)
        tl.store(exp_avg_absmax + block, absmax, mask=present)
        momentum = _code(momentum, _inverse(absmax)[:, None], borders, True)
    tl.store(exp_avg + at, momentum, mask=mask)


@triton.jit
def _quantize_blocks_kernel(
    x, codes, absmax, skip, borders, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    if HAS_SKIP:
        if tl.load(skip):
            return
    start, at, mask, block, present = _blocks(tl.program_id(0), numel, BLOCK, WIDTH, BLOCKS)
    value = tl.load(x + start + at, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    tl.store(absmax + block, largest, mask=present)
    code = _code(value, _inverse(largest)[:, None], borders, SIGNED)
    tl.store(codes + start + at, code, mask=mask)


@triton.jit
def _dequantize_blocks_kernel(
    codes, absmax, out, map, numel, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    start, at, mask, block, present = _blocks(tl.program_id(0), numel, BLOCK, WIDTH, BLOCKS)
    code = tl.load(codes + start + at, mask=mask, other=0).to(tl.int32)
    value = _looked_up(map, code) * tl.load(absmax + block, mask=present, other=0)[:, None]
    tl.store(out + start + at, to_float(value, out.dtype.element_ty), mask=mask)


def _program(block_size: int, most: int = _VALUES) -> tuple[int, dict[str, int]]:
    """Values of a program, at most so many but for one block, and how it is launched."""
    width = next_power_of_2(block_size)
    blocks = max(1, most // width)
    how = {"BLOCK": block_size, "WIDTH": width, "BLOCKS": blocks, "enable_fp_fusion": False, "num_warps": _WARPS}
    return block_size * blocks, how


def quantize_blocks_(
    codes: Tensor, absmax: Tensor, x: Tensor, signed: bool, block_size: int, skip: Tensor | None = None
) -> None:
    """See `qgalore.kernels.quantize_blocks_`."""
    values, how = _program(block_size)
    _quantize_blocks_kernel[(ceil_div(x.numel(), values),)](
        x.contiguous(), codes, absmax, skip, _tables(signed, x.device)[1], x.numel(), SIGNED=signed,
        HAS_SKIP=skip is not None, **how,
    )  # fmt: skip


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `qgalore.kernels.dequantize_blocks`."""
    value = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    values, how = _program(block_size)
    _dequantize_blocks_kernel[(ceil_div(value.numel(), values),)](
        codes, absmax, value, _tables(signed, codes.device)[0], value.numel(), **how
    )
    return value


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.adam_steps`."""
    return _in_groups(_launch_adam, steps, block_size, skip)


def momentum_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.momentum_steps`."""
    return _in_groups(_launch_momentum, steps, block_size, skip)


def _in_groups(
    launch: Callable[..., None], steps: Sequence[AdamStep], block_size: int, skip: Tensor | None
) -> list[Tensor]:
    """Call launch(steps, directions, block_size, skip) for the steps of each kind, and return all directions."""

    def kind(step: AdamStep) -> tuple[object, ...]:
        formats = step.grad.dtype, step.exp_avg.dtype, step.dtype, step.betas, step.eps
        return *formats, step.factor is None

    directions = [torch.empty(step.grad.shape, dtype=step.dtype, device=step.grad.device) for step in steps]
    for indices in launches(steps, kind):
        launch([steps[index] for index in indices], [directions[index] for index in indices], block_size, skip)
    return directions


def _launch_adam(steps: Sequence[AdamStep], directions: Sequence[Tensor], block_size: int, skip: Tensor | None) -> None:
    grads, exp_avgs, absmaxes, exp_avg_sqs, sq_absmaxes, rows, betas, epses, factors, _ = zip(*steps, strict=True)
    device, quantized, (beta1, beta2) = grads[0].device, absmaxes[0] is not None, betas[0]
    values, how = _program(block_size)
    both_tables = (*_tables(True, device), *_tables(False, device)) if quantized else (None,) * 4
    ends = _ends(grads, values)
    _adam_kernel[(ends[-1],)](
        tuple(grad.contiguous() for grad in grads), exp_avgs, absmaxes if quantized else None, exp_avg_sqs,
        sq_absmaxes if quantized else None, tuple(directions), None if factors[0] is None else factors,
        rows, tuple(grad.numel() for grad in grads), ends, skip, *both_tables, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        epses[0], QUANTIZED=quantized, HAS_FACTOR=factors[0] is not None, HAS_SKIP=skip is not None, **how,
    )  # fmt: skip


def _launch_momentum(
    steps: Sequence[AdamStep], directions: Sequence[Tensor], block_size: int, skip: Tensor | None
) -> None:
    grads, exp_avgs, absmaxes, *_, factors, _ = zip(*steps, strict=True)
    quantized, beta = absmaxes[0] is not None, steps[0].betas[0]
    values, how = _program(block_size, _MOMENTUM_VALUES)
    table = _tables(True, grads[0].device) if quantized else (None,) * 2
    ends = _ends(grads, values)
    _momentum_kernel[(ends[-1],)](
        tuple(grad.contiguous() for grad in grads), exp_avgs, absmaxes if quantized else None, tuple(directions),
        None if factors[0] is None else factors, tuple(grad.numel() for grad in grads), ends, skip, *table, beta,
        1.0 - beta, QUANTIZED=quantized, HAS_FACTOR=factors[0] is not None, HAS_SKIP=skip is not None, **how,
    )  # fmt: skip


def _ends(grads: Sequence[Tensor], values: int) -> tuple[int, ...]:
    """Programs of `values` values each up to the end of each gradient."""
    return tuple(itertools.accumulate(ceil_div(grad.numel(), values) for grad in grads))
