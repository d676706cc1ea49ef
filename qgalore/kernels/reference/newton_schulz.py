"""Orthogonalisation by odd polynomials (Newton-Schulz) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonalize"]


def orthogonalize(matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]]) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize`."""
    return [_orthogonalize(matrix, polynomials) for matrix in matrices]


def _orthogonalize(matrix: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Odd polynomials a x + b x³ + c x⁵ of the singular values of matrix / |matrix|, in its dtype."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-30)
    for first, third, fifth in polynomials:
        gram = x @ x.T
        even = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.addmm(x, even, x, beta=first)
    return x.T if tall else x
