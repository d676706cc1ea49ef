"""Rows of directions over the roots of their second moments, with the size of the whole kept, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import RowNormalization, StepNumbers

__all__ = ["normalize_rows"]


def normalize_rows(parts: Sequence[RowNormalization], skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.normalize_rows`."""
    return [_normalized(part, skip) for part in parts]


def _normalized(part: RowNormalization, skip: Tensor | None) -> Tensor:
    direction = part.direction * part.scale
    squares = torch.linalg.vector_norm(direction, dim=1, dtype=torch.float32).square_() / direction.shape[1]
    second = part.second * part.beta + squares * (1.0 - part.beta)
    part.second.copy_(second if skip is None else torch.where(skip, part.second, second))
    factor = 1.0 / ((second * StepNumbers.of(part.row).inverse_correction2).sqrt_() + part.eps)
    # So that the root mean square of the whole stays what it was.
    size = (squares.mean() / (squares * factor.square()).mean().clamp_min(1e-30)).sqrt_()
    return direction.mul_((factor * size).to(direction.dtype)[:, None])
