"""The metrics of a run as curves: series by updates, tokens or hours, running means, thinned points, last values."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.jsonl import METRICS_FILE, read_lines

X_AXES = {"updates": "updates", "tokens": "tokens", "hours": "hours of updates"}
"""What curves can be drawn by, and the text at the axis. Hours are those of updates: no evaluations, no checkpoints."""
_WINDOWS = 50
"""A running mean is by default over this part of a run."""


class Series(NamedTuple):
    """Points of a curve, by ascending x."""

    x: list[float]
    y: list[float]


class LastValues(NamedTuple):
    """What a run has come to; None where it has no such metric."""

    updates: int
    tokens: float | None
    train_loss: float | None
    """The running mean at the last update, in nats a token."""
    perplexity: float | None
    """Of the last evaluation, as exp(mean nats a token); inf where it is not finite."""
    perplexity_official: float | None
    """The same by the official code's formula."""
    peak_gb: float | None
    hours: float | None


class RunCurves:
    """The metrics of the run in one folder."""

    def __init__(self, save_dir: Path, lines: Sequence[dict[str, Any]], damaged: int = 0) -> None:
        """lines: of its metrics.jsonl, each with an update_step; damaged: how many more cannot be read."""
        self.save_dir, self.lines, self.damaged = save_dir, lines, damaged

    @cached_property
    def updates(self) -> int:
        """The last update that has a line."""
        return max(int(line["update_step"]) for line in self.lines)

    @cached_property
    def by_updates(self) -> dict[str, Series]:
        """Every metric by updates, without values that are not finite or no numbers. Not to be changed."""
        found: dict[str, Series] = {}
        for line in self.lines:
            step = float(line["update_step"])
            for name, value in line.items():
                if type(value) in (float, int) and math.isfinite(value):
                    series = found.get(name) or found.setdefault(name, Series([], []))
                    series.x.append(step)
                    series.y.append(float(value))
        return found

    def series(self, metric: str, by: str = "updates") -> Series:
        """A metric by what `X_AXES` names, empty where the run has none. Raises UserError as `position` does."""
        found = self.by_updates.get(metric, Series([], []))
        return found if by == "updates" else Series([self.position(step, by) for step in found.x], found.y)

    def position(self, update_step: float, by: str) -> float:
        """The x of an update, interpolated between those that were logged.

        Raises UserError where the run has not logged what `by` needs.
        """
        if by == "updates":
            return update_step
        steps, values = self._tokens if by == "tokens" else self._hours
        if len(steps) < 2:
            metric = "train/tokens" if by == "tokens" else "time/update_seconds"
            raise UserError(f"--by {by}: {self.save_dir} has logged no {metric}; --by updates needs nothing else")
        after = min(max(1, bisect.bisect_left(steps, update_step)), len(steps) - 1)
        first, last = steps[after - 1], steps[after]
        share = min(1.0, (update_step - first) / max(1, last - first))
        return values[after - 1] + share * (values[after] - values[after - 1])

    @cached_property
    def _tokens(self) -> tuple[list[int], list[float]]:
        found = self.series("train/tokens")
        return [0, *(int(step) for step in found.x)], [0.0, *found.y]

    @cached_property
    def _hours(self) -> tuple[list[int], list[float]]:
        """An update that has no line takes as long as the next that has one, and one without a time the median.

        On a GPU the first update, and the first after an evaluation or a checkpoint, are without.
        """
        known = dict(zip(*self.series("time/update_seconds"), strict=True))
        if not known:
            return [0], [0.0]
        median, steps, hours = statistics.median(known.values()), [0], [0.0]
        for step in sorted(int(step) for step in {*known, *self.series("train/loss").x}):
            steps.append(step)
            hours.append(hours[-1] + (step - steps[-2]) * known.get(step, median) / 3600)
        return steps, hours

    def default_window(self) -> int:
        """The updates of a running mean where nothing else is asked for."""
        return max(1, self.updates // _WINDOWS)

    def last_values(self, window: int = 0) -> LastValues:
        """What the run has come to; window: of the running mean, in updates (0: the default)."""
        losses = self.series("train/loss")
        means = running_mean(losses.x, losses.y, window or self.default_window())
        tokens, peak = self.series("train/tokens").y, self.series("memory/peak_gb").y
        return LastValues(
            self.updates, tokens[-1] if tokens else None, means[-1] if means else None,
            self._last("eval/perplexity"), self._last("eval/perplexity_official"),
            max(peak) if peak else None, self._hours[1][-1] if len(self._hours[0]) > 1 else None,
        )  # fmt: skip

    def _last(self, metric: str) -> float | None:
        """The last value; metrics.jsonl has null for those that are not finite."""
        values = [line[metric] for line in self.lines if metric in line]
        return (math.inf if values[-1] is None else values[-1]) if values else None


def read_curves(save_dir: Path) -> RunCurves:
    """Read the metrics of the run in a folder; raises UserError if it is no run's or has no metrics yet."""
    if not save_dir.exists():
        raise UserError(f"{save_dir} does not exist: give the --save_dir of a run, which has its {METRICS_FILE}")
    if not save_dir.is_dir():
        raise UserError(f"{save_dir} is a file: give the --save_dir of a run, the folder that has its {METRICS_FILE}")
    if (save_dir / MANIFEST).is_file():
        raise UserError(f"{save_dir} is a checkpoint: give the folder of its run, {save_dir.absolute().parent}")
    found, damaged = read_lines(save_dir)
    lines = [line for line in found if type(line.get("update_step")) is int]
    damaged += len(found) - len(lines)
    if not lines:
        path = save_dir / METRICS_FILE
        if damaged:
            raise UserError(f"{path} is damaged: none of its {damaged} lines has metrics of an update")
        raise UserError(f"{path} has no lines yet: let the run finish an update first")
    # Evaluations follow the line of their update: a stable sort keeps that.
    return RunCurves(save_dir, sorted(lines, key=lambda line: int(line["update_step"])), damaged)


def running_mean(x: Sequence[float], y: Sequence[float], width: float) -> list[float]:
    """At each point the mean of those less than `width` before it on the x-axis, itself included."""
    means, total, first = [], 0.0, 0
    for index, value in enumerate(y):
        total += value
        while x[first] <= x[index] - width and first < index:
            total -= y[first]
            first += 1
        means.append(total / (index - first + 1))
    return means


def thinned(x: Sequence[float], y: Sequence[float], limit: int) -> Series:
    """At most `limit` points that look alike: the lowest and the highest of each part of the points, and both ends."""
    if len(x) <= limit:
        return Series(list(x), list(y))
    parts = max(1, (limit - 2) // 2)
    kept = {0, len(x) - 1}
    for part in range(parts):
        within = range(part * len(x) // parts, (part + 1) * len(x) // parts)
        kept |= {min(within, key=y.__getitem__), max(within, key=y.__getitem__)}
    return Series([x[index] for index in sorted(kept)], [y[index] for index in sorted(kept)])


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as tell it from the others.

    Raises UserError for a folder that is there twice.
    """
    paths = [folder.resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise UserError(f"{folders[index]} is given twice: give each run once")
    depths = [1] * len(paths)
    while True:
        labels = [str(Path(*path.parts[-depth:])) for path, depth in zip(paths, depths, strict=True)]
        alike = [index for index, label in enumerate(labels) if labels.count(label) > 1]
        if not alike:
            return labels
        for index in alike:
            depths[index] += 1
