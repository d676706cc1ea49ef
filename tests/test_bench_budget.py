"""`benchmarks/bench_budget.py`: budgets, choices and rows, with given measurements, and the picture of them."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import bench_budget
from benchmarks.bench_budget import COLUMNS, choices, rows_of
from peft_pretraining.speed.cards import CARDS


def test_more_memory_has_another_choice_that_is_faster() -> None:
    found = choices("60m", CARDS["h100"], 5)
    assert len(found) > 2
    for (low, first), (high, second) in itertools.pairwise(found):
        assert first.needs <= low < high and second.needs <= high
        assert second.tokens_per_second(CARDS["h100"]) > 0.99 * first.tokens_per_second(CARDS["h100"])
    assert found[0][1].flags == ("--activation_checkpointing",) and found[-1][1].flags == ()
    assert {each.args.batch.batch_size for _, each in found} == {256}


def test_rows_have_what_was_planned_and_measured(tmp_path: Path) -> None:
    measured = {"run_peak_gb": 2.1, "in_a_row_tokens_per_second": 1_000_000, "device": "H100", "tokens_per_second": 3}
    rows = rows_of("60m", CARDS["h100"], 2, lambda model, chosen: dict(measured))
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    assert [row["flags"] for row in rows] == ["--activation_checkpointing", ""]
    assert rows[0]["run_peak_gb"] == 2.1 and rows[0]["planned_peak_gb"] == 2.064
    results = tmp_path / "budget.csv"
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert bench_budget.main(["--results", str(results), "--plot", str(tmp_path / "budget.png")]) == 0
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_only_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_budget.main(["--models", "60m"]) == 2
    assert "give --plan_only" in capsys.readouterr().err
    results = tmp_path / "budget.csv"
    assert bench_budget.main(["--models", "60m", "--points", "2", "--plan_only", "--results", str(results)]) == 0
    with results.open(newline="") as file:
        assert [row["run_peak_gb"] for row in csv.DictReader(file)] == ["", ""]
