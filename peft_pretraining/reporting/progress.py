"""Progress of a run on standard error: a bar on a terminal, now and then a line in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

_LINE_SECONDS = 10.0


class Progress:
    """Shows metrics of updates on standard error: with a bar if that is a terminal and tqdm is installed, else lines.

    Lines are printed for the first and last update, and at most every ten seconds in between. The run itself logs a
    line for each evaluation.
    """

    def __init__(self, total_updates: int, start_update: int = 0, terminal: bool | None = None) -> None:
        """`terminal`: whether to show a bar; None: if standard error is a terminal."""
        self._total = total_updates
        self._first = start_update
        self._start = time.monotonic()
        self._last_line = float("-inf")
        wants_bar = sys.stderr.isatty() if terminal is None else terminal
        self._bar = _make_bar(total_updates, start_update) if wants_bar else None
        self._shown: dict[str, float] = {}

    def show(self, update_step: int, metrics: Mapping[str, float]) -> None:
        """Show the state after `update_step` updates."""
        if self._bar is None and any(name.startswith("eval/") for name in metrics):
            return
        self._shown |= {name: value for name, value in metrics.items() if name in _SHORT or name.startswith("eval/")}
        if self._bar is not None:
            self._bar.update(update_step - self._bar.n)
            self._bar.set_postfix_str(describe(self._shown), refresh=False)
            return
        if time.monotonic() - self._last_line >= _LINE_SECONDS or update_step >= self._total:
            self._last_line = time.monotonic()
            left = f", {format_seconds(self._seconds_left(update_step))} left" if update_step < self._total else ""
            self.log(f"update {update_step}/{self._total}: {describe(self._shown)}{left}")

    def log(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _seconds_left(self, update_step: int) -> float:
        done = max(1, update_step - self._first)
        return (time.monotonic() - self._start) / done * (self._total - update_step)


def _make_bar(total_updates: int, start_update: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total_updates, initial=start_update, unit="update", dynamic_ncols=True, file=sys.stderr)


_SHORT = {
    "train/loss": "loss {:.3f}",
    "train/perplexity": "ppl {:.2f}",
    "eval/perplexity": "eval ppl {:.2f}",
    "train/lr": "lr {:.2e}",
    "throughput/tokens_per_second": "{} tok/s",
    "memory/peak_gb": "{:.2f} GB",
}


def describe(metrics: Mapping[str, float]) -> str:
    """The most important metrics in a fixed order, such as `loss 4.213, ppl 67.56, lr 1.00e-03, 12.3k tok/s`."""
    parts = []
    for name, form in _SHORT.items():
        if name in metrics:
            value = metrics[name]
            parts.append(form.format(format_rate(value) if name.startswith("throughput/") else value))
    return ", ".join(parts)


def format_rate(value: float) -> str:
    """Format a rate in three digits: 950, 12.3k, 1.26M."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """Format a duration as 45s, 3m20s, 5h07m or 2d03h."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{name}"
    return f"{whole}s"
