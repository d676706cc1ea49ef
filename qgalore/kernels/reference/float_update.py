"""Directions projected back and added to float weights, in plain PyTorch, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qgalore.kernels.arguments import FloatUpdate, StepScalars
from qgalore.kernels.reference.random_bits import random_bits16, round_stochastic
from qgalore.kernels.reference.rows import decayed, project_back, row_chunks, undone_if

__all__ = ["update_float_"]


def update_float_(updates: Sequence[FloatUpdate], skip: Tensor | None) -> None:
    """See `qgalore.kernels.update_float_`; of matrices."""
    for update in updates:
        _update_(*update, skip)


def _update_(
    weight: Tensor, direction: Tensor, left: Tensor | None, right: Tensor | None, row: Tensor, stochastic: bool,
    row_start: int, skip: Tensor | None,
) -> None:  # fmt: skip
    seed, step_size, *_ = scalars = StepScalars.unpack(row)
    for start, stop in row_chunks(*weight.shape):
        full, part = project_back(direction, left, right, start, stop), weight[start:stop]
        with undone_if(skip, part):
            value = decayed(part.float(), full, scalars).sub_(full * step_size)
            if stochastic:
                random = random_bits16(len(part), part.shape[1], seed, row_start + start, weight.device)
                value = round_stochastic(value, random, weight.dtype)
            part[:] = value
