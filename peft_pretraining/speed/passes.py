"""Passes over memory: operations, bytes, kernels, and the least time that these take.

The model of a pass is the roofline: Williams, Waterman and Patterson, Communications of the ACM 52 (4), 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TFLOPS, TBPS = 790.0, 3.0
"""Measured on an H100: a large bfloat16 product, and a large copy, bytes read plus bytes written."""
GROUP_SIZE = 256
"""Values of a row that share a scale and zero point (bfloat16), and of an 8-bit state that share a scale (float32)."""
INT8_SPEED, FP8_SPEED = 1.7, 2.0
"""Of operations in 8 bits, over those in bfloat16: cards publish twice as many, of which INT8's kernel reaches less."""


class Ceilings(NamedTuple):
    """The peak rates of the device."""

    operations_per_second: float = TFLOPS * 1e12
    bytes_per_second: float = TBPS * 1e12
    seconds_per_kernel: float = 0.0
    """Between two kernels, beside what both take."""


class Pass(NamedTuple):
    """The operations and bytes of one kernel, or of `count` equal ones."""

    operations: float
    nbytes: float
    kernels: float = 1.0
    bytes_after: float = 0.0
    """Those of the bytes that are moved when the operations are done, and not meanwhile."""


Passes = list[Pass]


def product(rows: int, inner: int, columns: int, result_bytes: float = 2) -> Pass:
    """A product of bfloat16 matrices; `result_bytes` moved for each value of the result."""
    operands, result = rows * inner + inner * columns, rows * columns
    return Pass(2 * rows * inner * columns, 2 * operands + result_bytes * result)


def product_in_int8(rows: int, inner: int, columns: int) -> Pass:
    """The same of factors in INT8, with a bfloat16 result; its operations are counted as those of bfloat16."""
    return Pass(2 * rows * inner * columns / INT8_SPEED, rows * inner + inner * columns + 2 * rows * columns)


def product_in_fp8(rows: int, inner: int, columns: int) -> Pass:
    """The same of factors in FP8.

    The result gets the scales of its rows and columns, and is written after the sum: short sums gain little.
    """
    operands, result = rows * inner + inner * columns, 2 * rows * columns
    return Pass(2 * rows * inner * columns / FP8_SPEED, operands + result, bytes_after=result)


def round_to_8_bits(rows: int, columns: int) -> Pass:
    """The pass that rounds a bfloat16 matrix to INT8 or FP8."""
    return moved(3 * rows * columns)


def moved(nbytes: float) -> Pass:
    """A pass that only moves bytes, without a matrix product."""
    return Pass(0, nbytes)


def quantized_bytes(rows: int, columns: int, bits: int) -> int:
    """The bytes of a group-quantized matrix."""
    return rows * (-(-columns * bits // 8) + 4 * -(-columns // GROUP_SIZE))


def dequantize(rows: int, columns: int, bits: int, result_bytes: int = 2) -> Pass:
    """The pass that dequantizes a matrix to bfloat16, or to so many bytes a value."""
    return moved(quantized_bytes(rows, columns, bits) + result_bytes * rows * columns)


def times(passes: Sequence[Pass], count: float) -> Passes:
    """Repeat passes `count` times."""
    return [Pass(*(count * value for value in p)) for p in passes] if count else []


def side_of(m: int, n: int) -> tuple[str, int, int]:
    """The side of a weight that is projected, the shorter one; its length and that of the other."""
    return ("right", n, m) if m >= n else ("left", m, n)


def seconds(passes: Sequence[Pass], ceilings: Ceilings) -> float:
    """The floor of passes that run one after another."""
    rate, bandwidth, between = ceilings
    return sum(
        max(p.operations / rate + p.bytes_after / bandwidth, p.nbytes / bandwidth) + between * p.kernels for p in passes
    )
