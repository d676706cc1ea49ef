"""Plot perplexity against bytes for the settings of the study, with the frontier of each model."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
        1, len(parts), sharey=True, squeeze=False, figsize=(9, 5), width_ratios=[3, 1][: len(parts)]
    )
    top = _HIGHEST * points[0].mean
    for number, setting in enumerate(dict.fromkeys(point.setting for point in points)):
        own = [point for point in points if point.setting == setting]
        best = frontier(own)
        label = f"{setting}: {own[0].mean:.1f}" + (f" ({len(own[0].seeds)} seeds)" if len(own[0].seeds) > 1 else "")
        spread = [[p.mean - min(p.seeds) for p in best], [max(p.seeds) - p.mean for p in best]]
        x, y = [p.size for p in best], [min(p.mean, top) for p in best]
        others = [p for p in own if p not in best and p.mean <= top]
        for part in axes[0]:
            part.errorbar(x, y, yerr=spread, fmt="o-", color=f"C{number}", linewidth=1, capsize=3, label=label)
            part.plot([p.size for p in others], [p.mean for p in others], ".", color="lightgrey", zorder=0)
            for index, (p, height) in enumerate(zip(best, y, strict=True)):
                text = p.label + (f": {p.mean:.0f}" if p.mean > top else "")
                # Above and below the line in turn, where points lie close; of many points on both sides of it.
                offset = (5, -9) if index % 2 or len(best) != 2 else (5, 7)
                left = len(best) > 4 and index % 2 == 0 and text.startswith("parts")
                part.annotate(
                    text, (p.size, height), (-5, -3) if left else offset, textcoords="offset points", fontsize=7,
                    clip_on=True, ha="right" if left else "left",
                )  # fmt: skip
    for part, within in zip(axes[0], parts, strict=True):
        margin = 0.2 * (within[-1] - within[0]) or 0.02
        part.set_xlim(within[0] - margin, within[-1] + margin)
    axes[0][0].set_xlabel("weights, projections and optimizer states, GB")
    axes[0][0].set_ylabel(f"perplexity, {model}, {updates} updates")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
