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
from qgalore.kernels import AdamStep
from qgalore.torch_internals import internal
from qgalore.update import moments

_POLYNOMIALS = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's, by which singular values above a thousandth of the largest come to lie between 0.7 and 1.2."""
ORTHOGONAL_RMS = 0.2
"""Of an orthogonal direction, about that of Adam's (Liu et al., arXiv 2502.16982)."""


class Direction(NamedTuple):
    """How directions are made and what they keep."""

    advance: Callable[[Sequence[AdamStep], Tensor | None], list[Tensor]]
    """advance(steps, skip) -> directions of several weights, whose moments it moves in place."""
    moments: tuple[str, ...]
    """Moments of the gradient's shape, in the order of their powers."""
    batch_values: int
    """Gradients wait until they have more values than so many, and are then made directions of at once.

    That is faster for small matrices; of one large matrix there are enough values to fill a GPU.
    """


def orthogonal_directions(momenta: Sequence[Tensor]) -> list[Tensor]:
    """Of momenta with one shorter side: orthogonalised, of root mean square 0.2."""
    found = kernels.orthogonalize(momenta, _POLYNOMIALS)
    scaled: list[Tensor] = internal("torch._foreach_mul")(found, [ORTHOGONAL_RMS * max(x.shape) ** 0.5 for x in found])
    return scaled


def _orthogonal(steps: Sequence[AdamStep], skip: Tensor | None) -> list[Tensor]:
    """Muon's directions, of the momenta with one shorter side at once; in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if steps[0].grad.is_cuda else torch.float32
    values = kernels.momentum_steps([step._replace(dtype=dtype) for step in steps], moments.BLOCK_SIZE, skip)
    indices: dict[int, list[int]] = {}
    for index, momentum in enumerate(values):
        indices.setdefault(min(momentum.shape), []).append(index)
    for alike in indices.values():
        for index, direction in zip(alike, orthogonal_directions([values[index] for index in alike]), strict=True):
            values[index] = direction
    return values


DIRECTIONS = {
    "adam": Direction(
        lambda steps, skip: kernels.adam_steps(steps, moments.BLOCK_SIZE, skip), moments.MOMENTS, batch_values=3 << 20
    ),
    "orthogonal": Direction(_orthogonal, moments.MOMENTS[:1], batch_values=1 << 24),
}
