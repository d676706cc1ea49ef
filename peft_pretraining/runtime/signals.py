"""Stopping a run in good order: SIGTERM (torchrun, SLURM), SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning)."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop was asked for; a second SIGINT stops at once."""

    def __init__(self) -> None:
        """Takes over the signals' handlers; call it in the main thread."""
        self.signal_name: str | None = None
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None
