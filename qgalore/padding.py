"""Zeros beyond the edge of a ragged matrix, so that the tensor cores can multiply it.

A product of which a side is no multiple of eight, such as the 5461 columns of LLaMA-1B's MLP, falls back to kernels
that are ten times slower (docs/performance.md), whatever the distance between its rows. Zeros change no sum, so a
result that is cut again to its own width is exact.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def padded_width(width: int) -> int:
    """`width` where the tensor cores take it, else the next multiple of 16."""
    return width if width % 8 == 0 else -(-width // 16) * 16


def with_padded_columns(x: Tensor) -> Tensor:
    """x (..., n) itself, or a copy with zeros up to the padded width."""
    missing = padded_width(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def cut_columns(x: Tensor, width: int) -> Tensor:
    """x (..., n) itself if n is `width`, else a copy of its first columns."""
    return x if x.shape[-1] == width else x[..., :width].contiguous()
