"""Matrices whose rows start at aligned addresses, whatever their width.

Tensor cores are fed by copies of 16 bytes. A matrix whose rows are not a multiple of that apart, such as one of the
5461 columns of LLaMA-1B's MLP, falls back to kernels that are many times slower (docs/performance.md). The shape stays
as it is; only the distance between rows grows, by less than 32 bytes: no value is added and no result changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = 32  # twice what the copies need: Triton then loads 16 values of bfloat16 at once


def _row_distance(columns: int, element_size: int) -> int:
    unit = _BYTES // element_size
    return -(-columns // unit) * unit


def empty_with_aligned_rows(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialized tensor of `shape` with the dtype and device of `like`, the last dimension contiguous."""
    distance = _row_distance(shape[-1], like.element_size())
    if distance == shape[-1]:
        return like.new_empty(shape)
    return like.new_empty((*shape[:-1], distance))[..., : shape[-1]]


def with_aligned_rows(x: Tensor) -> Tensor:
    """x itself where its rows are aligned and all at one distance, else such a copy."""
    step = _row_distance(x.shape[-1], x.element_size())
    if x.stride(-1) == 1:
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if stride != step:
                break
            step *= size
        else:
            return x
    return empty_with_aligned_rows(tuple(x.shape), x).copy_(x)


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N), with aligned rows."""
    if _row_distance(b.shape[1], a.element_size()) == b.shape[1]:
        return a @ b
    return torch.mm(a, b, out=empty_with_aligned_rows((a.shape[0], b.shape[1]), a))
