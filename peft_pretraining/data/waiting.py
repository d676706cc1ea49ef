"""A progress bar where a person has to wait for data: with its rate, and the time that is left where it is known."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")

# What takes no longer needs no bar; a log file gets a line now and then.
_DELAY_SECONDS = 2.0
_LINE_SECONDS = 10.0


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[..., object]]:
    """Gives what is to be called with each count of `unit` that is done, and with a better `total` where that is known
    by then; shown on standard error by the main rank.

    Without `total` there is no time left to show; without tqdm there is nothing.
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
    """The items, counted by a bar."""
    with progress(what, unit, total) as done:
        for item in items:
            yield item
            done(1)
