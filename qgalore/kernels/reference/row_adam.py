"""Steps of Adam with one second moment a row, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, StepNumbers
from qgalore.kernels.reference.adam import momentum_steps, scaled

__all__ = ["row_adam_steps"]


def row_adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.row_adam_steps`."""
    momenta = momentum_steps([step._replace(dtype=torch.float32) for step in steps], block_size, skip)
    return [_over_rms_of_rows(step, momentum, skip) for step, momentum in zip(steps, momenta, strict=True)]


def _over_rms_of_rows(step: AdamStep, momentum: Tensor, skip: Tensor | None) -> Tensor:
    """The momentum over the root of its rows' second moments, which are moved; both without bias."""
    assert step.exp_avg_sq is not None
    beta1, beta2 = step.betas
    grad = scaled(step.grad, step.factor)
    squares = (grad.square() if grad is step.grad else grad.square_()).mean(dim=1)
    second = step.exp_avg_sq * beta2 + squares * (1.0 - beta2)
    step.exp_avg_sq.copy_(second if skip is None else torch.where(skip, step.exp_avg_sq, second))
    numbers = StepNumbers.of(step.row)
    # Nesterov's momentum of a constant gradient g is (1 - beta1^(step + 1)) g.
    ahead = 1.0 - beta1 * (1.0 - 1.0 / numbers.inverse_correction1)
    root = (second * numbers.inverse_correction2).sqrt_()
    return momentum.mul_((1.0 / (ahead * (root + step.eps)))[:, None]).to(step.dtype)
