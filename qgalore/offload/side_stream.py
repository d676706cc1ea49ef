"""Copies between host and device beside the computation, in the order in which events let them happen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any
"""A point in the work of a stream, of the kind that the streams of a device have, such as `torch.cuda.Event`."""


class SideStream(Protocol):
    """Copies that are made one after the other, beside what the device computes meanwhile."""

    def copy(self, out: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """Copy source into out once the events have come; returns the end of the copy. The host does not wait."""


class Streams(Protocol):
    """The streams of a device."""

    def mark(self) -> Event:
        """The end of what the device has been given to compute so far."""

    def wait(self, event: Event) -> None:
        """Let later computation begin after an event; the host does not wait."""

    def side_stream(self) -> SideStream:
        """A new stream for copies."""

    def join(self) -> None:
        """Let the host wait for all that the device has been given: never in the steady step."""


class CudaStreams:
    """Those of a CUDA device; what is computed is launched on the stream that is current at each call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Event:
        """See `Streams`."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: Event) -> None:
        """See `Streams`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def side_stream(self) -> SideStream:
        """See `Streams`."""
        return CudaSideStream(self._device)

    def join(self) -> None:
        """See `Streams`."""
        torch.cuda.synchronize(self._device)


class CudaSideStream:
    """A CUDA stream for copies; those from and to pageable memory would make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, out: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """See `SideStream`."""
        for event in after:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            out.copy_(source, non_blocking=True)
        return self._stream.record_event()


class HostStreams:
    """Those of a CPU, whose work is done when it is asked for: so are copies, and no event has to be waited for."""

    def mark(self) -> Event:
        """See `Streams`."""

    def wait(self, event: Event) -> None:
        """See `Streams`."""

    def side_stream(self) -> SideStream:
        """See `Streams`."""
        return self

    def join(self) -> None:
        """See `Streams`."""

    def copy(self, out: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """See `SideStream`."""
        out.copy_(source)
