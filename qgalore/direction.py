"""The direction of a low-rank update from the projected gradient: Adam's, or one that needs less state.

- adam: both moments of each value (`qgalore.adam`).
- factored: the second moment as a row and a column, v_ij = r_i c_j / mean(r), after Adafactor (Shazeer and Stern, arXiv
  1804.04235). In the coordinates of the gradient's own singular vectors little is lost by that (Vyas et al., "SOAP",
  arXiv 2409.11321). It takes 1 byte a value instead of 2 at 8 bits.
- orthogonal: Muon's (Jordan et al., kellerjordan.github.io/posts/muon, 2024), which replaces the momentum M = U S Vᵀ by
  U Vᵀ, so that all directions of the momentum move the weight alike. No second moment.

All move their moments in place and keep them, to the bit, where the flag `skip` is true. The gradient is factor * grad.
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
    factors: bool = False
    """Whether the second moment is a row and a column."""
    together: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    """Makes the directions of several weights of one rank at once, which is faster than one after another."""

    def init_state(self, state: dict[str, Tensor], shape: torch.Size, bits: int, device: torch.device) -> None:
        """Put zero moments into `state`, as `qgalore.adam.init_moments`."""
        adam.init_moments(state, shape, bits, device, self.moments)
        if self.factors:
            for name, of_factor in zip(_FACTORS, ((shape[0], 1), (1, shape[1])), strict=True):
                state[name] = torch.zeros(of_factor, device=device)

    def rotated(self, side: str) -> list[tuple[str, int]]:
        """Names and powers of the moments that change with the basis of a side."""
        moments = [(name, power) for power, name in enumerate(self.moments, start=1)]
        return [*moments, (_FACTORS[side == "right"], 2)] if self.factors else moments


_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_column")


def factored_step(
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
    """m_hat / (sqrt(v_hat) + eps) like grad, with v as a row and a column; arguments as in `qgalore.adam.adam_step`."""
    grad = kernels.scaled(grad, factor)
    momentum = torch.lerp(adam.read_moment(state, "exp_avg"), grad, 1 - betas[0])
    adam.write_moment(state, "exp_avg", momentum, skip)
    squares, means = grad.square(), []
    del grad
    for name, across in zip(_FACTORS, (1, 0), strict=True):
        mean = torch.lerp(state[name], squares.mean(across, keepdim=True), 1 - betas[1])
        adam.write_moment(state, name, mean, skip)
        means.append(mean)
    del squares
    row, column = means
    corrections: tuple[float | Tensor, ...]
    if numbers is None:
        corrections = tuple(1.0 / (1.0 - beta**step) for beta in betas)
    else:
        corrections = tuple(numbers.view(torch.float32)[4:6])
    size = (row * corrections[1] / row.mean().clamp_min(1e-30)).sqrt() * column.sqrt()
    return momentum.mul_(corrections[0]).div_(size.add_(eps)).to(dtype)


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
    "factored": Direction(factored_step, adam.MOMENTS[:1], factors=True),
    "orthogonal": Direction(nesterov_step, adam.MOMENTS[:1], together=orthogonal_directions),
}
