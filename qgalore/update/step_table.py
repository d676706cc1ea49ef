"""The step rows of all weights on their device: kernels read scalars there, so that CUDA graphs can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore.kernels import StepScalars
from qgalore.seeding import ACCUMULATION, Seeds


class StepTable:
    """A row of each weight for its next update, and one for the next gradient that it adds to its sum."""

    def __init__(self, count: int) -> None:
        """count: the number of weights. The rows move to the device of the first write."""
        self.updates = torch.zeros(count, 8, dtype=torch.int32, device="cpu")
        self.update_rows = self.updates.unbind()
        """A view of each row."""
        self.sums = torch.zeros_like(self.updates)
        self.sum_rows = self.sums.unbind()

    def write_updates(self, scalars: Sequence[StepScalars], device: torch.device) -> None:
        """Set the rows of all updates."""
        self._move_to(device)
        _write(self.updates, [each.pack() for each in scalars])

    def write_sums(self, scalars: Sequence[StepScalars], device: torch.device) -> None:
        """Set the rows of all sums."""
        self._move_to(device)
        _write(self.sums, [each.pack() for each in scalars])

    def write_sum(self, index: int, scalars: StepScalars, device: torch.device) -> None:
        """Set the row of one sum; nothing while a graph is captured, whose rows are written before it is replayed."""
        self._move_to(device)
        if not is_capturing(device):
            _write(self.sum_rows[index], scalars.pack())

    def _move_to(self, device: torch.device) -> None:
        if self.updates.device != device:
            self.updates, self.sums = self.updates.to(device), self.sums.to(device)
            self.update_rows, self.sum_rows = self.updates.unbind(), self.sums.unbind()


class SumRows(NamedTuple):
    """The step rows for what one weight adds to its sums of gradients."""

    table: StepTable
    seeds: Seeds
    device: torch.device

    def scalars(self, addition: int) -> StepScalars:
        """What the row must contain; addition counts those of the update."""
        return StepScalars(self.seeds(ACCUMULATION, addition), -1.0, 1.0)

    def write(self, addition: int, dtype: torch.dtype) -> Tensor:
        """The row, written for a sum in INT8; others round to nearest and read nothing of it."""
        if dtype == torch.int8:
            self.table.write_sum(self.seeds.index, self.scalars(addition), self.device)
        return self.table.sum_rows[self.seeds.index]


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now is captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _write(rows: Tensor, values: object) -> None:
    source = torch.tensor(values, dtype=torch.int32, device="cpu")
    # A new pinned buffer each time: the copy may still be under way when the next one is written.
    rows.copy_(source.pin_memory() if rows.is_cuda else source, non_blocking=True)
