"""The arguments that belong to one matrix, for operations on a group of matrices."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

GROUP_LIMIT = 8
"""Matrices that one launch of a kernel takes."""

Item = TypeVar("Item")


class AdamStep(NamedTuple):
    """Arguments of `qgalore.kernels.adam_steps`, `momentum_steps` and `row_adam_steps` that belong to one weight."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq: Tensor | None
    """None where momentum is all that the weight has."""
    exp_avg_sq_absmax: Tensor | None
    row: Tensor
    betas: tuple[float, float]
    eps: float
    factor: Tensor | None = None
    dtype: torch.dtype = torch.float32


class RowNormalization(NamedTuple):
    """Arguments of `qgalore.kernels.normalize_rows` that belong to one matrix."""

    direction: Tensor
    scale: float
    """What the direction is multiplied with first."""
    second: Tensor
    """Second moments of the rows, (rows,) float32."""
    row: Tensor
    beta: float
    eps: float


class FloatUpdate(NamedTuple):
    """Arguments of `qgalore.kernels.update_float_` that belong to one weight."""

    weight: Tensor
    direction: Tensor
    left: Tensor | None
    right: Tensor | None
    row: Tensor
    stochastic: bool = True
    row_start: int = 0
    """The number of the first row in the matrix that the seed belongs to."""


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
    row: Tensor
    stochastic: bool = True


class QuantizedMatrix(NamedTuple):
    """Arguments of `qgalore.kernels.dequantize` that belong to one matrix."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int
    bits: int
    group_size: int
    out: Tensor | None = None


class Fp8Matrix(NamedTuple):
    """A factor of a product in FP8, which is summed along its rows."""

    codes: Tensor
    """float8_e4m3fn, (rows, depth), with zeros from the matrix's own columns on."""
    scale: Tensor
    """float32, (rows,): what the codes of a row are multiplied with."""


_FP8_MULTIPLE = 16


def fp8_width(size: int) -> int:
    """A side of a factor as cuBLASLt wants it: the next multiple of 16."""
    return -(-size // _FP8_MULTIPLE) * _FP8_MULTIPLE


def ceil_div(value: int, divisor: int) -> int:
    """The quotient rounded up. On the host `triton.cdiv` takes a hundred times as long (6 us, Triton 3.9)."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not less, for values from 1 up."""
    return 1 << (value - 1).bit_length()


def launches(items: Sequence[Item], key: Callable[[Item], Hashable], at_most: int = GROUP_LIMIT) -> list[list[int]]:
    """The indices of items by launch: those of one key, and not too many."""
    alike: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        alike.setdefault(key(item), []).append(index)
    return [indices[start : start + at_most] for indices in alike.values() for start in range(0, len(indices), at_most)]


def even_groups(items: Sequence[Item], at_most: int = GROUP_LIMIT) -> list[Sequence[Item]]:
    """Neighbours, in as few groups as there can be, of sizes that differ by one at most."""
    groups = ceil_div(len(items), at_most)
    starts = [len(items) * group // groups for group in range(groups + 1)] if groups else []
    return [items[start:end] for start, end in itertools.pairwise(starts)]


class StepScalars(NamedTuple):
    """What an update of one weight takes beside tensors."""

    seed: int
    """Of the stochastic rounding, 64 bits."""
    step_size: float
    """The direction is subtracted so many times."""
    decay: float
    """The weight is multiplied by it first."""
    inverse_correction1: float = 1.0
    """1 / (1 - beta1^step), Adam's bias correction of the first moment."""
    inverse_correction2: float = 1.0
    """The same of the second."""
    decay_of_growing: float | None = None
    """In the place of `decay` for values that the direction moves away from zero; None: `decay`."""

    def pack(self) -> list[int]:
        """As the eight 32-bit integers of a step row, floats by their bits.

        The last is zero, so that all rows of a table are aligned alike: for another alignment Triton would compile
        again.
        """
        low, high, growing = self.seed & 0xFFFFFFFF, self.seed >> 32, self.decay_of_growing
        floats = *self[1:5], self.decay if growing is None else growing
        return list(struct.unpack("<8i", struct.pack("<2I5fi", low, high, *floats, 0)))

    def row(self, device: torch.device | str = "cpu") -> Tensor:
        """As a step row, (8,) int32, which kernels read: so CUDA graphs can be replayed in a later step."""
        return torch.tensor(self.pack(), dtype=torch.int32, device=device)

    @classmethod
    def unpack(cls, row: Tensor) -> StepScalars:
        """From a step row; waits for its device."""
        low, high, *floats, _ = struct.unpack("<2I5fi", struct.pack("<8i", *row.tolist()))
        return cls(low | high << 32, *floats)

    @property
    def changes_nothing(self) -> bool:
        """Whether an update leaves every bit, as with a learning rate of 0: requantizing would move the grid."""
        return self.step_size == 0 and self.decay == 1


class StepNumbers(NamedTuple):
    """The floats of a step row, () each: views of it, which are read and written without waiting for its device."""

    step_size: Tensor
    decay: Tensor
    inverse_correction1: Tensor
    inverse_correction2: Tensor
    decay_of_growing: Tensor

    @classmethod
    def of(cls, row: Tensor) -> StepNumbers:
        """Those of a row as `StepScalars.row` makes it."""
        return cls(*row.view(torch.float32)[2:7].unbind())
