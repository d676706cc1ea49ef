"""Orthogonalisation by odd polynomials (Newton-Schulz) in plain PyTorch.

In segments: of X, scaled so that its values are about 1, R = X Xᵀ / rows; with s = 1 / |R|, |R| >= its largest
eigenvalue, the singular values of X sqrt(s / rows) are at most 1, and s R is the Gram matrix of that. A segment keeps
the factor of X as q + W, with q a number, so that rounding W to 16 bits does not touch q:

    Z = b R + c R R,    W <- W Z + a W + q Z,    q <- a q,    T = R Z + a R,    R <- T Z + a T

and then X <- q X + W X. A segment of one step is the plain form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["orthogonalize"]


def orthogonalize(
    matrices: Sequence[Tensor],
    polynomials: Sequence[tuple[float, float, float]],
    segments: Sequence[int] | None = None,
) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize`."""
    if segments is None:
        return [odd_polynomials(matrix, polynomials) for matrix in matrices]
    return [_by_segments(matrix, polynomials, segments) for matrix in matrices]


def odd_polynomials(matrix: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Odd polynomials a x + b x³ + c x⁵ of the singular values of matrix / |matrix|, in its dtype, on any device."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-30)
    for first, third, fifth in polynomials:
        gram = x @ x.T
        even = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.addmm(x, even, x, beta=first)
    return x.T if tall else x


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of values within `orthogonalize` in segments: for bfloat16 float16, which has eight times as fine steps."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def unit_factors(matrices: Sequence[Tensor]) -> Tensor:
    """For each matrix the power of two, (count,), that brings its values to about 1, which rounds nothing.

    0 where they are below 1e-18, whose squares float32 does not hold.
    """
    norms = [torch.linalg.vector_norm(x, dtype=_at_least_float32(x)) * x.numel() ** -0.5 for x in matrices]
    sizes = torch.stack(norms)
    return torch.where(sizes < 1e-18, 0.0, sizes.log2().round_().neg_().exp2_())


def gram_scales(grams: Tensor) -> Tensor:
    """1 / |R| (count,) of Gram matrices (count, rows, rows) of such values: |R| is above 1/2, or 0."""
    sizes: Tensor = torch.linalg.vector_norm(grams, dim=(1, 2), dtype=_at_least_float32(grams))
    return sizes.clamp_min_(1e-6).reciprocal_()


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def steps_by_segment(
    polynomials: Sequence[tuple[float, float, float]], segments: Iterable[int]
) -> Iterator[Sequence[tuple[float, float, float]]]:
    """The polynomials of each segment."""
    start = 0
    for steps in segments:
        yield polynomials[start : start + steps]
        start += steps


def _by_segments(matrix: Tensor, polynomials: Sequence[tuple[float, float, float]], segments: Sequence[int]) -> Tensor:
    tall, dtype = matrix.shape[0] > matrix.shape[1], working_dtype(matrix.dtype)
    x: Tensor = (matrix * unit_factors([matrix])[0]).to(dtype)
    x = x.T if tall else x
    for index, steps in enumerate(steps_by_segment(polynomials, segments)):
        gram, size = torch.empty(len(x), len(x), dtype=dtype, device=x.device), None
        gram = torch.addmm(gram, x, x.T, beta=0, alpha=1.0 if index else 1.0 / len(x))
        if index == 0:
            scale = gram_scales(gram[None])[0]
            gram, size = gram * scale, (scale / len(x)).sqrt()
        factor, first = _segment(gram, steps)
        x = torch.addmm(x, factor, x, beta=first)
        x = x if size is None else x * size
    return (x.T if tall else x).to(matrix.dtype)


def _segment(gram: Tensor, steps: Sequence[tuple[float, float, float]]) -> tuple[Tensor, float]:
    """W and q of a segment."""
    whole, factor = 1.0, None
    for index, (first, third, fifth) in enumerate(steps):
        even = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        if factor is None:
            factor = even
        else:
            factor = torch.addmm(factor, factor, even, beta=first).add_(even, alpha=whole)
        whole *= first
        if index < len(steps) - 1:
            gram = torch.addmm(gram, gram, even, beta=first)
            gram = torch.addmm(gram, gram, even, beta=first)
    assert factor is not None, "a segment has at least one step"
    return factor, whole
