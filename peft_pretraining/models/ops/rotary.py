"""Rotary positions (Su et al., "RoFormer", arXiv 2104.09864) of queries and keys.

A head's values are pairs (x[i], x[i + head_dim / 2]), turned by the angle of their position and frequency:

    y[i] = x[i] cos - x[i + head_dim / 2] sin,   y[i + head_dim / 2] = x[i + head_dim / 2] cos + x[i] sin

in float32, rounded once. The gradient is the same rotation backwards, and needs the tables alone; those of queries and
keys are columns of one matrix, so that one product takes both on (`qgalore.layer.autograd_op`).

It is an operator of its own. A compiler makes one kernel a tensor of it, in which each value loads both of its pair and
both of its tables: 64 us where the bytes take 31 (64k tokens of 8 heads of 64, H200). Here a thread turns whole pairs
(`rotary_kernel`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.models.rope import RopeScaling
from qgalore.kernels import use_triton


def rotary_tables(
    length: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, float32 (length, head_dim / 2) each."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent  # (head_dim / 2,)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequency)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = (1 - kept) * (frequency / scaling.factor) + kept * frequency
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, L, heads, head_dim) and keys (B, L, kv_heads, head_dim) at positions 0 to L - 1, turned."""
    turned: tuple[Tensor, Tensor] = torch.ops.peft_pretraining.rotate(query, key, cos, sin, False)
    return turned


_library = torch.library.Library("peft_pretraining", "FRAGMENT")
_library.define(
    "rotate(Tensor query, Tensor key, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    tags=torch.Tag.flexible_layout,  # a gradient comes as attention's backward pass lays it out
)


@torch.library.impl(_library, "rotate", "CompositeExplicitAutograd")
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    outputs = _new_outputs(query, key, back)
    if use_triton(query.device):
        from peft_pretraining.models.ops import rotary_kernel

        rotary_kernel.rotate(query, key, cos, sin, back, *outputs)
    else:
        for x, output in zip((query, key), outputs, strict=True):
            output.copy_(_turned(x, cos, -sin if back else sin))
    return outputs


def _new_outputs(query: Tensor, key: Tensor, adjacent: bool) -> tuple[Tensor, Tensor]:
    """Where the turned queries and keys go: side by side they are columns of one matrix (tokens, all of both)."""
    if not adjacent:
        return query.new_empty(query.shape), key.new_empty(key.shape)
    batch, length, heads, head_dim = query.shape
    both = query.new_empty(batch, length, heads + key.shape[2], head_dim)
    return both[:, :, :heads], both[:, :, heads:]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (L, 1, head_dim / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.library.register_fake("peft_pretraining::rotate")
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return _new_outputs(query, key, back)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *_, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, query_grad: Tensor, key_grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.peft_pretraining.rotate(query_grad, key_grad, *ctx.saved_tensors, not ctx.back), None, None, None


torch.library.register_autograd("peft_pretraining::rotate", _backward, setup_context=_setup_context)
