"""What Triton kernels share: random bits, group quantization and stochastic rounding of one tile.

A tile is (M, G): M rows and one group of G columns, so that the group's smallest and largest value are found inside
it. G is a power of two; a group that is shorter, or the ragged last one of a row, is masked. All arithmetic is float32,
in the order of `reference`, and must be compiled with `enable_fp_fusion=False`: then the bits are the same.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
PORTABLE = tl.constexpr(_INTERPRETED or torch.version.hip is not None)
"""Whether to do without instructions of NVIDIA: in the interpreter, and on AMD."""


@triton.jit
def chosen(which, values):
    """The element of a tuple with a number that is known when the kernel runs; pointers keep their alignment."""
    value = values[0]
    for index in tl.static_range(1, len(values)):
        value = tl.where(which == index, values[index], value)
    return value


@triton.jit
def matrix_of_program(ends):
    """The matrix that this program works on, and its number among the programs of that matrix.

    ends: a tuple of the programs up to the end of each matrix.
    """
    program = tl.program_id(0)
    which, start = program * 0, program * 0
    for index in tl.static_range(len(ends) - 1):
        behind = program >= ends[index]
        which += behind.to(tl.int32)
        start = tl.where(behind, ends[index], start)
    return which, program - start


@triton.jit
def random_bits16(row, start, seed_low, seed_high, G: tl.constexpr):
    """(M, G) uint32 of 16 random bits as in `reference.random_bits`; row (M, 1) int32, start a multiple of 8."""
    call = start // 8 + tl.arange(0, G // 8)[None, :]
    counter = call + row * 0
    zero = counter * 0
    low, high = seed_low.to(tl.uint32).to(tl.uint64), seed_high.to(tl.uint32).to(tl.uint64)
    w0, w1, w2, w3 = tl.philox((high << 32) | low, counter, row + zero, zero, zero, n_rounds=7)
    w0, w1 = w0.to(tl.uint32, bitcast=True), w1.to(tl.uint32, bitcast=True)
    w2, w3 = w2.to(tl.uint32, bitcast=True), w3.to(tl.uint32, bitcast=True)
    # Half-word k = 4 a + 2 b + c of a call comes from word 2 a + b; a join adds the innermost dimension.
    low_halves = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high_halves = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low_halves, high_halves), (counter.shape[0], G))


@triton.jit
def _round_down_to_bfloat16(x):
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits + 0xFFFF, bits) & -0x10000
    value = bits.to(tl.float32, bitcast=True)
    largest = 3.3895313892515355e38
    return tl.maximum(tl.minimum(value, largest), -largest)


@triton.jit
def _round_up_to_bfloat16(x):
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


_WHOLE_BELOW = tl.constexpr("add.rz.f32 $0, $1, 0f4AFFFFFE;")  # 2^23 - 1: the lowest bit of the sum is a whole one


@triton.jit
def _whole_below(x):
    """The largest whole number up to x - 1, int32, for x from 1 to 256; a conversion takes four times as long."""
    if PORTABLE:
        return x.to(tl.int32) - 1
    else:
        bits = tl.inline_asm_elementwise(_WHOLE_BELOW, "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
        return bits & 255


@triton.jit
def quantize_group(
    x, row, start, end, seed_low, seed_high, G: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Codes (M, G) int32, scale and zero point (M,) float32 of columns start:end, x (M, G), of some rows.

    They are those of `reference.group_quantization.quantize_groups`.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if end - start == G:
        low, high = tl.min(x, axis=1), tl.max(x, axis=1)
    else:
        inside = start + tl.arange(0, G)[None, :] < end
        low = tl.min(tl.where(inside, x, float("inf")), axis=1)
        high = tl.max(tl.where(inside, x, float("-inf")), axis=1)
    zero_point = _round_down_to_bfloat16(low)
    exact = (high * 0.5 - zero_point * 0.5) * (2.0 / LEVELS)
    half_ulp = 5.9604644775390625e-08
    slack = tl.maximum(tl.abs(high), tl.abs(zero_point)) * (half_ulp / LEVELS) + exact * (4 * half_ulp)
    scale = _round_up_to_bfloat16(tl.maximum(exact - slack, 0.0))
    scale = tl.where(exact > 0, tl.maximum(scale, 1.1754943508222875e-38), 0.0)
    step = tl.where(scale > 0, scale, 1.0)
    position = (x - zero_point[:, None]) * tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)[:, None]
    if STOCHASTIC:
        # 1 + (random + 1/2) / 2^16, by its bits; a conversion of integers takes four times as long.
        random = (random_bits16(row, start, seed_low, seed_high, G) << 7) | 0x3F800040
        above = position + random.to(tl.float32, bitcast=True)
    else:
        above = position + 1.5
    return _whole_below(tl.minimum(above, LEVELS + 1.0)), scale, zero_point


@triton.jit
def _stored_codes(width, start, GROUP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, TOGETHER: tl.constexpr = 16):
    """The bytes (1, G or G / 2) of a group's codes in a row of `width` bytes, and which of them the row has.

    They end with the row as it is stored and not with the matrix: where Triton knows the width to be a multiple of 16,
    and the stride, many codes are one instruction.
    """
    EACH: tl.constexpr = 8 // BITS
    byte = start // EACH + tl.arange(0, G // EACH)[None, :]
    if TOGETHER < 16:
        byte = tl.max_contiguous(byte, (1, TOGETHER))
    return byte, byte < tl.minimum(start // EACH + GROUP // EACH, width)


@triton.jit
def load_codes(
    qdata, row, stride, width, row_mask, start, GROUP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    TOGETHER: tl.constexpr = 16,
):  # fmt: skip
    """Codes (M, G) int32 of the group that begins at column `start`, in rows of `width` bytes; 0 beyond both.

    row and row_mask (M, 1); at 4 bits `start` and GROUP must be even. A thread reads TOGETHER bytes at once, at most:
    with as many codes as it writes values at once, none go to another thread.
    """
    byte, inside = _stored_codes(width, start, GROUP, G, BITS, TOGETHER)
    packed = tl.load(qdata + row * stride + byte, mask=row_mask & inside, other=0).to(tl.int32)
    return packed if BITS == 8 else tl.reshape(tl.join(packed & 15, packed >> 4), (packed.shape[0], G))


@triton.jit
def store_codes(
    qdata, codes, row, stride, width, row_mask, start, end, GROUP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr
):
    """Write what `load_codes` reads, at 4 bits even columns in the low half of a byte; zeros from column `end` on."""
    codes = tl.where(start + tl.arange(0, G)[None, :] < end, codes, 0)
    if BITS == 4:
        even, odd = tl.split(tl.reshape(codes, (codes.shape[0], G // 2, 2)))
        codes = even | (odd << 4)
    byte, inside = _stored_codes(width, start, GROUP, G, BITS)
    tl.store(qdata + row * stride + byte, codes.to(tl.uint8), mask=row_mask & inside)


@triton.jit
def read_step_row(row):
    """Both words of the seed, step size, decay and that of growing values (`qgalore.kernels.StepScalars`)."""
    step_size = tl.load(row + 2).to(tl.float32, bitcast=True)
    decay = tl.load(row + 3).to(tl.float32, bitcast=True)
    growing = tl.load(row + 6).to(tl.float32, bitcast=True)
    return tl.load(row), tl.load(row + 1), step_size, decay, growing


@triton.jit
def updated(value, direction, step_size, decay, growing):
    """decay * value - step_size * direction; `growing` is the decay where the direction moves away from zero."""
    return value * tl.where(value * direction >= 0, decay, growing) - direction * step_size


@triton.jit
def round_stochastic_bfloat16(x, random):
    """float32 x rounded up or down to bfloat16 by 16 random bits: `reference.random_bits`."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    rounded = bits.to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x).to(tl.bfloat16)


