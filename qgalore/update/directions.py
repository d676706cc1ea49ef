"""The direction of a low-rank update from the projected gradient: Adam's, or one that needs less state.

- adam: both moments of each value (`qgalore.update.moments`).
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

from qgalore import kernels
from qgalore.update import moments
from qgalore.update.gradient_sum import dense
from qgalore.update.moments import GradientStep

_POLYNOMIALS = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's, by which singular values above a thousandth of the largest come to lie between 0.7 and 1.2."""
ORTHOGONAL_RMS = 0.2
"""Of an orthogonal direction, about that of Adam's (Liu et al., arXiv 2502.16982)."""


class Direction(NamedTuple):
    """How directions are made and what they keep."""

    steps: Callable[[Sequence[GradientStep], Tensor | None], list[Tensor]]
    """steps(gradients, skip) -> directions of several weights, whose moments it moves."""
    moments: tuple[str, ...]
    """Moments of the gradient's shape, in the order of their powers."""
    values_together: int
    """Gradients wait until they have more values than so many, and are then made directions of at once.

    That is faster for small matrices; of one large matrix there are enough values to fill a GPU.
    """


def nesterov_step(step: GradientStep, skip: Tensor | None = None) -> Tensor:
    """Nesterov's momentum like the gradient, in bfloat16 on a GPU."""
    state, grad = step.state, dense(step.grad)
    dtype = torch.bfloat16 if grad.is_cuda else torch.float32
    momentum = state["exp_avg"], state.get("exp_avg_absmax"), None, None
    argument = kernels.AdamStep(grad, *momentum, step.row, step.betas, step.eps, step.factor, dtype)
    return kernels.momentum_steps([argument], moments.BLOCK_SIZE, skip)[0]


def orthogonal_directions(momenta: Sequence[Tensor]) -> list[Tensor]:
    """Of momenta with one shorter side: orthogonalised, of root mean square 0.2."""
    found = kernels.orthogonalize(momenta, _POLYNOMIALS)
    return [x * (ORTHOGONAL_RMS * max(x.shape) ** 0.5) for x in found]


def orthogonal_steps(steps: Sequence[GradientStep], skip: Tensor | None = None) -> list[Tensor]:
    """The orthogonal directions of several weights, those of one rank at once."""
    values = [nesterov_step(step, skip) for step in steps]
    places: dict[int, list[int]] = {}
    for place, momentum in enumerate(values):
        places.setdefault(min(momentum.shape), []).append(place)
    for alike in places.values():
        for place, direction in zip(alike, orthogonal_directions([values[place] for place in alike]), strict=True):
            values[place] = direction
    return values


DIRECTIONS = {
    "adam": Direction(moments.adam_steps, moments.MOMENTS, values_together=3 << 20),
    "orthogonal": Direction(orthogonal_steps, moments.MOMENTS[:1], values_together=1 << 24),
}
