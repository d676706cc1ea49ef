"""A figure with curves: the chart, its description in words for those who do not see it, its values in a table."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from peft_pretraining.reporting.curves import Series, running_mean
from peft_pretraining.reporting.markup import Markup, table
from peft_pretraining.reporting.page import figure
from peft_pretraining.reporting.svg import Line, line_chart, short

_ROWS = 20
"""Of a table of values, at most."""


def curve_figure(
    key: str, title: str, lines: Sequence[Line], unit: str, caption: str, log: bool = False, settled: float = 0.0
) -> Markup | None:
    """A figure with those curves that have points, by updates; None where none has. Arguments as of `line_chart`."""
    shown = [line for line in lines if line.points.x]
    if not shown:
        return None
    chart = line_chart(key, title, _described(title, shown), shown, unit, log=log, settled=settled)
    return figure(title, chart, caption, _values_table(shown, title), shown)


def running(points: Series, window: int, label: str) -> list[Line]:
    """Two curves: the values, and over them their running mean."""
    means = Series(points.x, running_mean(*points, window))
    return [Line("each update", points, "a", raw=True), Line(label, means, "a")]


def _values_table(lines: Sequence[Line], title: str) -> Markup:
    """Some values of curves, at updates that are about as far from each other."""
    shown = [line for line in lines if not line.raw]
    # Evaluations are few: their updates are those of the rows where there are any.
    rarest = min(shown, key=lambda line: len(line.points.x)).points.x
    count = min(_ROWS, len(rarest))
    steps = [rarest[round(index * (len(rarest) - 1) / max(1, count - 1))] for index in range(count)]
    rows = [(f"{step:,.0f}", *(_value_at(line.points, step) for line in shown)) for step in dict.fromkeys(steps)]
    return table(("update", *(line.label for line in shown)), rows, title)


def _value_at(points: Series, step: float) -> str:
    """The value at an update, or that of the last one before it that has one."""
    index = bisect.bisect_right(points.x, step) - 1
    return f"{points.y[index]:.6g}" if index >= 0 else ""


def _described(title: str, lines: Sequence[Line]) -> str:
    """A text for readers who do not see the curves."""
    parts = [
        f"{line.label} goes from {short(line.points.y[0])} at update {line.points.x[0]:,.0f} to "
        f"{short(line.points.y[-1])} at update {line.points.x[-1]:,.0f}; lowest {short(min(line.points.y))}, "
        f"highest {short(max(line.points.y))}"
        for line in lines
        if not line.raw
    ]
    return f"{title} by updates: {'; '.join(parts)}."
