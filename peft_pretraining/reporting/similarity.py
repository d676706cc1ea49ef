"""How alike the successive subspaces of each matrix were over a run, as a map: 1 is the same subspace again."""

from __future__ import annotations

import re

from peft_pretraining.reporting.curves import RunCurves

PREFIX = "subspace/similarity/"
COLUMNS = 60
"""Bins of the x-axis."""


def similarity_layers(curves: RunCurves) -> list[str]:
    """The matrices that have a similarity, by kind and then by depth."""
    names = {name.removeprefix(PREFIX) for line in curves.lines for name in line if name.startswith(PREFIX)}
    return sorted(names, key=_order)


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
    rows = {PREFIX + layer: row for row, layer in enumerate(layers)}
    sums = [[0.0] * COLUMNS for _ in layers]
    counts = [[0] * COLUMNS for _ in layers]
    end = curves.position(curves.updates, by)
    for line in curves.lines:
        found = [(rows[name], value) for name, value in line.items() if name in rows and isinstance(value, float)]
        if found:
            share = curves.position(int(line["update_step"]), by) / end if end else 0.0
            column = min(COLUMNS - 1, int(share * COLUMNS))
            for row, value in found:
                sums[row][column] += value
                counts[row][column] += 1
    return [
        [total / count if count else None for total, count in zip(*pair, strict=True)]
        for pair in zip(sums, counts, strict=True)
    ]


def _order(layer: str) -> tuple[str, int, str]:
    number = re.search(r"\d+", layer)
    return kind_of(layer), int(number[0]) if number else -1, layer
