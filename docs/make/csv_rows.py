"""Rows of `benchmarks/results/`, as the tables of the documents want them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache

from benchmarks.rows import ROOT

Row = dict[str, str]


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """The rows of a file of `benchmarks/results/`, the newest last."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return tuple(csv.DictReader(file))


def newest(rows: tuple[Row, ...] | list[Row], holds: Callable[[Row], bool]) -> Row | None:
    """The newest of the rows for which `holds` is true; None if there is none."""
    return next((row for row in reversed(rows) if holds(row)), None)


def card(row: Row) -> str:
    """The GPU of a row in one word, such as H100."""
    return next((name for name in ("H100", "H200") if name in row["device"]), row["device"])


def count(text: str) -> str:
    """A number with its thousands set apart; empty for an empty cell."""
    return f"{float(text):,.0f}" if text else ""


def is_alone(row: Row) -> bool:
    """Whether a row of compare.csv was measured with nothing else on the machine, on the card that all others were."""
    return card(row) == "H100" and not row["error"] and "alone" in row["note"]
