"""Products in INT8 in plain PyTorch.

They take weights with one group a row, and quantize each row of activations as they come: symmetrically to
-127 .. 127, with the scale absmax / 127. Integers are multiplied and summed exactly, whatever the order, and float32
turns the sums into values in one fixed order of operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_linear", "int8_linear_backward"]

_SMALLEST_ROW = 2.0**-118  # 127 over a smaller number, or a smaller number over 127, may leave float32
_EXACT_DEPTH = 1024  # so many products of -127 .. 127 and -128 .. 127 add up to at most 2^24


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) int8 in -127 .. 127 and a scale (rows,) float32 of the float32 matrix x: x ~ scale * code.

    To the nearest code, ties to even: |scale * code - x| <= scale / 2. A row whose magnitudes are all below 2^-118
    counts as zeros, with scale 0; of a row that is not finite the scale is not finite either.
    """
    absmax = x.abs().amax(dim=1)
    # A tensor of 127, since PyTorch divides a number by a tensor in two steps.
    inverse = torch.where(absmax >= _SMALLEST_ROW, torch.full_like(absmax, 127.0) / absmax, 0.0)
    codes = (x * inverse[:, None]).nan_to_num_(0.0).round_().to(torch.int8)
    return codes, torch.where(absmax < _SMALLEST_ROW, 0.0, absmax * (1.0 / 127.0))


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in int32, exact, of int8 matrices a (m, k) in -127 .. 127 and b (k, n), k at most 132,104."""
    product = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_DEPTH):
        part = slice(start, start + _EXACT_DEPTH)
        # Whole numbers of at most 2^24 at every step: exact in float32, for which there are fast products.
        with torch.autocast(a.device.type, enabled=False):
            product += (a[:, part].float() @ b[part].float()).to(torch.int32)
    return product


def _signed_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k int8, s and o (rows,) float32 with value = s k + o, of uint8 codes with one group a row."""
    s = scale[:, 0].float()
    return (codes ^ 128).view(torch.int8), s, zero_point[:, 0].float() + 128.0 * s


def int8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """See `qgalore.kernels.int8_linear`.

    With q, a the codes and scale of a row of x: a (s (q kᵀ) + o Σ q), exact but for the roundings of float32.
    """
    k, s, o = _signed_codes(qdata, scale, zero_point)
    q, a = quantize_rows(x[:, : qdata.shape[1]].float())
    total = q.sum(dim=1, dtype=torch.int32).float()[:, None]
    value = (int8_product(q, k.T).float().mul_(s).add_(total * o)).mul_(a[:, None])
    return _with_columns(value.to(x.dtype), width)


def int8_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """See `qgalore.kernels.int8_linear_backward`.

    The scales of the weight's rows lie along the sum, so they are part of what is quantized: with h, b the codes and
    scale of a row of grad s: b (h k) + Σ grad o. The second sum is one of float32 numbers.
    """
    k, s, o = _signed_codes(qdata, scale, zero_point)
    values = grad[:, : len(qdata)].float()
    h, b = quantize_rows(values * s)
    value = int8_product(h, k).float().mul_(b[:, None]).add_((values * o).sum(dim=1, keepdim=True))
    return _with_columns(value.to(grad.dtype), width)


def _with_columns(x: Tensor, width: int) -> Tensor:
    return x if width == x.shape[1] else torch.nn.functional.pad(x, (0, width - x.shape[1]))
