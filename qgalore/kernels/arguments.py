"""What the work on one matrix is made of, for kernels that work on several matrices in one launch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MATRICES_TOGETHER = 8
"""Matrices that one launch of a kernel takes."""

Item = TypeVar("Item")


class AdamStep(NamedTuple):
    """Arguments of `qgalore.kernels.adam_step` that belong to one weight."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor | None
    step: int
    betas: tuple[float, float]
    eps: float
    factor: Tensor | None = None
    dtype: torch.dtype = torch.float32
    numbers: Tensor | None = None


class QuantizedUpdate(NamedTuple):
    """Arguments of `qgalore.kernels.update_quantized_` that belong to one weight."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    direction: Tensor
    left: Tensor | None
    right: Tensor | None
    columns: int
    bits: int
    group_size: int
    step_size: float
    decay: float
    seed: int | None
    numbers: Tensor | None = None


class QuantizedMatrix(NamedTuple):
    """Arguments of `qgalore.kernels.dequantize` that belong to one matrix."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int
    bits: int
    group_size: int
    out: Tensor | None = None


def launches(
    items: Sequence[Item], key: Callable[[Item], Hashable], at_most: int = MATRICES_TOGETHER
) -> list[list[int]]:
    """The places of items by launch: those of one key, and not too many."""
    alike: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        alike.setdefault(key(item), []).append(place)
    return [places[start : start + at_most] for places in alike.values() for start in range(0, len(places), at_most)]


def numbers_row(seed: int, step_size: float, decay: float, step: int, betas: tuple[float, float]) -> list[int]:
    """The numbers of one weight's update as eight 32-bit integers, floats by their bits, for a row of a tensor.

    Kernels that read them from the device, (8,) int32, can be replayed from a CUDA graph in later updates. The last two
    are zeros, so that all rows of a table are aligned alike: for another alignment Triton would compile again.
    """
    halves = (seed & 0xFFFFFFFF, seed >> 32)
    floats = (step_size, decay, 1.0 / (1.0 - betas[0] ** step), 1.0 / (1.0 - betas[1] ** step))
    return list(struct.unpack("<8i", struct.pack("<2I4f2i", *halves, *floats, 0, 0)))


def seed_words(seed: int | None) -> tuple[int, int]:
    """Twice the lower and the upper half of a seed, 0 for none, plus 1, plus 2^40.

    Triton compiles anew for numbers in a tuple that are 1, multiples of 16, or wider than others: these never differ.
    """
    low, high = divmod(seed or 0, 1 << 32)[::-1]
    return 2 * low + 1 + (1 << 40), 2 * high + 1 + (1 << 40)
