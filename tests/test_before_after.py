"""`benchmarks/before_after.py`: the order of the runs, the table, and two real runs on the CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import before_after


def row(tree: str, run: int, speed: float, error: str = "") -> before_after.Row:
    found: before_after.Row = {"model": "60m", "tree": tree, "run": run, "tokens_per_second": speed, "error": error}
    return dict.fromkeys(before_after.COLUMNS, "") | found


def test_the_trees_change_places_from_run_to_run() -> None:
    trees = [tree for _, _, tree in before_after.schedule(["60m"], 3)]
    assert trees == ["before", "after", "after", "before", "before", "after"]
    assert [model for model, *_ in before_after.schedule(["60m", "1b"], 2)] == ["60m"] * 4 + ["1b"] * 4


def test_medians_are_of_the_runs_that_worked() -> None:
    speeds = {"before": [100.0, 300.0, 200.0], "after": [202.0, 404.0, 101.0]}
    rows = [row(tree, run, speed) for tree, numbers in speeds.items() for run, speed in enumerate(numbers)]
    rows.append(row("after", 3, 1.0, error="RuntimeError: 1"))
    lines = before_after.table(rows).splitlines()
    assert len(lines) == 3, "a figure that no run has is left out"
    assert lines[2] == "| 60m | tokens_per_second | 200 | 202 | 1.0100 | 100.00% | 150.00% | 3 |"


@pytest.mark.slow
def test_two_checkouts_are_measured(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rows.csv"
    compare = "--device cpu --batch_size 1 --updates 1 --warmup 1 --no_compile"
    flags = ["--before", str(root), "--models", "9m", "--runs", "1", "--compare", compare, "--results", str(results)]
    assert before_after.main(flags) == 0
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [found["tree"] for found in rows] == ["before", "after"]
    assert rows[0]["last_loss"] == rows[1]["last_loss"] != "" and float(rows[0]["tokens_per_second"]) > 0
    assert "| 9m | tokens_per_second |" in capfd.readouterr().out
    assert before_after.main([*flags[:1], str(tmp_path), *flags[2:]]) == 1, "there is no checkout"
