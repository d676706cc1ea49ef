"""The polynomials of `qgalore.update.newton_schulz`, and how near to 1 each method brings singular values.

    python -m benchmarks.polar_polynomials                        # polynomials, and synthetic spectra
    python -m benchmarks.polar_polynomials --momenta momenta.pt   # and those of a run: a dict of matrices by torch.save

With singular values in [l, u], the odd polynomial a x + b x³ + c x⁵ whose largest distance from 1 there is the least
has that distance, with alternating signs, in l, two points between, and u. Remez exchange finds it: solve for a, b, c
and the distance with two guesses of the points, move the guesses to the extrema, and again. What it leaves lies in
[1 - distance, 1 + distance], for which the next one is made. In the composition this choice, step by step, is the best
there is (Amsel et al., arXiv 2505.16932). Of theirs, too: all but the last polynomial are those of x / 1.01, since
rounding may bring a value above u, from where they grow; and where l is below u / 50, the polynomial of [u / 50, u] is
taken, scaled so that what it leaves lies around 1, as that of l would fall too near to 0 between.

Products in FP8 round b x³ and c x⁵, and where rows of a momentum are alike, all values of its largest singular vectors
round alike: the two terms, which nearly cancel, are then off by a share of themselves. A steady polynomial is, of those
that map [0, 1] to at most 1, and what lies beyond their maximum to at least m, although b is by a share e smaller or
larger, and c the other way, the one with the largest a: what a step multiplies small singular values by. Its bounds are
reached in three points, which the same exchange finds. The last of `STEADY` is scaled to leave values of up to 1.2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update.newton_schulz import METHODS, Polynomial

LOWEST = {"polar5": 0.003, "polar4": 0.003}
"""The least singular value over the scale, the fourth root of Σ σ⁴, that each method is made for."""
SAFETY, CUSHION = 1.01, 0.02
STEADY = {"muon4_fp8": ((0.039, 0.02), (0.013, 0.085), (0.012, 0.09), (0.002, 0.6))}
"""(e, m) of each step. Found by random search: of those that let errors of momenta of rank one grow no more than Muon's
five steps, the nearest to the polar factors of momenta of a small LLaMA (log of 2026-11-30)."""
STEADY_TOP = 1.2


def best_polynomial(low: float, high: float) -> Polynomial:
    """(a, b, c) of the odd polynomial that is nearest to 1 on [low, high], 0 < low < high."""
    if low > 0.99999 * high:  # the limit, Newton-Schulz's own
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    points = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high]
    before = math.inf
    while True:
        rows = [[x, x**3, x**5, (-1.0) ** index] for index, x in enumerate(points)]
        solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        a, b, c, distance = solved.tolist()
        if abs(before - distance) < 1e-14:
            return a, b, c
        points[1:3] = [_extremum(a, b, c, -1), _extremum(a, b, c, 1)]
        before = distance


def best_steps(low: float, steps: int) -> tuple[Polynomial, ...]:
    """The polynomials of so many steps for singular values in [low, 1]."""
    high, found = 1.0, []
    for step in range(steps):
        a, b, c = best_polynomial(max(low, CUSHION * high), high)
        if low < CUSHION * high:
            around = 2 / (_value((a, b, c), low) + _value((a, b, c), high))
            a, b, c = a * around, b * around, c * around
        if step < steps - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        found.append((a, b, c))
        low = _value((a, b, c), low)
        high = 2 - low
    return tuple(found)


def steady_polynomial(error: float, least: float) -> Polynomial:
    """(a, b, c) with the largest a that keeps [0, 1] at most 1, and at least `least` beyond its maximum.

    And does so where b and c are off by shares of at most `error`, in opposite directions.
    """
    less, more = 1 - error, 1 + error
    top, bottom, before = 0.4, 0.8, math.inf
    while True:
        rows = [
            [x, x**3 * of_b, x**5 * of_c]
            for x, of_b, of_c in ((top, less, more), (bottom, more, less), (1, less, more))
        ]
        bounds = torch.tensor([1, least, 1], dtype=torch.float64)
        a, b, c = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), bounds).tolist()
        if abs(before - a) < 1e-14:
            return a, b, c
        top, bottom = _extremum(a, less * b, more * c, -1), min(1.0, _extremum(a, more * b, less * c, 1))
        before = a


def _extremum(a: float, b: float, c: float, sign: int) -> float:
    """Where a x + b x³ + c x⁵, b < 0 < c, has its maximum (sign -1) or the minimum beyond it (1)."""
    return math.sqrt((-3 * b + sign * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))


def steady_steps(shares: Sequence[tuple[float, float]]) -> tuple[Polynomial, ...]:
    """The steady polynomial of each (error, least); the last one is scaled by `STEADY_TOP`."""
    *found, (a, b, c) = (steady_polynomial(*each) for each in shares)
    return *found, (STEADY_TOP * a, STEADY_TOP * b, STEADY_TOP * c)


def _value(polynomial: Polynomial, x: float) -> float:
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


def deviations(momentum: Tensor, name: str) -> tuple[float, float]:
    """The largest and the mean distance from 1 of the singular values that a method leaves; in float64, but for FP8."""
    method = METHODS[name]
    steps = method.polynomials
    if method.fp8:
        (found,) = kernels.orthogonalize_fp8([momentum.float()], steps, schatten_norm=method.schatten_norm)
    else:
        (found,) = kernels.orthogonalize([momentum.double()], steps, (1,) * len(steps) if method.segmented else None)
    values = torch.linalg.svdvals(found.double())
    distance = (values - 1).abs()
    return float(distance.max()), float(distance.mean())


def synthetic(rows: int = 256, width: int = 688) -> dict[str, Tensor]:
    """Matrices with singular values of different laws, k = 1 to `rows`."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    left, right = torch.linalg.qr(draw(rows, rows))[0], torch.linalg.qr(draw(width, rows))[0]
    k = torch.arange(1, rows + 1, dtype=torch.float64)
    laws = {"1 / sqrt(k)": k**-0.5, "1 / k": 1 / k, "1 to 0.001, equal ratios": 10 ** (-3 * (k - 1) / (rows - 1))}
    return {"normal": draw(rows, width)} | {name: left * values @ right.T for name, values in laws.items()}


def _print(polynomials: Sequence[Polynomial]) -> None:
    for polynomial in polynomials:
        print("    ({:.4f}, {:.4f}, {:.4f})".format(*polynomial))


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(prog="polar_polynomials", description=__doc__.splitlines()[0])
    parser.add_argument("--momenta", help="file of torch.save with a dict of matrices")
    args = parser.parse_args(argv)
    for name, low in LOWEST.items():
        print(f"{name}: singular values of the scale from {low:g}")
        _print(best_steps(low, len(METHODS[name].polynomials)))
    for name, shares in STEADY.items():
        print(f"{name}: with errors of {', '.join(f'{error:g}' for error, _ in shares)} of terms")
        _print(steady_steps(shares))
    spectra = {name: [matrix] for name, matrix in synthetic().items()}
    if args.momenta:
        spectra["momenta"] = list(torch.load(args.momenta).values())
    for spectrum, matrices in spectra.items():
        for name in METHODS:
            worst, mean = zip(*(deviations(matrix, name) for matrix in matrices), strict=True)
            print(f"{spectrum}, {name}: at most {max(worst):.3f} from 1, {sum(mean) / len(mean):.3f} on average")


if __name__ == "__main__":
    main()
