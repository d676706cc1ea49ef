"""How often the files of a folder are opened, by whatever process and library: Linux's inotify counts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

IN_OPEN, IN_CLOSE = 0x20, 0x18
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


@contextlib.contextmanager
def counted_opens(folder: Path) -> Iterator[Counter[str]]:
    """Within it every opening of a file in `folder` is noted; the counter is filled at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    # Equal events in a row become one: the closing lies between two openings.
    assert handle >= 0 and libc.inotify_add_watch(handle, str(folder).encode(), IN_OPEN | IN_CLOSE) >= 0
    counts: Counter[str] = Counter()
    try:
        yield counts
        with contextlib.suppress(BlockingIOError):
            while data := os.read(handle, 1 << 16):
                at = 0
                while at < len(data):
                    _, mask, _, length = _EVENT.unpack_from(data, at)
                    name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
                    at += _EVENT.size + length
                    if mask & IN_OPEN and name:
                        counts[name] += 1
    finally:
        os.close(handle)
