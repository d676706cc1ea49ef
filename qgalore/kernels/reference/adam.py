"""Adam's and Nesterov's steps in plain PyTorch, in float32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qgalore.kernels.arguments import AdamStep, StepScalars
from qgalore.kernels.reference.block_quantization import dequantize_blocks, quantize_blocks_
from qgalore.kernels.reference.rows import undone_if

__all__ = ["adam_steps", "momentum_steps"]


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.adam_steps`."""
    return [_adam_step(step, block_size, skip) for step in steps]


def momentum_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.momentum_steps`."""
    return [_momentum_step(step, block_size, skip) for step in steps]


def _adam_step(step: AdamStep, block_size: int, skip: Tensor | None) -> Tensor:
    grad, exp_avg, absmax, exp_avg_sq, sq_absmax, row, betas, eps, factor, dtype = step
    assert exp_avg_sq is not None
    grad, corrections = scaled(grad, factor), StepScalars.unpack(row)[3:]
    with undone_if(skip, exp_avg, absmax, exp_avg_sq, sq_absmax):
        if absmax is None or sq_absmax is None:
            return adam_direction(grad, exp_avg, exp_avg_sq, corrections, betas, eps).to(dtype)
        first = dequantize_blocks(exp_avg, absmax, True, block_size)
        second = dequantize_blocks(exp_avg_sq, sq_absmax, False, block_size)
        direction = adam_direction(grad, first, second, corrections, betas, eps)
        quantize_blocks_(exp_avg, absmax, first, True, block_size)
        quantize_blocks_(exp_avg_sq, sq_absmax, second, False, block_size)
    return direction.to(dtype)


def _momentum_step(step: AdamStep, block_size: int, skip: Tensor | None) -> Tensor:
    exp_avg, absmax, beta = step.exp_avg, step.exp_avg_absmax, step.betas[0]
    grad = scaled(step.grad, step.factor)
    with undone_if(skip, exp_avg, absmax):
        if absmax is None:
            return nesterov_momentum(grad, exp_avg, beta).to(step.dtype)
        momentum = dequantize_blocks(exp_avg, absmax, True, block_size)
        ahead = nesterov_momentum(grad, momentum, beta)
        quantize_blocks_(exp_avg, absmax, momentum, True, block_size)
    return ahead.to(step.dtype)


def scaled(grad: Tensor, factor: Tensor | None) -> Tensor:
    """factor * grad in float32; None stands for 1."""
    return grad.float() if factor is None else grad.float() * factor


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    corrections: tuple[float, ...],
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """N = m_hat / (sqrt(v_hat) + eps) after moving the float32 moments m, v in place towards grad (Kingma & Ba).

    corrections: 1 / (1 - beta^step) of both.

    Each product and sum is rounded by itself (no fused multiply-add), so that a kernel can give the same bits.
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad * (1.0 - beta1))
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(1.0 - beta2))
    denominator = (exp_avg_sq * corrections[1]).sqrt_().add_(eps)
    return (exp_avg * corrections[0]).div_(denominator)


def nesterov_momentum(grad: Tensor, exp_avg: Tensor, beta: float) -> Tensor:
    """beta m + (1 - beta) g after moving the float32 momentum m so in place; rounded as in `adam_direction`."""
    step = grad * (1.0 - beta)
    exp_avg.mul_(beta).add_(step)
    return (exp_avg * beta).add_(step)
