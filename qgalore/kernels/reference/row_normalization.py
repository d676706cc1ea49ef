"""Rows of directions over the roots of their second moments, with the size of the whole kept, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import RowNormalization, StepNumbers
from qgalore.torch_internals import internal

__all__ = ["normalize_rows"]


def normalize_rows(parts: Sequence[RowNormalization], skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.normalize_rows`."""
    scaled: list[Tensor] = internal("torch._foreach_mul")([p.direction for p in parts], [p.scale for p in parts])
    return [_normalized(part, direction, skip) for part, direction in zip(parts, scaled, strict=True)]


def _normalized(part: RowNormalization, direction: Tensor, skip: Tensor | None) -> Tensor:
    squares = torch.linalg.vector_norm(direction, dim=1, dtype=torch.float32).square_() / direction.shape[1]
    second = part.second * part.beta + squares * (1.0 - part.beta)
    part.second.copy_(second if skip is None else torch.where(skip, part.second, second))
    factor = 1.0 / ((second * StepNumbers.of(part.row).inverse_correction2).sqrt_() + part.eps)
    # So that the root mean square of the whole stays what it was.
    size = (squares.mean() / (squares * factor.square()).mean().clamp_min(1e-30)).sqrt_()
    return direction.mul_((factor * size).to(direction.dtype)[:, None])
