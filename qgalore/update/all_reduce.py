"""The gradients of several weights on their way to be summed over the ranks, in one bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Waiting(Protocol):
    """A sum that has been started, such as `torch.distributed.Work`."""

    def wait(self) -> object:
        """Until it is there; on a GPU its stream waits, not the host."""


AllReduce = Callable[[Tensor], Waiting | None]
"""Sums a tensor over all ranks, in place; what it returns, if anything, is to be waited for."""


class Bucket:
    """Tensors that are sent as one: made, then `start`ed, then `summed`; other work may come in between.

    They are summed in the dtype that all can be held in: bfloat16 gradients of one micro-batch, and sums in INT8, in
    bfloat16, half the bytes of float32, in which other sums over micro-batches are.
    """

    def __init__(self, parts: list[list[Tensor]], all_reduce: AllReduce, buffer: Tensor | None = None) -> None:
        """parts: some tensors of each weight. They are gathered in `buffer`, flat, if it has just its size.

        It then has the buffer's dtype.
        """
        self._all_reduce = all_reduce
        self._waiting: Waiting | None = None
        flat = [part for of_weight in parts for part in of_weight]
        self._shapes = [[part.shape for part in of_weight] for of_weight in parts]
        self._sizes = [part.numel() for part in flat]
        fits = buffer is not None and buffer.numel() == sum(self._sizes)
        self.buffer = self._gathered([part.flatten() for part in flat], buffer if fits else None)

    def _gathered(self, flat: list[Tensor], buffer: Tensor | None) -> Tensor:
        """The values of all parts behind each other, in `buffer` where there is one; of a single part itself."""
        return flat[0] if len(flat) == 1 and buffer is None else torch.cat(flat, out=buffer)

    def start(self) -> None:
        """Send them; what is launched afterwards does not wait for it."""
        self._waiting = self._all_reduce(self.buffer)

    def wait(self) -> None:
        """Let later work wait for the sums."""
        if self._waiting is not None:
            self._waiting.wait()
            self._waiting = None

    def summed(self) -> list[list[Tensor]]:
        """The sums, in the shape of the parts, as views of the bucket; later work waits for them."""
        self.wait()
        pieces = iter(self.buffer.split(self._sizes))
        return [[next(pieces).view(shape) for shape in shapes] for shapes in self._shapes]
