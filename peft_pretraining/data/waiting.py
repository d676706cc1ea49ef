"""A progress bar for slow steps of opening data, with the rate and, where known, the time left."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")

# Shorter steps show no bar; a log file gets a line in this interval.
_DELAY_SECONDS = 2.0
_LINE_SECONDS = 10.0


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[..., object]]:
    """Show a bar on standard error of the main rank; yields a function `done(count, better_total=None)`.

    It adds `count` of `unit`, and may correct the `total`. Without `total` the bar shows no time left; without tqdm
    nothing is shown.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda *_: None
        return
    interval = 0.2 if sys.stderr.isatty() else _LINE_SECONDS
    hidden = os.environ.get("RANK", "0") != "0"
    with tqdm(
        desc=what, unit=f" {unit}", total=total, delay=_DELAY_SECONDS, mininterval=interval, unit_scale=True,
        disable=hidden,
    ) as bar:  # fmt: skip

        def done(count: int, better_total: int | None = None) -> None:
            if better_total is not None:
                bar.total = better_total
            bar.update(count)

        yield done


def with_progress(items: Iterable[_Item], what: str, unit: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items, counted by a bar."""
    with progress(what, unit, total) as done:
        for item in items:
            yield item
            done(1)
