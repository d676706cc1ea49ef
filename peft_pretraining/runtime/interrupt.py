"""Ctrl-C while a program is still loading its libraries, which takes seconds: one line and exit code 130."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 130
"""What a shell expects of a program that Ctrl-C has ended: 128 and the number of SIGINT."""


def end_on_interrupt(program: str) -> None:
    """Let SIGINT end the process at once, with a line that names the program, until another handler is installed.

    Not by an exception: libraries in C that are being loaded make others of it, or go on.
    """

    def end(number: int, frame: FrameType | None) -> None:
        print(f"\n{program}: interrupted while it was starting", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def ending_on_interrupt(program: str) -> Iterator[None]:
    """`end_on_interrupt` for as long as the body runs; in the main thread, since others may set no handler."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    end_on_interrupt(program)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
