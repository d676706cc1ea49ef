"""`benchmarks/before_after.py`: the order of the runs, the table, and runs of two checkouts."""

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


STAND_IN = """
import json, sys
assert sys.argv[sys.argv.index("--one") + 1] == "adamw" and "--turn" in sys.argv, sys.argv
if sys.argv[sys.argv.index("--models") + 1] == "1b":
    sys.exit("no memory")
print("a line before")
print(json.dumps({"tokens_per_second": SPEED, "last_loss": 2.5, "commit": "NAME", "error": ""}))
"""


def checkout(folder: Path, speed: int, name: str) -> Path:
    """A checkout whose `benchmarks.compare` has always the same speed."""
    (folder / "benchmarks").mkdir(parents=True)
    program = STAND_IN.replace("SPEED", str(speed)).replace("NAME", name)
    (folder / "benchmarks" / "compare.py").write_text(program)
    return folder


def test_two_checkouts_are_measured_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkout(tmp_path / "before", 100, "old")
    monkeypatch.setattr(before_after, "ROOT", checkout(tmp_path / "after", 103, "new"))
    results = tmp_path / "rows.csv"
    flags = ["--before", str(before), "--method", "adamw", "--runs", "2", "--results", str(results)]
    assert before_after.main([*flags, "--models", "60m", "--before_commit", "older"]) == 0
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == before_after.COLUMNS
    found = [(row["tree"], row["run"], row["tokens_per_second"], row["commit"]) for row in rows]
    assert found == [
        ("before", "0", "100", "older"), ("after", "0", "103", "new"),
        ("after", "1", "103", "new"), ("before", "1", "100", "older"),
    ]  # fmt: skip
    assert "| 60m | tokens_per_second | 100 | 103 | 1.0300 | 0.00% | 0.00% | 2 |" in capsys.readouterr().out
    assert before_after.main([*flags, "--models", "1b"]) == 1
    with results.open() as file:
        assert "exit code 1: no memory" in list(csv.DictReader(file))[-1]["error"]
