"""Steps of Adam and of Nesterov's momentum, and their block-wise 8-bit moments, in plain PyTorch.

The 8 bits are those of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import AdamStep, StepScalars
from qgalore.kernels.reference.group_quantization import SMALLEST_NORMAL
from qgalore.kernels.reference.rows import undone_if

__all__ = ["adam_steps", "dequantize_blocks", "momentum_steps", "quantize_blocks_"]

PART = 1 << 20
"""Values that plain PyTorch reads or writes at a time, in whole blocks: what it makes of a part beside it is small."""


@functools.lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of dynamic tree quantization, ascending, in [-1, 1] or [0, 1]: (256,) float32.

    With e leading zeros the decimal exponent is -e and the bits left hold a linear fraction over (0.1, 1]
    (arXiv 2110.02861, section 1.2; an unsigned map spends the sign bit on the fraction).
    """
    values = [0.0, 1.0]
    exponent_bits, fraction_bits = 7, 0 if signed else 1
    for exponent in range(exponent_bits):
        count = 2 ** (exponent + fraction_bits)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32, device="cpu")
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - exponent_bits + 1)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _map_midpoints(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed, device)
    return (values[:-1] + values[1:]) / 2


def _quantize_part(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes like x in uint8 and the largest magnitude of each block of the flattened x, (blocks,) float32.

    The nearest code of `dynamic_map`, but an unsigned value above zero never becomes zero.
    """
    flat = x.reshape(-1).float()
    blocks = -(-flat.numel() // block_size)
    padded = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel())).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1)
    # The reciprocal of the smallest numbers is infinite: such a block counts as zero.
    inverse = torch.where(absmax >= SMALLEST_NORMAL, 1.0 / absmax, 0.0)
    scaled = padded * inverse[:, None]
    codes = torch.bucketize(scaled, _map_midpoints(signed, x.device), out_int32=True)
    if not signed:
        # A second moment that became zero would make the next direction m / sqrt((1 - beta2) g^2), without bound.
        codes = torch.maximum(codes, (scaled > 0).to(torch.int32))
    codes = codes.to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(x.shape), absmax


def _dequantize_part(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """The float32 values of `_quantize_part`, shaped like codes."""
    # Eight bytes a value at the most: moments are read while much else is in memory.
    value = dynamic_map(signed, codes.device).index_select(0, codes.reshape(-1).int())
    whole = value.numel() // block_size
    value[: whole * block_size].view(whole, block_size).mul_(absmax[:whole, None])
    if whole < absmax.numel():
        value[whole * block_size :].mul_(absmax[whole])
    return value.view(codes.shape)


def quantize_blocks_(
    codes: Tensor, absmax: Tensor, x: Tensor, signed: bool, block_size: int, skip: Tensor | None = None
) -> None:
    """See `qgalore.kernels.quantize_blocks_`."""
    for part_x, *outs in _parts(block_size, x.contiguous(), codes, absmax):
        for out, new in zip(outs, _quantize_part(part_x, signed, block_size), strict=True):
            out.copy_(new if skip is None else torch.where(skip, out, new))


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `qgalore.kernels.dequantize_blocks`."""
    value = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, part_codes, part_absmax in _parts(block_size, value, codes, absmax):
        part.copy_(_dequantize_part(part_codes, part_absmax, signed, block_size))
    return value


def _parts(block_size: int, value: Tensor, codes: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flat views of values, their codes and absmax, of some whole blocks each."""
    blocks = max(1, PART // block_size)
    parts = (tensor.view(-1).split(blocks * block_size) for tensor in (value, codes))
    return zip(*parts, absmax.split(blocks), strict=True)


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.adam_steps`."""
    return [_adam_step(step, block_size, skip) for step in steps]


def momentum_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None) -> list[Tensor]:
    """See `qgalore.kernels.momentum_steps`."""
    return [_momentum_step(step, block_size, skip) for step in steps]


def _adam_step(step: AdamStep, block_size: int, skip: Tensor | None) -> Tensor:
    grad, exp_avg, absmax, exp_avg_sq, sq_absmax, row, betas, eps, factor, dtype = step
    assert exp_avg_sq is not None
    grad, corrections = scaled(grad, factor), StepScalars.unpack(row)[3:5]
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
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, corrections: tuple[float, ...], betas: tuple[float, float],
    eps: float,
) -> Tensor:  # fmt: skip
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
