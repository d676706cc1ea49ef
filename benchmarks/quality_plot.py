"""Plot perplexity against bytes for the settings of the study, with the frontier of each model."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_HIGHEST = 1.45
"""The largest perplexity in a plot, as a multiple of the lowest."""
BYTES = ("weights_gb", "states_gb")
"""What counts: all that a run keeps from one update to the next. Gradients do not, as in the published tables."""
LABELS = {
    "--weight_bits 4": "INT4 weights",
    "--direction normuon": "NorMuon",
    "--full_rank_second_moment row": "row moments",
}
"""How the points of these flags are labelled."""


class Point(NamedTuple):
    """The runs of a setting with the same flags; of repeated seeds the newest."""

    mean: float
    """The mean perplexity of its seeds."""
    size: float
    """GB of weights, projections and states."""
    setting: str
    label: str
    """The rank, and what is in `LABELS`, by the flags."""
    seeds: list[float]


def read_points(results: Path, model: str, updates: int, settings: Sequence[str]) -> list[Point]:
    """The points of a model and a length of run with known bytes, the best first."""
    runs: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = (row["model"], row["updates"]) == (model, str(updates)) and row["setting"] in settings
            if wanted and row["weights_gb"]:
                runs.setdefault((row["setting"], row["flags"]), {})[row["seed"]] = row
    points = []
    for (setting, flags), by_seed in runs.items():
        rows = list(by_seed.values())
        seeds = [float(row["perplexity"]) for row in rows]
        ranks = [found[-1] for name in ("rank", "mlp_rank") if (found := re.findall(rf"--{name} (\d+|full)\b", flags))]
        label = [f"rank {' and '.join(ranks)}"] * bool(ranks)
        label += [text for flag, text in LABELS.items() if flag in flags]
        if parts := re.findall(r"--momentum_rank (\S+)", flags):  # of a flag that is given twice the last one counts
            label = [*label[1:], f"parts {parts[-1]} + {re.findall(r'--momentum_rest_bits (.)', flags)[-1]} bits"]
        size = sum(float(rows[0][name]) for name in BYTES)
        points.append(Point(sum(seeds) / len(seeds), size, setting, ", ".join(label), seeds))
    return sorted(points)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto-optimal points, by bytes."""
    return sorted(
        (point for point in points if all(other.mean >= point.mean or other.size > point.size for other in points)),
        key=lambda point: point.size,
    )


def plot(results: Path, picture: Path, model: str, updates: int, settings: Sequence[str]) -> None:
    """Perplexity of settings against the bytes of weights, projections and states.

    A point is the mean of a setting's seeds with the same flags, a bar their range. The frontier of a setting is a line
    in its colour with the labels; other flags are grey. The axis of bytes is cut where nothing is. What is too high for
    the picture is at its top, with its perplexity.
    """
    from matplotlib import pyplot

    points = read_points(results, model, updates, settings)
    if not points:
        raise SystemExit(f"{results} has no run of --model {model} over --updates {updates} with these --settings")
    sizes = sorted({point.size for point in points})
    gap = max(range(len(sizes)), key=lambda index: sizes[index] - sizes[max(0, index - 1)])
    parts = [part for part in (sizes[:gap], sizes[gap:]) if part]
    figure, axes = pyplot.subplots(
        1, len(parts), sharey=True, squeeze=False, figsize=(9, 6), width_ratios=[3, 1][: len(parts)]
    )
    top = _HIGHEST * points[0].mean
    labels: list[tuple[str, float, float]] = []
    for number, setting in enumerate(dict.fromkeys(point.setting for point in points)):
        own = [point for point in points if point.setting == setting]
        best = frontier(own)
        label = f"{setting}: {own[0].mean:.1f}" + (f" ({len(own[0].seeds)} seeds)" if len(own[0].seeds) > 1 else "")
        spread = [[p.mean - min(p.seeds) for p in best], [max(p.seeds) - p.mean for p in best]]
        x, y = [p.size for p in best], [min(p.mean, top) for p in best]
        others = [p for p in own if p not in best and p.mean <= top]
        labels += [
            (p.label + (f": {p.mean:.0f}" if p.mean > top else ""), p.size, height)
            for p, height in zip(best, y, strict=True)
        ]
        for part in axes[0]:
            part.errorbar(x, y, yerr=spread, fmt="o-", color=f"C{number}", linewidth=1, capsize=3, label=label)
            part.plot([p.size for p in others], [p.mean for p in others], ".", color="lightgrey", zorder=0)
    for part, within in zip(axes[0], parts, strict=True):
        margin = 0.2 * (within[-1] - within[0]) or 0.02
        part.set_xlim(within[0] - margin, within[-1] + margin)
    axes[0][0].margins(y=0.1)
    for part, within in zip(axes[0], parts, strict=True):
        place_labels(part, [each for each in labels if each[0] and within[0] <= each[1] <= within[-1]])
    axes[0][0].set_xlabel("weights, projections and optimizer states, GB")
    axes[0][0].set_ylabel(f"perplexity, {model}, {updates} updates")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def place_labels(axes: Any, labels: Sequence[tuple[str, float, float]]) -> list[Any]:
    """Write texts beside their points (x, y), each where it covers neither another one nor a labelled point.

    The nearest such place is taken, with a thin line to the point where it is not beside it; the limits of the axes
    must be set. Returns what was written.
    """
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    to_pixels, inside = axes.transData.transform, axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (to_pixels(label[1:]) for label in labels)]
    written = []
    for text, *at in sorted(labels, key=lambda label: (label[2], label[1])):
        for x, y in sorted(_OFFSETS, key=lambda offset: math.hypot(*offset)):
            place = axes.annotate(
                text, at, (x, y), textcoords="offset points", fontsize=7, va="center", ha="left" if x > 0 else "right",
                arrowprops=None if math.hypot(x, y) < _BESIDE else {**_LINE, "relpos": (float(x < 0), 0.5)},
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            extent = _of_text(place).padded(2)
            if inside.containsx(extent.x0) and inside.containsx(extent.x1) and not extent.count_overlaps(taken):
                break
            place.remove()
        else:
            place = axes.annotate(text, at, (6, 0), textcoords="offset points", fontsize=7, va="center")
        taken.append(_of_text(place))
        written.append(place)
    return written


def _of_text(label: Any) -> Any:
    """What a text covers, without the line to its point, in pixels."""
    from matplotlib.text import Text

    label.update_positions(label.figure.canvas.get_renderer())
    return Text.get_window_extent(label)


_BESIDE = 11
"""Points from its own within which a text is seen to belong to it."""
_LINE = {"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkB": 4}
_OFFSETS = [(side * x, y) for side in (1, -1) for x in (6, 12, 20, 32, 48) for y in range(-60, 64, 4)]
"""Where a text may begin or end, in points from its own."""
