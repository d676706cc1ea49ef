"""`benchmarks/compare.py`: ratios and table, a real measurement on the CPU, and what goes wrong."""

from __future__ import annotations

import csv
import fcntl
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import compare, models
from benchmarks.compare_methods import METHODS, Setting, q_galore_flags, split_method
from peft_pretraining.config.parse import parse_args
from tests.small_run import restored_process

SMALLEST = ["--models", "9m", "--device", "cpu", "--batch_size", "1", "--updates", "1"]


def fake_row(method: str, model: str) -> compare.Row:
    """What a measurement gives; `adamw` fails."""
    row: compare.Row = dict.fromkeys(compare.COLUMNS, "") | {"model": model, "method": method, "micro_batch": 4}
    if method == "adamw":
        return row | {"grad_accum": 2, "error": "OutOfMemoryError: 1 | 2"}
    fast = {"adamw_compiled": 3000, "q_galore": 2000, "q_galore_checkpointing": 1000}[method]
    small = {"adamw_compiled": 8.0, "q_galore": 4.0, "q_galore_checkpointing": 2.0}[method]
    speeds = {"tokens_per_second": fast, "in_a_row_tokens_per_second": fast + 1000}
    return row | speeds | {"grad_accum": 1, "run_peak_gb": small, "compiled": True, "device": model}


def test_ratios_are_to_the_compiled_adamw_of_the_same_model(tmp_path: Path) -> None:
    results, asked = tmp_path / "new" / "compare.csv", []

    def measure(method: str, model: str) -> compare.Row:
        asked.append((model, method))
        slower = {"tokens_per_second": 1500} if (method, model) == ("adamw_compiled", "1b") else {}
        return fake_row(method, model) | slower

    methods = ["q_galore", "adamw", "adamw_compiled", "q_galore_checkpointing"]
    rows = compare.compare(["60m", "1b"], methods, results, measure)
    first = ["adamw_compiled", "q_galore", "adamw", "q_galore_checkpointing"]
    assert asked == [(model, method) for model in ("60m", "1b") for method in first]
    with results.open() as file:
        written = list(csv.DictReader(file))
    assert [tuple(row) for row in written] == [compare.COLUMNS] * 8
    assert [row["speed_ratio"] for row in written] == ["1.0", "0.667", "", "0.333", "1.0", "1.333", "", "0.667"]
    assert [row["in_a_row_speed_ratio"] for row in written] == ["1.0", "0.75", "", "0.5"] * 2
    assert [row["memory_ratio"] for row in written] == ["1.0", "0.5", "", "0.25"] * 2
    assert [row["error"] for row in written if row["error"]] == ["OutOfMemoryError: 1 | 2"] * 2
    lines = compare.table(rows).splitlines()
    assert len(lines) == 2 + 8 and {line.count("|") for line in lines} == {13}
    assert lines[3] == "| 60m | 4 | q_galore | yes | 2,000 | 0.667 | 3,000 | 0.75 | 4.0 | 0.5 |  |  |"
    assert lines[4].startswith("| 60m | 2 x 4 | adamw |  | OutOfMemoryError: 1 / 2 |")


def test_measurements_get_ready_together_and_keep_their_order(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20)

    def measure(method: str, model: str) -> compare.Row:
        both.wait()  # breaks unless two are under way at once
        return fake_row(method, model)

    methods = ["q_galore", "adamw_compiled"]
    rows = compare.compare(["60m", "1b"], methods, tmp_path / "compare.csv", measure, together=2)
    assert [(row["model"], row["method"]) for row in rows] == [
        (model, method) for model in ("60m", "1b") for method in reversed(methods)
    ]
    assert [row["speed_ratio"] for row in rows] == [1.0, 0.667] * 2


def test_a_turn_alone_waits_for_all_others(tmp_path: Path) -> None:
    path, entered = str(tmp_path / "turn"), threading.Event()

    def alone() -> None:
        with compare.turn(path, alone=True):
            entered.set()

    with compare.turn(path, alone=False):
        with compare.turn(path, alone=False):  # shared with others that warm up
            waiting = threading.Thread(target=alone)
            waiting.start()
        assert not entered.wait(0.2)
    assert entered.wait(20)
    waiting.join()


def test_who_waits_for_a_turn_alone_is_next(tmp_path: Path) -> None:
    path, order = str(tmp_path / "turn"), []

    def take(name: str, alone: bool) -> None:
        with compare.turn(path, alone):
            order.append(name)

    with compare.turn(path, alone=False):
        first = threading.Thread(target=take, args=("alone", True))
        first.start()
        wait_until_held(f"{path}.door")
        second = threading.Thread(target=take, args=("shared", False))
        second.start()
        time.sleep(0.1)
        assert order == []  # the second could share with this turn, but for the first
    first.join(20)
    second.join(20)
    assert order == ["alone", "shared"]


