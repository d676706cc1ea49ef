"""Newton-Schulz steps whose products are made in FP8 (e4m3), with all diagonals kept exact, in plain PyTorch.

Of X (m, n), m <= n, with |X| = 1 at first, and R(M) a matrix M without its diagonal, in 16 bits:

    A = X Xᵀ,    B = a + b A + c A A,    X <- B X

where A A = R R + d R + R d + d², d the diagonal of A and R = R(A), and B X = diag(B) X + R(B) X. Of these R R, R(B) X
and X Xᵀ are products of values in FP8, each with a scale that is a power of two and known beforehand, and the rest is
computed as it is.

By the Schatten norm, the first step is one of t X, with t = |A|^-1/2 of its Gram matrix A (t >= 1): its singular values
are at most 1, and nearer to that. In the place of A it has t² A, rounded to FP8 anew, as its values may be far below
what those of A are scaled for; and the result is t B X.

Why: a step sums up large terms that cancel (a + b + c is 0.7 of 3.4, -4.8 and 2.0), and what FP8 loses of them, 3 % of
each value, is more than what remains: with whole matrices in FP8 an iteration may even diverge. But near the end the
Gram matrix is close to the identity, and its diagonal carries nearly all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonalize_fp8", "runs_in_fp8"]

LARGEST = 448.0
"""Of e4m3; what is larger becomes that."""
FIRST_GRAM, GRAM, FACTOR = 512.0, 128.0, 64.0
"""Scales of R(A) in the first step, of R(A) in the others, and of R(B). The first polynomial of a method gets singular
values up to 1, and values of R(A) are at most 1/2 and of R(B) 4; the others up to 2, and values are at most 2."""
LEAST_GRAM_NORM = 1e-6
"""|A| of a first Gram matrix of trace 1 is above that, or A is zero."""


def scale_of(rows: int) -> float:
    """Of X with so many rows: its values have a root mean square of 8, or less in early steps and for wide matrices."""
    return float(2 ** round(3 + 0.5 * (rows - 1).bit_length()))


def in_fp8(x: Tensor, scale: float) -> Tensor:
    """x as FP8 keeps it under a scale."""
    kept = (x * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return kept.to(torch.float32) / scale


def runs_in_fp8(rows: int, device: torch.device) -> bool:
    """Whether products are made in FP8 and not, as here, of values in FP8 in float32."""
    return False


def orthogonalize_fp8(
    matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]], *, schatten_norm: bool = False
) -> list[Tensor]:
    """See `qgalore.kernels.orthogonalize_fp8`."""
    return [_orthogonalized(matrix, polynomials, schatten_norm) for matrix in matrices]


def _orthogonalized(matrix: Tensor, polynomials: Sequence[tuple[float, float, float]], schatten_norm: bool) -> Tensor:
    dtype, tall = matrix.dtype, matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    norm = torch.linalg.vector_norm(x, dtype=torch.float32)
    x = (x * torch.where(norm < 1e-18, 0.0, norm.reciprocal())).to(dtype)
    for step, (first, third, fifth) in enumerate(polynomials):
        x8 = in_fp8(x, scale_of(len(x)))
        diagonal, rest = _without_diagonal(x8 @ x8.T)
        rest = rest.to(dtype).float()
        size: Tensor | float = 1.0
        if schatten_norm and step == 0:
            diagonal, rest, size = _of_norm_1(diagonal, rest, dtype)
        rest8 = in_fp8(rest, GRAM if step else FIRST_GRAM)
        squared = rest8 @ rest8 + (diagonal[:, None] + diagonal[None, :]) * rest + torch.diag(diagonal * diagonal)
        even = third * (rest + torch.diag(diagonal)) + fifth * squared
        diagonal, rest = _without_diagonal(even)
        x = (size * ((first + diagonal)[:, None] * x + in_fp8(rest.to(dtype).float(), FACTOR) @ x8)).to(dtype)
    return x.T if tall else x


def _of_norm_1(diagonal: Tensor, rest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal and rest, rounded to a dtype, of t² A, and t = |A|^-1/2."""
    norm = (rest.square().sum() + diagonal.square().sum()).sqrt()
    square = norm.clamp_min(LEAST_GRAM_NORM).reciprocal()
    return square * diagonal, (square * rest).to(dtype).float(), square.sqrt()


def _without_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal, and the matrix with zeros there."""
    diagonal = matrix.diagonal().clone()
    return diagonal, matrix - torch.diag(diagonal)
