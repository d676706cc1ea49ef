"""`benchmarks/bench_trainer.py` with two small layers on a CPU: its rows, its ratios, and what goes wrong."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_trainer
from tests.small_run import restored_process

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
TINY = ["--tiny", "--device", "cpu", "--length", "8", "--warmup", "2", "--updates", "2"]


def measured(method: str, model: str, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The row of a measurement in this process."""
    with restored_process():
        assert bench_trainer.main([*TINY, "--models", model, "--one", method, *argv]) == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tuple(row) == bench_trainer.COLUMNS
    return row


@pytest.mark.parametrize("model", bench_trainer.MODELS)
def test_rows_of_ours_and_of_adamw(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {method: measured(method, model, capsys) for method in ("adamw_torch_fused", "q_galore")}
    for row in rows.values():
        assert row["error"] == "" and "transformers" in row["libraries"] and row["commit"]
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / (row["update_ms"] / 1e3), rel=0.01, abs=1)
        assert row["run_peak_gb"] >= row["peak_gb"] > 0.05
        assert abs(row["state_ratio"] - 1) < 0.005, "the states are those that were counted"
        assert row["state_bytes"] > 1e5 and row["mean_loss"] > 0
        assert row["max_grad_norm"] == 1.0 and row["no_waits"] is False
    ours, adamw = rows["q_galore"], rows["adamw_torch_fused"]
    assert ours["weight_bytes"] < 0.8 * adamw["weight_bytes"], "weights in INT8"
    assert ours["state_bytes"] < 0.5 * adamw["state_bytes"]
    low_rank = {"qwen2_0.5b": 14, "roberta_base": 12}[model]
    assert (ours["rank"], ours["low_rank_matrices"], adamw["rank"]) == (16, low_rank, "")
    # Two updates of the first eight, over which the first refreshes of all matrices are spread.
    assert ours["refreshes"] == sum(index % 8 in (2, 3) for index in range(low_rank)) and adamw["refreshes"] == 0


def test_updates_inside_the_backward_pass_without_waits(capsys: pytest.CaptureFixture[str]) -> None:
    row = measured("q_galore_in_backward", "qwen2_0.5b", capsys, "--no_waits")
    assert (row["error"], row["max_grad_norm"], row["no_waits"]) == ("", 0.0, True)
    assert row["rank"] == 16 and row["tokens_per_second"] > 0


def test_a_measurement_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in this process, since a process for each takes as long as its imports."""

    def in_this_process(method: str, model: str, argv: list[str], timeout: float, *_: object) -> dict[str, Any]:
        args = bench_trainer.build_parser().parse_args([*argv, "--models", model, "--one", method])
        return bench_trainer.measure(method, model, args)

    monkeypatch.setattr(bench_trainer, "in_own_process", in_this_process)
    results = tmp_path / "trainer.csv"
    argv = ["--models", "roberta_base", "--methods", "q_galore,adamw_torch_fused", "--results", str(results)]
    with restored_process():
        assert bench_trainer.main([*TINY, *argv]) == 0
        assert bench_trainer.main([*TINY, *argv, "--length", "513"]) == 0
    with results.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == bench_trainer.COLUMNS
    assert [row["method"] for row in rows] == ["adamw_torch_fused", "q_galore"] * 2, "the baseline is first"
    adamw, ours = rows[:2]
    assert adamw["speed_ratio"] == adamw["memory_ratio"] == "1.0"
    speed = float(ours["tokens_per_second"]) / float(adamw["tokens_per_second"])
    assert float(ours["speed_ratio"]) == pytest.approx(speed, abs=1e-3)
    for row in rows[2:]:
        assert row["error"] == "UserError: --length 513: the model has positions for 512 tokens"
        assert row["tokens_per_second"] == row["speed_ratio"] == ""
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| roberta_base 2 x 513 | q_galore | UserError: --length 513")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_tensors_of_one_storage_are_counted_once() -> None:
    whole = torch.zeros(4, 8)
    states = [{"exp_avg": whole[:2], "parts": [whole[2:], (torch.zeros(3, dtype=torch.int8), 1.0)]}]
    assert bench_trainer.unique_bytes(bench_trainer.tensors_in(states)) == 4 * 4 * 8 + 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_waits_for_a_gpu_are_counted_with_their_lines() -> None:
    values, found = torch.zeros(3, device="cuda"), list[str]()
    with warnings.catch_warnings(), bench_trainer.waits(values.device, found):
        values.add_(1)
        values.sum().item()
        values.max().item()
    assert len(found) == 2 and all(each.startswith("test_bench_trainer.py:") for each in found)
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--models", "60m"], "--models 60m: there is none of this name; there are qwen2_0.5b, roberta_base"),
        (["--methods", "adamw"], "--methods adamw: there is none of this name; there are adamw_torch_fused,"),
        (["--one", "q_galore"], "--models qwen2_0.5b,roberta_base: with --one give a single model"),
        (["--warmup", "0"], "--warmup 0: it must be at least 1"),
    ],
)
def test_values_that_cannot_work(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_trainer.main(argv) == 2
    assert f"bench_trainer: {expected}" in capsys.readouterr().err