def wait_until_held(path: str) -> None:
    """Until another has the lock of a file."""
    for _ in range(1000):
        with Path(path).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        time.sleep(0.01)
    raise AssertionError(f"nobody holds {path}")


def test_no_ratio_without_a_baseline(tmp_path: Path) -> None:
    (row,) = compare.compare(["60m"], ["q_galore"], tmp_path / "compare.csv", fake_row)
    assert row["speed_ratio"] == row["memory_ratio"] == ""


@pytest.mark.slow
def test_real_measurements_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Of ours and of AdamW: the same first loss says that they train the same model on the same data."""
    rows = {}
    for method in ("q_galore", "adamw"):
        with restored_process():
            assert compare.main([*SMALLEST, "--warmup", "0", "--one", method]) == 0
        rows[method] = json.loads(capsys.readouterr().out.splitlines()[-1])
    for method, row in rows.items():
        assert row["error"] == "" and row["method"] == method and tuple(row) == compare.COLUMNS
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds_median"], rel=0.01, abs=0.5)  # an integer
        assert row["seconds_median"] > 0 and row["peak_gb"] > 0.05 and row["in_a_row_tokens_per_second"] > 0
        assert row["device"] and row["commit"] and row["rank"] == 32
    assert "--subspace streaming" in rows["q_galore"]["flags"]
    assert rows["q_galore"]["first_loss"] == pytest.approx(rows["adamw"]["first_loss"], abs=0.005)


def test_a_measurement_that_fails_is_a_row_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "compare.csv"
    argv = [*SMALLEST, "--methods", "q_galore", "--extra", "--rank 4096", "--results", str(results)]
    assert compare.main(argv) == 0
    with results.open() as file:
        (row,) = csv.DictReader(file)
    assert row["error"].startswith("UserError: --rank is 4096")
    assert row["tokens_per_second"] == "" and row["micro_batch"] == "1"
    assert "UserError: --rank is 4096" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--models", "60m,5m"], "--models 5m: there is no such config; there are 100m, 130m,"),
        (
            ["--methods", "adamw,sgd"],
            "--methods sgd: there is no such method; there are adamw_compiled, adamw_compiled_transformers,",
        ),
        (["--models", "9m", "--one", "sgd"], "--one sgd: there is no such method"),
        (["--together", "0"], "--together 0: give a number of processes, at least 1"),
        (["--models", "9m,60m", "--one", "adamw"], "--models 9m,60m: with --one give a single model"),
    ],
)
def test_names_that_do_not_exist(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(argv) == 2
    assert f"compare: {expected}" in capsys.readouterr().err


def test_flags_of_ours() -> None:
    setting = Setting(
        config=models.config_path("60m"),
        rank=128,
        micro_batch=4,
        grad_accum=2,
        checkpoint_every=2,
        compile=False,
        extra="--update_proj_gap 50 --beta2 0.99",
        seed=3,
        device=torch.device("cpu"),
    )
    args = parse_args(q_galore_flags(setting))
    assert (args.batch.batch_size, args.batch.gradient_accumulation, args.batch.max_length) == (4, 2, 256)
    assert parse_args(q_galore_flags(replace(setting, length=512))).batch.max_length == 512
    assert args.optimizer.per_layer and args.optimizer.grad_accum_dtype == "int8" and args.optimizer.beta2 == 0.99
    assert args.model.activation_checkpointing and args.model.checkpoint_every == 2 and args.model.compile == "off"
    assert args.quantization.weight_quant and args.subspace.proj_quant and args.quantization.stochastic_round
    assert (args.subspace.subspace, args.subspace.rank, args.subspace.update_proj_gap) == ("streaming", 128, 50)


def test_long_sequences_have_positions() -> None:
    short, long = models.config_path("7b"), compare.with_positions(models.config_path("7b"), 4096)
    assert compare.with_positions(short, 2048) == short != long
    before, after = (json.loads(path.read_text()) for path in (short, long))
    assert after == before | {"max_position_embeddings": 4096}
    parse_args(["--model_config", str(long), "--batch_size", "1", "--max_length", "4096"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("q_galore", ("q_galore", 0)),
        ("q_galore_checkpointing", ("q_galore", 1)),
        ("adamw_checkpointing2", ("adamw", 2)),
        ("adamw_checkpointing_2", ("adamw_checkpointing_2", 0)),
    ],
)
def test_the_end_of_a_name_says_how_many_layers_are_recomputed(name: str, parts: tuple[str, int]) -> None:
    assert split_method(name) == parts


def test_every_default_exists() -> None:
    assert set(compare.DEFAULT_METHODS.split(",")) <= set(METHODS)
    assert compare.BASELINE in METHODS
    assert set(models.MICRO_BATCHES) == set(models.RANKS)
    assert all(models.config_path(model).is_file() for model in models.RANKS)
