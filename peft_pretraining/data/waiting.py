"""A progress bar where a person has to wait for data: with its rate and the time that is left."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")

# What takes no longer needs no bar; a log file gets a line now and then.
_DELAY_SECONDS = 2.0
_LINE_SECONDS = 10.0


def with_progress(items: Iterable[_Item], what: str, unit: str, total: int | None = None) -> Iterator[_Item]:
    """The items, counted on standard error by the main rank, where tqdm is there."""
    bar = None
    if os.environ.get("RANK", "0") == "0":
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            interval = 0.2 if sys.stderr.isatty() else _LINE_SECONDS
            bar = tqdm(
                desc=what, unit=f" {unit}", total=total, delay=_DELAY_SECONDS, mininterval=interval, unit_scale=True
            )
    try:
        for item in items:
            yield item
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
