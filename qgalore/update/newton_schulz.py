"""The polynomials of Newton-Schulz steps, and the form of the iteration that costs least for a shape.

Methods: five times one polynomial (`muon`), as Muon has it (Jordan et al., kellerjordan.github.io/posts/muon, 2024); or
one polynomial a step, each the best for what the one before leaves, as in the Polar Express (Amsel et al., arXiv
2505.16932; degree 5, by Remez exchange, as also Grishina et al., arXiv 2506.10935): `python -m
benchmarks.polar_polynomials` finds them, and a test holds the numbers here to it.

In FP8 go Muon's steps (`muon_fp8`), or four that are made for it (`muon4_fp8`): of those that stay in bounds although
their terms are rounded, the steepest at 0, on singular values that the Schatten 4-norm leaves nearer to 1. The best
ones amplify errors where the largest singular values are: there 3 % of rounding goes on to infinity, of momenta that
are of rank one but for a tenth. `auto` is `muon4_fp8` for matrices that gain by FP8, on a device that has such
products, and `muon` elsewhere.

Form: a step needs of X (m, n), m <= n, its Gram matrix R = X Xᵀ. Products of (m, m) matrices that are polynomials of R
are symmetric and commute, so several steps can be made on R alone, with X multiplied once at the end of such a
*segment* (Gram Newton-Schulz: Zhang, Amsel, Chen, Dao, dao-ailab.github.io/blog/2026/gram-newton-schulz). In exact
arithmetic the result is the same. In 16 bits R loses what lies below its last bit, which the next steps would amplify:
R is formed anew after two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Polynomial = tuple[float, float, float]
"""(a, b, c) of a x + b x³ + c x⁵."""


class Method(NamedTuple):
    """The steps of an iteration."""

    polynomials: tuple[Polynomial, ...]
    segmented: bool
    """Whether it is made in segments, on values of 16 bits in float16, scaled by a bound that is nearer to the largest
    singular value than |M|: the fourth root of Σ σ⁴. Else in the dtype of M, scaled by |M|."""
    fp8: bool = False
    """Whether its products are made in FP8, with exact diagonals (`qgalore.kernels.orthogonalize_fp8`)."""
    schatten_norm: bool = False
    """In FP8: whether M is scaled by the fourth root of Σ σ⁴, too, and not by |M|."""


AUTO = "auto"
"""The name of the method that `method_of` chooses."""
_LEAST_ROWS_IN_FP8 = 768
"""Of a matrix to gain by FP8: of smaller ones the copies in FP8 take longer than the products save (60M has 512 rows
and is slower with it; 130M has 768 and is 2.5 % faster, in a row: `compare.csv`, a13fc65)."""
_MUON = ((3.4445, -4.7750, 2.0315),) * 5
_STEADY = ((3.4772, -7.4375, 4.495), (3.9214, -10.1513, 7.0069), (3.9359, -10.2474, 7.1034), (4.1973, -8.7371, 5.7109))
_POLAR = ((8.1693, -22.9667, 16.5429), (3.9810, -2.8678, 0.5293), (3.4959, -2.5673, 0.5022))
METHODS = {
    "muon": Method(_MUON, segmented=False),
    "muon_fp8": Method(_MUON, segmented=False, fp8=True),
    "muon4_fp8": Method(_STEADY, segmented=False, fp8=True, schatten_norm=True),
    "polar5": Method((*_POLAR, (2.5042, -1.8125, 0.4191), (1.9284, -1.3082, 0.3809)), segmented=True),
    "polar4": Method((*_POLAR, (2.5292, -1.8674, 0.4405)), segmented=True),
}

SEGMENT = 2
"""Steps after which the Gram matrix is formed anew, once."""
_WORTH_IT = 0.9
"""Segments are taken where they need at most so many of the multiply-adds of the plain form."""
_LEAST_ROWS = 2048
"""And for matrices with as many rows: products of smaller ones take less time if those of a layer are made together."""


def asks_for_fp8(name: str) -> bool:
    """Whether the method of a name is made in FP8 on every device, which `auto` is not."""
    return name in METHODS and METHODS[name].fp8


def method_of(name: str, rows: int, in_fp8: Callable[[int], bool]) -> Method:
    """The method of a name for matrices whose shorter side is `rows`.

    in_fp8: whether products of matrices with so many rows can be made in FP8 where they are; asked for `auto` alone.
    """
    if name != AUTO:
        return METHODS[name]
    return METHODS["muon4_fp8" if rows >= _LEAST_ROWS_IN_FP8 and in_fp8(rows) else "muon"]


def segments_of(shape: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The steps of each segment for an (m, n) matrix: one step each (the plain form), or two segments if cheaper.

    A square matrix costs the same either way, and the plain form is the more accurate.
    """
    if min(shape) < _LEAST_ROWS:
        return (1,) * steps
    plain, gram = (1,) * steps, (min(SEGMENT, steps), *((steps - SEGMENT,) if steps > SEGMENT else ()))
    cheaper = multiply_adds(shape, gram) <= _WORTH_IT * multiply_adds(shape, plain)
    return gram if cheaper else plain


def multiply_adds(shape: tuple[int, ...], segments: tuple[int, ...], symmetric: bool = True) -> float:
    """Of all products for one matrix; symmetric: symmetric ones counted by half.

    With m rows and n columns, m <= n, a segment of s steps forms the Gram matrix (m² n, symmetric) and multiplies X
    (m² n). Each step squares R; each but the last moves R on by two products; each but the first multiplies the
    factors of X (m³ each, symmetric).
    """
    rows, width = min(shape), max(shape)
    half = 0.5 if symmetric else 1.0
    squares = sum(steps + 2 * (steps - 1) + (steps - 1) for steps in segments)
    return len(segments) * (1 + half) * rows**2 * width + half * squares * rows**3
