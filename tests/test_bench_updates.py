"""`bench_refresh.py` and `bench_scaling.py` with the smallest model on a CPU: their rows, and what these claim."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import bench_refresh, bench_scaling
from tests.small_run import on_ranks, restored_process

SMALLEST = ["--models", "9m", "--device", "cpu", "--batch_size", "1"]
MATRICES = 7 * 4


def row_of(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return row


@pytest.mark.slow
def test_the_share_of_refreshes_is_that_of_blocks_with_and_without(tmp_path: Path) -> None:
    argv = [*SMALLEST, "--updates", "3", "--blocks", "2", "--results", str(tmp_path / "refresh.csv")]
    with restored_process():
        assert bench_refresh.main([*argv, "--methods", "q_galore_orthogonal", "--extra", "--update_proj_gap 7"]) == 0
    row = row_of(tmp_path / "refresh.csv")
    assert (row["interval"], row["updates"]) == ("7", "12")
    assert float(row["refreshes_an_update"]) == pytest.approx(MATRICES / 7, rel=0.4), "put off, they come no oftener"
    some, none = float(row["update_ms"]), float(row["without_refreshes_ms"])
    assert float(row["refresh_share"]) == pytest.approx(1 - none / some, abs=1e-3)
    assert len(row["shares_of_pairs"].split()) == 2


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_refresh.main([*SMALLEST, "--methods", "adamw"])
    told = "argument --methods: adamw: there are q_galore, q_galore_orthogonal, each also _checkpointing"
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_are_compared_with_each_alone(tmp_path: Path) -> None:
    argv = [*SMALLEST, "--warmup", "1", "--updates", "1", "--repeats", "2", "--results", str(tmp_path / "scaling.csv")]
    argv += ["--batch_size", "1", "--total_batch_size", "0,4"]
    assert on_ranks(2, bench_scaling.main, [*argv, "--shard", "none,optimizer"]) == [0, 0]
    with (tmp_path / "scaling.csv").open(newline="") as file:
        row, sharded, *summed = csv.DictReader(file)
    assert (row["shard"], sharded["shard"]) == ("none", "optimizer")
    assert [(each["shard"], each["grad_accum"]) for each in summed] == [("none", "2"), ("optimizer", "2")]
    assert float(summed[0]["tokens_per_second"]) == pytest.approx(4 * 256 / float(summed[0]["update_ms"]) * 1e3, abs=1)
    assert row["alone_tokens_per_second"] == sharded["alone_tokens_per_second"]
    assert float(row["wire_mb"]) == pytest.approx(float(row["message_mb"]), rel=0.3)
    assert float(sharded["wire_mb"]) != float(row["wire_mb"])
    alone = [float(speed) for speed in row["alone_tokens_per_second"].split()]
    speed = float(row["tokens_per_second"])
    assert (row["gpus"], len(alone)) == ("2", 2)
    assert speed == pytest.approx(2 * 256 / float(row["update_ms"]) * 1e3, abs=0.51)  # a row has whole tokens
    assert float(row["ratio"]) == pytest.approx(2 * speed / sum(alone), rel=0.02)
    assert float(row["ratio_to_slowest"]) == pytest.approx(speed / min(alone), rel=0.02)
    # Rank 32 of a width of 128, and embeddings and head in full.
    tables = 2 * 2 * 32000 * 128 / 1e6
    assert tables < float(row["message_mb"]) < float(row["gradient_mb"])
    assert float(row["gradient_mb"]) == pytest.approx(tables + 2 * 4 * (4 * 128**2 + 3 * 128 * 352) / 1e6, abs=0.1)
