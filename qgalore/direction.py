"""The direction of a low-rank update from the projected gradient: Adam's, or one that needs less state.

- adam: both moments of each value (`qgalore.adam`).
- orthogonal: Muon's (Jordan et al., kellerjordan.github.io/posts/muon, 2024), which replaces the momentum M = U S Vᵀ by
  U Vᵀ, so that all directions of the momentum move the weight alike. No second moment.

Both move their moments in place and keep them, to the bit, where the flag `skip` is true. The gradient is
factor * grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore import adam, kernels

_POLYNOMIALS = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's, by which singular values above a thousandth of the largest come to lie between 0.7 and 1.2."""
ORTHOGONAL_RMS = 0.2
"""Of an orthogonal direction, about that of Adam's (Liu et al., arXiv 2502.16982)."""
VALUES_TOGETHER = 1 << 24
"""Momenta wait until there are more than so many values, and are then made directions of at once."""


class Direction(NamedTuple):
    """How a direction is made and what it keeps."""

    step: Callable[..., Tensor]
    """step(state, grad, step, betas, eps, factor, skip, dtype, numbers) -> direction, as `qgalore.adam.adam_step`.

    Or, where there is `together`, what that makes directions of.
    """
    moments: tuple[str, ...]
    """Moments of the gradient's shape, in the order of their powers."""
    together: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    """Makes the directions of several weights of one rank at once, which is faster than one after another."""


def nesterov_step(
    state: dict[str, Tensor],
    grad: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    numbers: Tensor | None = None,
) -> Tensor:
    """Nesterov's momentum like grad, in bfloat16 on a GPU; arguments as in `adam.adam_step`."""
    type = torch.bfloat16 if grad.is_cuda else torch.float32
    momentum, absmax = state["exp_avg"], state.get("exp_avg_absmax")
    return kernels.momentum_step(grad, momentum, absmax, betas[0], adam.BLOCK_SIZE, factor, skip, type)


def orthogonal_directions(momenta: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalised, of root mean square 0.2."""
    found = kernels.orthogonalize(momenta, _POLYNOMIALS)
    return [x * (ORTHOGONAL_RMS * max(x.shape) ** 0.5) for x in found]


DIRECTIONS = {
    "adam": Direction(adam.adam_step, adam.MOMENTS),
    "orthogonal": Direction(nesterov_step, adam.MOMENTS[:1], together=orthogonal_directions),
}
