"""`benchmarks/bench_memory.py`: rows and table from given numbers, and a plan of the very command that is run."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch

from benchmarks import bench_memory, compare
from benchmarks.bench_memory import CELLS, COLUMNS, COMPONENTS, Cell
from benchmarks.compare_methods import Setting, Training, q_galore_flags
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.llama.config import LlamaConfig

FAILED = Cell("7b", 4)


def fake_row(cell: Cell) -> compare.Row:
    """What `compare.py` gives; one cell fails."""
    row: compare.Row = dict.fromkeys(compare.COLUMNS, "") | {"model": cell.model, "cap_gib": 16.0, "commit": "abc"}
    if cell == FAILED:
        return row | {"error": "OutOfMemoryError: 1 | 2"}
    peaks = {"peak_gb": 2.0, "run_peak_gb": 2.5, "reserved_gb": 3.0, "run_reserved_gb": 3.5}
    return row | peaks | {"device": "H100", "micro_batch": 99, "rank": 99}


def test_rows_and_table(tmp_path: Path) -> None:
    results = tmp_path / "new" / "memory.csv"
    cells = [Cell("60m", 256, checkpointing=True), Cell("60m", 64, grad_accum=4), FAILED]
    rows = bench_memory.bench(cells, results, fake_row)
    with results.open() as file:
        written = list(csv.DictReader(file))
    assert [tuple(row) for row in written] == [COLUMNS] * 3
    for cell, row in zip(cells, written, strict=True):
        plan = bench_memory.planned(cell)
        assert float(row["planned_peak_gb"]) == pytest.approx(plan.peak_bytes / 1e9, abs=6e-4)
        assert (row["micro_batch"], row["rank"]) == (str(cell.micro_batch), str(cell.rank))
        parts = sum(int(row[name]) for name in COMPONENTS if name != "of these, activations")
        assert parts + int(row["phase_bytes"]) == plan.peak_bytes
        assert int(row["phase_bytes"]) == plan.passing[row["phase"]] == max(plan.passing.values())
        assert int(row["of these, activations"]) == plan.activations
        assert (row["cap_gib"], row["commit"]) == ("16.0", "abc")
    peaks = [row["peak_gb"] for row in written]
    assert peaks == ["2.0", "2.0", ""] and written[2]["ratio"] == ""
    assert float(written[0]["ratio"]) == pytest.approx(2.5 / float(written[0]["planned_peak_gb"]), abs=1e-3)
    assert int(written[1]["gradients"]) > 0 == int(written[0]["gradients"])
    lines = bench_memory.table(rows).splitlines()
    assert len(lines) == 2 + 3 and {line.count("|") for line in lines} == {11}
    assert lines[2].startswith("| 60m | 128 | 256 | yes |") and "| 2.5 | " in lines[2] and "| 3.5 | 2.0 |" in lines[2]
    assert lines[3].startswith("| 60m | 128 | 4 x 64 | no |")
    assert "| OutOfMemoryError: 1 / 2 |" in lines[4]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_is_planned_is_what_runs(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that the process of a cell trains with give the same plan as the cell."""
    trained: list[Setting] = []

    def train(setting: Setting) -> Training:
        trained.append(setting)
        return Training(lambda: torch.zeros(()), flags=" ".join(q_galore_flags(setting)[2:]))

    monkeypatch.setitem(compare.METHODS, "q_galore", train)
    args = argparse.Namespace(extra="", note="", cap_gib=None)
    argv = [*bench_memory.compare_argv(cell, args), "--models", cell.model, "--one", bench_memory.method_of(cell)]
    # The device of the flags is asked for below: here there need not be one.
    options = compare.build_parser().parse_args([*argv, "--device", "cpu"])
    row = compare.measure(options.one, cell.model, options)
    (setting,) = trained
    assert row["error"] == "" and (options.warmup, options.updates) == (bench_memory.WARMUP, bench_memory.UPDATES)
    on_gpu = str(row["flags"]).replace("--device cpu", "--device cuda")
    run = parse_args(["--model_config", str(setting.config), *on_gpu.split()])
    assert bench_memory.planned(cell) == plan(run, LlamaConfig.from_json(setting.config))
    assert (run.subspace.rank, run.batch.batch_size, run.batch.max_length) == (cell.rank, cell.micro_batch, 256)
    checkpointing = run.model.activation_checkpointing
    assert (run.batch.gradient_accumulation, checkpointing) == (cell.grad_accum, cell.checkpointing)
    assert (run.quantization.weight_format.stored_bits, run.subspace.basis_bits) == (8, 4)
    assert (run.subspace.subspace, run.optimizer.optimizer) == ("streaming", "q_galore_adamw8bit_per_layer")


def test_more_flags_reach_run_and_plan() -> None:
    args = bench_memory.build_parser().parse_args(["--extra", "--compile off", "--cap_gib", "16"])
    options = compare.build_parser().parse_args(bench_memory.compare_argv(CELLS[0], args))
    assert options.extra.split() == ["--rank", "128", "--compile", "off"] and options.cap_gib == 16
    eager, compiled = bench_memory.planned(CELLS[0], args.extra), bench_memory.planned(CELLS[0])
    assert eager.activations > compiled.activations


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_memory.main(["--results", str(tmp_path / "memory.csv")]) == 2
    assert capsys.readouterr().err.strip() == (
        "bench_memory: it measures the memory of a CUDA GPU, and PyTorch finds none here"
    )
    assert not list(tmp_path.iterdir())


def test_models_without_cells_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_memory.main(["--models", "60m,5m"]) == 2
    assert "--models 5m: there are no cells for it; there are 60m, 130m," in capsys.readouterr().err


def test_components_are_those_of_the_plan() -> None:
    plan = bench_memory.planned(CELLS[0])
    assert set(plan.lasting) <= set(COMPONENTS) and set(plan.overhead) <= set(COMPONENTS)
