"""How alike the successive subspaces of each matrix were over a run, as a map: 1 is the same subspace again."""

from __future__ import annotations

import re

from peft_pretraining.reporting.curves import RunCurves, Series

PREFIX = "subspace/similarity/"
COLUMNS = 60
"""Bins of the x-axis."""


def similarity_layers(curves: RunCurves) -> list[str]:
    """The matrices that have a similarity, by kind and then by depth."""
    return sorted((x.removeprefix(PREFIX) for x in curves.by_updates if x.startswith(PREFIX)), key=_order)


def kind_of(layer: str) -> str:
    """The kind of a matrix, such as q_proj."""
    return layer.rsplit(".", 1)[-1]


def rows_of_kinds(layers: list[str]) -> list[tuple[str, int, int]]:
    """(kind, first row, row after the last) of each kind in what `similarity_layers` returned."""
    kinds = [kind_of(layer) for layer in layers]
    starts = [row for row in range(len(kinds)) if row == 0 or kinds[row] != kinds[row - 1]]
    return [(kinds[start], start, end) for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def similarity_map(curves: RunCurves, layers: list[str], by: str = "updates") -> list[list[float | None]]:
    """Mean similarity by matrix and bin of the x-axis; None where no subspace was refreshed."""
    end = curves.position(float(curves.updates), by)
    return [_binned(curves.series(PREFIX + layer, by), end) for layer in layers]


def _binned(points: Series, end: float) -> list[float | None]:
    """The mean of the points in each bin between 0 and `end`."""
    bins: list[list[float]] = [[] for _ in range(COLUMNS)]
    for x, y in zip(*points, strict=True):
        bins[min(COLUMNS - 1, int(x / end * COLUMNS) if end else 0)].append(y)
    return [sum(values) / len(values) if values else None for values in bins]


def _order(layer: str) -> tuple[str, int, str]:
    number = re.search(r"\d+", layer)
    return kind_of(layer), int(number[0]) if number else -1, layer
