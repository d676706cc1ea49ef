"""SwiGLU, and one whose inputs a compiled layer keeps for its backward pass in 8 bits a value instead of 16.

Gate and up are half of what a decoder layer keeps. Here the product is made of both rounded to INT8,

    silu(g') * u',   g' = code * scale,   |g' - g| <= scale / 2,   scale = 1.01 * largest magnitude of 128 values / 127

in the forward pass, too: so codes and scales are all that its gradient needs, which is exact for g' and u' and goes
to g and u as it is (a straight-through estimator; Bengio et al., arXiv 1308.3432). Of values that are normally
distributed a rounding moves one by 0.6 % of their standard deviation; a bfloat16 has an error of 0.2 % of itself.

These are ordinary operations, of which a compiler makes one kernel each way. It finds by itself that codes are the
least that can be kept. Without a compiler the rounding is the same, and nothing is saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 128
"""Values that share a scale, one after another in memory; fewer where that does not divide a micro-batch."""
_SMALLEST_GROUP = 16  # of less, the scales would take what the codes save


def group_size_of(values: int) -> int | None:
    """Values that share a scale among so many; None where there is no group worth it, and they are kept as they are."""
    size = math.gcd(values, GROUP_SIZE)
    return size if size >= _SMALLEST_GROUP else None


class _ThroughInt8(torch.autograd.Function):
    """x (groups, values) rounded to what INT8 codes with a bfloat16 scale a group can hold, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        # A little more than needed, so that no code leaves [-127, 127] where the scale was rounded down.
        largest = x.abs().amax(1, keepdim=True).float().clamp_min(1e-30)
        scale = (largest * (1.01 / 127)).to(torch.bfloat16)
        codes = torch.round(x.float() * (1.0 / scale.float())).to(torch.int8)
        return codes.float() * scale.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def swiglu_through_int8(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with both rounded to INT8; shapes and dtypes are one, and so is the result's."""
    size = group_size_of(gate.numel())
    if size is None:
        return swiglu(gate, up)
    rounded_gate, rounded_up = (_ThroughInt8.apply(x.reshape(-1, size)) for x in (gate, up))
    return swiglu(rounded_gate, rounded_up).to(gate.dtype).view(gate.shape)
