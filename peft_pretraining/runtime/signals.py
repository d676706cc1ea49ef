"""Stop a run cleanly on SIGTERM (torchrun, SLURM), SIGINT (Ctrl-C) or SIGUSR1 (SLURM's warning)."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Records that a signal asked for a stop; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        """Install the signal handlers; call it in the main thread."""
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
