"""A step along the orthogonalised momentum instead of Adam's: no second moment, half the state.

Muon (Jordan et al., kellerjordan.github.io/posts/muon, 2024) replaces a weight's momentum M = U S Vᵀ by U Vᵀ, so that
all directions of the momentum move the weight alike. Here M is the momentum of the projected gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore import adam

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that Muon applies to the singular values: steep at 0, and near 1 between 0.7 and 1.2."""
_STEPS = 5
RMS = 0.2
"""Of the direction, about that of Adam's (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982)."""


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U Vᵀ of M = U S Vᵀ (rows, columns), with singular values between 0.7 and 1.2, in bfloat16 on a GPU.

    Directions whose singular value is below a thousandth of the largest stay smaller.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix).to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / x.norm().clamp_min(1e-30)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.T if tall else x


def orthogonal_step(
    state: dict[str, Tensor], grad: Tensor, beta1: float, factor: Tensor | None, skip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The direction for a gradient (rows, columns), of root mean square 0.2, after moving the momentum in place.

    The gradient is factor * grad. Nesterov's momentum, as in Muon. Where the flag `skip` is true the momentum stays.
    """
    grad = grad.float() if factor is None else grad.float() * factor
    before = adam.read_moment(state, "exp_avg")
    momentum = torch.lerp(before, grad, 1 - beta1)
    ahead = torch.lerp(momentum, grad, 1 - beta1)
    adam.write_moment(state, "exp_avg", momentum, skip)
    scale: float = RMS * max(grad.shape) ** 0.5
    return (orthogonalize(ahead) * scale).to(dtype)
