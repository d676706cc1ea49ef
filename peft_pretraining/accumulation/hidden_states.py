"""The hidden states of all micro-batches of an update, in host memory.

There is a *row* for each micro-batch at each boundary between two layers. A pass over the micro-batches reads the rows
of one boundary, or of two, and writes those of another; or writes each row that it has read, as gradients do.

On a CUDA device rows stream through six buffers of one micro-batch, while the device computes: of a boundary that is
read two, and of what is written two. One side stream copies to the device and another from it, so that both directions
of the link are busy at the same time. What keeps each copy right is an event:

- a row is copied to a buffer after the consumer of the row before in this buffer, and after the row was written;
- the consumer of a row begins after that copy;
- what is written goes to a buffer after the copy of what was in it before, and from there to the host after that.

A row on the host is written after it was read: by what was computed of it, or of an update before, which has waited for
the copy. The host waits for nothing, and no buffer is ever given back to PyTorch's allocator while a copy uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from peft_pretraining.accumulation.host_memory import locked_for_hidden_states
from qgalore.offload.side_stream import CudaStreams, Event, Streams

BUFFERS_OF_A_MICRO_BATCH = 6
"""Of a CUDA device, each for the hidden states of one micro-batch."""


class HiddenStates(Protocol):
    """Rows (B, L, hidden_size) by boundary and micro-batch."""

    def read(self, boundary: int) -> Iterator[Tensor]:
        """The row of each micro-batch in order, on the device: valid, and free to be written to, until the next one.

        At most two boundaries are read at the same time, each to its end.
        """

    def write(self, boundary: int, micro_batch: int, value: Tensor) -> None:
        """Set a row; `value` may be overwritten as soon as this returns."""


class HostHiddenStates:
    """Those of a run on the CPU: plain copies."""

    def __init__(self, boundaries: int, micro_batches: int, like: Tensor) -> None:
        """like: a row."""
        self._rows = [like.new_empty((micro_batches, *like.shape)) for _ in range(boundaries)]

    def read(self, boundary: int) -> Iterator[Tensor]:
        """See `HiddenStates`."""
        for row in self._rows[boundary]:
            yield row.clone()

    def write(self, boundary: int, micro_batch: int, value: Tensor) -> None:
        """See `HiddenStates`."""
        self._rows[boundary][micro_batch].copy_(value)


class StreamedHiddenStates:
    """Those of a run on another device, in host memory that its streams can read and write."""

    def __init__(self, host: list[Tensor], like: Tensor, streams: Streams) -> None:
        """host: of each boundary its rows (micro-batches, B, L, hidden_size); like: a row on the device."""
        self._host, self._streams = host, streams
        self._to_device, self._to_host = streams.side_stream(), streams.side_stream()
        self._pairs = [[torch.empty_like(like) for _ in range(2)] for _ in range(3)]
        """Two for rows that are read, two for those of another boundary, two for what is written."""
        self._free: dict[int, Event] = {}
        """By the address of a buffer: when it may be written to."""
        self._written: dict[tuple[int, int], Event] = {}
        """By boundary and micro-batch."""
        self._reading: set[int] = set()
        """The pairs that are in use."""
        self._writes = 0

    def read(self, boundary: int) -> Iterator[Tensor]:
        """See `HiddenStates`; the next row is on its way while one is used."""
        pair = 0 if 0 not in self._reading else 1
        self._reading.add(pair)
        buffers, count = self._pairs[pair], len(self._host[boundary])
        ready = [self._fetch(boundary, number, buffers[number]) for number in range(min(2, count))]
        try:
            for number in range(count):
                buffer = buffers[number % 2]
                self._streams.wait(ready[number % 2])
                yield buffer
                self._free[buffer.data_ptr()] = self._streams.mark()
                if number + 2 < count:
                    ready[number % 2] = self._fetch(boundary, number + 2, buffer)
        finally:
            self._reading.remove(pair)

    def _fetch(self, boundary: int, micro_batch: int, buffer: Tensor) -> Event:
        after = [self._free.get(buffer.data_ptr()), self._written.get((boundary, micro_batch))]
        row = self._host[boundary][micro_batch]
        return self._to_device.copy(buffer, row, [event for event in after if event is not None])

    @torch.no_grad()
    def write(self, boundary: int, micro_batch: int, value: Tensor) -> None:
        """See `HiddenStates`."""
        buffer = self._pairs[2][self._writes % 2]
        self._writes += 1
        if (sent := self._free.get(buffer.data_ptr())) is not None:
            self._streams.wait(sent)
        buffer.copy_(value)
        sent = self._to_host.copy(self._host[boundary][micro_batch], buffer, [self._streams.mark()])
        self._free[buffer.data_ptr()] = self._written[boundary, micro_batch] = sent


def hidden_states(boundaries: int, micro_batches: int, like: Tensor) -> HiddenStates:
    """Hidden states for a device: that of `like`, a row. Raises UserError where the host has no memory for them."""
    if like.device.type != "cuda":
        return HostHiddenStates(boundaries, micro_batches, like)
    streams = CudaStreams(like.device)
    host: list[Tensor] = []
    states = StreamedHiddenStates(host, like, streams)
    host += locked_for_hidden_states(states, [torch.Size((micro_batches, *like.shape))] * boundaries, like.dtype)
    return states
