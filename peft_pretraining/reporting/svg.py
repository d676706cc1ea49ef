"""Charts as SVG: curves over a common axis, bars, and the map of similarities. Colours are left to the page's CSS.

CSS classes: `grid` and `axis` of frames, `a`, `b`, `c` of series, `raw` of what a running mean is drawn over, `h0` to
`h9` of the map, `label` of texts, `middle` and `end` of those that do not begin at their point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peft_pretraining.reporting.curves import Series, thinned
from peft_pretraining.reporting.markup import Markup, concatenated, element

WIDTH, HEIGHT = 860, 270
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 44
POINTS = 900
"""Of a curve, at most: about one for each unit of the width."""
LEVELS = 10
"""Colours of the map."""
_MARKED = 60
"""A curve of at most so many points has a mark at each."""


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    label: str
    points: Series
    color: str
    """CSS class."""
    raw: bool = False
    """Drawn faintly, behind the others, and not in the legend."""


class Bar(NamedTuple):
    """A bar of a chart."""

    label: str
    value: float
    text: str
    """The value as it is written beside the bar."""
    color: str
    """CSS class."""


@dataclass(frozen=True)
class Frame:
    """The axes of a chart; x begins at 0."""

    end: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        """Pixels of an x."""
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.end

    def y(self, value: float) -> float:
        """Pixels of a y."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def line_chart(
    key: str, title: str, description: str, lines: Sequence[Line], y_label: str, log: bool = False, settled: float = 0.0
) -> Markup:
    """Curves by updates. key: unique on the page; settled: the y-axis fits what comes after this part of the x-axis."""
    frame = _frame(lines, log, settled)
    parts = [*_grid(frame, y_label), element("clipPath", _area(), id=f"{key}-area")]
    curves: list[Markup] = []
    for line in sorted(lines, key=lambda each: not each.raw):
        curves += _curve(frame, line)
    parts.append(element("g", *curves, clip_path=f"url(#{key}-area)"))
    return _svg(key, title, description, HEIGHT, parts)


def _frame(lines: Sequence[Line], log: bool, settled: float) -> Frame:
    end = max(line.points.x[-1] for line in lines) or 1.0
    fitted = [line for line in lines if not line.raw] if settled else lines
    values = [
        y
        for line in fitted
        for x, y in zip(*line.points, strict=True)
        if x >= settled * line.points.x[-1] and (y > 0 or not log)
    ]
    if not values:
        return Frame(end, 0.1, 1.0, log)
    low, high = min(values), max(values)
    if log:
        return Frame(end, low / 1.1, high * 1.1, True)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    # A curve that comes near 0 shows it.
    return Frame(end, 0.0 if 0 <= low <= 0.5 * high else low - margin, high + margin, False)


