"""Work of a device beside what is launched after it: the updates of a layer, and the backward pass of the next one.

The kernels of a small model leave a GPU idle in many places: for a microsecond between two of them, where the last
blocks of one are fewer than the multiprocessors, and where one waits for memory while another could compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Beside:
    """A second stream, and memory for graphs that run on it."""

    def __init__(self, device: torch.device) -> None:
        """On a CPU all is done at once."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done: dict[int, torch.cuda.Event] = {}
        self.pool: Any = torch.cuda.graph_pool_handle()
        """Of these graphs alone: those of the first stream write over their own memory meanwhile."""

    def launch(self, number: int, work: Callable[[], None]) -> None:
        """Do it after all that has been launched by now, and beside what will be; `number` is for `wait_for`."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
            self._done[number] = self._stream.record_event()

    def wait_for(self, number: int) -> None:
        """Let later work wait for that of a number, if there is such."""
        if (event := self._done.pop(number, None)) is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

    def join(self) -> None:
        """Let later work wait for all."""
        self._done.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