@triton.jit
def round_stochastic_float16(x, random):
    """float32 x rounded up or down to float16 by 13 of 16 random bits: `reference.random_bits`."""
    smallest_normal = 6.103515625e-05
    size = tl.abs(x)
    added = tl.where(size < smallest_normal, smallest_normal, 0.0)
    bits = (size + added).to(tl.uint32, bitcast=True)
    rounded = ((bits + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True) - added
    rounded = tl.where(x < 0, -rounded, rounded)
    return tl.where(size < float("inf"), rounded, x).to(tl.float16)


@triton.jit
def round_stochastic(x, random, TYPE: tl.constexpr):
    """float32 x rounded stochastically to a type of 16 bits."""
    if TYPE == tl.float16:
        return round_stochastic_float16(x, random)
    else:
        return round_stochastic_bfloat16(x, random)


@triton.jit
def to_float(x, TYPE: tl.constexpr):
    """float32 x rounded to the nearest TYPE, ties to even; the interpreter's own cast to bfloat16 truncates."""
    if TYPE == tl.bfloat16 and PORTABLE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    return x.to(TYPE)


@triton.jit
def _to_float8(x):
    """float32 x, within +-448, rounded to the nearest e4m3, ties to even, which the interpreter's own cast is not."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    size = tl.abs(x)
    small = (size + 24576.0) - 24576.0  # in whole multiples of 2^-9
    x = tl.where(size < 0.015625, tl.where(x < 0, -small, small), tl.where(x == x, normal, x))
    return x.to(tl.float8e4nv)


@triton.jit
def float8_bits(x):
    """float32 x rounded to e4m3, as bytes: beyond its largest value that, and what is not a number stays so.

    The instruction of a GPU does all of that.
    """
    if PORTABLE:
        bits = _to_float8(tl.maximum(tl.minimum(x, 448.0), -448.0)).to(tl.uint8, bitcast=True)
        return tl.where(x == x, bits, tl.full(bits.shape, 0x7F, tl.uint8))
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


_FLOAT8_WORD = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@triton.jit
def float8_word(a, b, c, d):
    """`float8_bits` of four tensors, a the lowest byte, as int32: what is adjacent in memory may be so in no tensor."""
    if PORTABLE:
        low = float8_bits(a).to(tl.int32) | (float8_bits(b).to(tl.int32) << 8)
        return low | (float8_bits(c).to(tl.int32) << 16) | (float8_bits(d).to(tl.int32) << 24)
    else:
        return tl.inline_asm_elementwise(_FLOAT8_WORD, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)


def readable(x: Tensor) -> int:
    """Values of a row, of a turned matrix of a column, that can be read: to a multiple of 16 where memory goes on.

    Else the ragged end of a row would have all that is before it read one value at a time.
    """
    dim = 1 if x.stride(1) == 1 else 0
    size, stride, count = x.shape[dim], x.stride(1 - dim), x.shape[1 - dim]
    padded = ceil_div(size, 16) * 16
    last = x.storage_offset() + (count - 1) * stride + padded
    return padded if padded <= stride and last * x.element_size() <= x.untyped_storage().nbytes() else size
