"""Adam's and Nesterov's steps in plain PyTorch, on float32 moments."""

from __future__ import annotations

from torch import Tensor


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