def _curve(frame: Frame, line: Line) -> list[Markup]:
    points = thinned(*line.points, POINTS)
    pixels = [(frame.x(x), frame.y(y)) for x, y in zip(*points, strict=True)]
    path = " ".join(f"{x:.1f},{min(max(y, -999.0), 1999.0):.1f}" for x, y in pixels)
    kind = f"curve {line.color}{' raw' if line.raw else ''}"
    found = [element("polyline", points=path, class_=kind)] if len(pixels) > 1 else []
    if not line.raw and len(pixels) <= _MARKED:
        for (x, y), at, value in zip(pixels, *points, strict=True):
            tip = element("title", f"{line.label}, update {at:,.0f}: {short(value)}")
            found.append(element("circle", tip, cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.5", class_=f"mark {line.color}"))
    return found


def _grid(frame: Frame, y_label: str) -> list[Markup]:
    found = []
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in log_ticks(frame.low, frame.high) if frame.log else ticks(frame.low, frame.high):
        y = f"{frame.y(tick):.1f}"
        found.append(element("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        found.append(element("text", short(tick), x=LEFT - 8, y=y, dy="0.35em", class_="end"))
    for tick in ticks(0.0, frame.end):
        x = f"{frame.x(tick):.1f}"
        found.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        found.append(element("text", short(tick), x=x, y=bottom + 18, class_="middle"))
    found.append(element("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    found.append(element("text", "updates", x=(LEFT + right) / 2, y=HEIGHT - 6, class_="middle label"))
    middle = (TOP + bottom) / 2
    turned = f"rotate(-90 14 {middle})"
    found.append(element("text", y_label, x=14, y=middle, transform=turned, class_="middle label"))
    return found


def _area() -> Markup:
    return element("rect", x=LEFT, y=TOP - 6, width=WIDTH - LEFT - RIGHT + 6, height=HEIGHT - TOP - BOTTOM + 10)


def bar_chart(key: str, title: str, description: str, bars: Sequence[Bar]) -> Markup:
    """Horizontal bars, with the text of its value beside each."""
    row, left, right = 24, 300, 90
    longest = max(bar.value for bar in bars) or 1.0
    parts: list[Markup] = []
    for index, (label, value, text, color) in enumerate(bars):
        y, width = 4 + index * row, max(1.0, (WIDTH - left - right) * value / longest)
        middle = y + row / 2 - 2
        parts.append(element("text", label, x=left - 10, y=middle, dy="0.35em", class_="end label"))
        parts.append(element("rect", x=left, y=y, width=f"{width:.1f}", height=row - 6, rx=2, class_=f"bar {color}"))
        parts.append(element("text", text, x=f"{left + width + 8:.1f}", y=middle, dy="0.35em"))
    return _svg(key, title, description, 8 + row * len(bars), parts)


def heat_map(
    key: str, title: str, description: str, rows: Sequence[Sequence[float | None]],
    groups: Sequence[tuple[str, int, int]], end: float,
) -> Markup:  # fmt: skip
    """Values from 0 to 1 by row and bin of the x-axis, which ends at `end`; None is left empty.

    groups: (label, first row, row after the last) of rows that are named together.
    """
    left, gap = LEFT + 30, 3
    height = max(3.0, min(12.0, 420 / max(1, len(rows))))
    columns = len(rows[0])
    cell = (WIDTH - left - RIGHT) / columns
    paths: dict[int, list[str]] = {level: [] for level in range(LEVELS)}
    parts: list[Markup] = []
    for number, (label, start, stop) in enumerate(groups):
        top = TOP + start * height + number * gap
        size = (stop - start) * height
        parts.append(
            element("rect", x=left, y=f"{top:.1f}", width=f"{cell * columns:.1f}", height=f"{size:.1f}", class_="none")
        )
        parts.append(element("text", label, x=left - 8, y=f"{top + size / 2:.1f}", dy="0.35em", class_="end"))
        for row in range(start, stop):
            y = top + (row - start + 0.5) * height
            for column, length, level in _runs(rows[row]):
                paths[level].append(f"M{left + column * cell:.1f} {y:.1f}h{length * cell:.1f}")
    for level, path in paths.items():
        if path:
            parts.append(element("path", d="".join(path), class_=f"cell h{level}", stroke_width=f"{height:.1f}"))
    bottom = TOP + len(rows) * height + (len(groups) - 1) * gap
    for tick in ticks(0.0, end):
        x = f"{left + cell * columns * tick / end:.1f}"
        parts.append(element("line", x1=x, x2=x, y1=f"{bottom:.1f}", y2=f"{bottom + 4:.1f}", class_="axis"))
        parts.append(element("text", short(tick), x=x, y=f"{bottom + 18:.1f}", class_="middle"))
    middle = left + cell * columns / 2
    parts.append(element("text", "updates", x=middle, y=f"{bottom + 36:.1f}", class_="middle label"))
    return _svg(key, title, description, math.ceil(bottom + 42), parts)


def _runs(row: Sequence[float | None]) -> list[tuple[int, int, int]]:
    """(first column, columns, level) of adjacent cells of one colour."""
    found: list[tuple[int, int, int]] = []
    for column, value in enumerate(row):
        if value is None:
            continue
        level = min(LEVELS - 1, max(0, int(value * LEVELS)))
        if found and found[-1][0] + found[-1][1] == column and found[-1][2] == level:
            first, length, _ = found.pop()
            found.append((first, length + 1, level))
        else:
            found.append((column, 1, level))
    return found


def _svg(key: str, title: str, description: str, height: int, parts: Sequence[Markup]) -> Markup:
    names = element("title", title, id=f"{key}-title") + element("desc", description, id=f"{key}-desc")
    return element(
        "svg", Markup(names), concatenated(parts), viewBox=f"0 0 {WIDTH} {height}", role="img",
        aria_labelledby=f"{key}-title {key}-desc", xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


# ---- numbers


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values between two others, about `count` of them, a step of 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two others on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        found = [x for decade in decades for factor in factors if low <= (x := factor * 10.0**decade) <= high]
        if len(found) >= 3:
            return found
    return ticks(low, high)


def short(value: float) -> str:
    """A number in at most four digits: 0.00125, 3.142, 950, 12.3k, 1.26M."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}"
