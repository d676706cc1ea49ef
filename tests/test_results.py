"""Rows of results: every file has a command that writes it or is marked as frozen; the rows of two of the commands."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import bench_engine_steps, bench_kernels, code_size, cpu_runs, loss_curves, same_bits
from tests.small_run import SmallRun, flags_of, restored_process

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(path.name for path in RESULTS.glob("*.csv"))


def listed() -> tuple[dict[str, str], set[str]]:
    """What `benchmarks/results/README.md` says: files with the module that writes each, and frozen files."""
    written, frozen = (RESULTS / "README.md").read_text(encoding="utf-8").split("## Frozen files")
    modules = dict(re.findall(r"^\| `(\w+\.csv)` \| `[^`]*-m benchmarks\.(\w+)", written, re.MULTILINE))
    return modules, set(re.findall(r"^\| `(\w+\.csv)` ", frozen, re.MULTILINE))


def header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file))


def only_row(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return row


def test_every_file_is_listed_once_and_every_listed_file_is_there() -> None:
    modules, frozen = listed()
    assert not modules.keys() & frozen
    assert sorted(modules.keys() | frozen) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_a_command_that_writes_it_or_is_frozen(name: str) -> None:
    modules, frozen = listed()
    writers = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if name in path.read_text(encoding="utf-8")}
    if name in frozen:
        assert not writers
    else:
        assert modules[name] in writers


DOCUMENTS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("performance", "quality", "results/speed", "results/memory")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_figure_of_a_frozen_file_is_said_to_be_one(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in listed()[1]:
        for match in re.finditer(re.escape(name), text):
            assert "frozen" in text[match.end() : match.end() + 20], f"{document} at {match.start()}: {name}"


@pytest.mark.slow
def test_a_row_of_engine_steps(tmp_path: Path) -> None:
    path = tmp_path / "engine_steps.csv"
    argv = ["--models", "9m", "--device", "cpu", "--batch_size", "1", "--warmup", "1", "--updates", "1"]
    with restored_process():
        assert bench_engine_steps.main([*argv, "--results", str(path), "--methods", "q_galore_checkpointing"]) == 0
    row = only_row(path)
    assert header(path) == header(RESULTS / "engine_steps.csv")
    assert (row["method"], row["checkpointing"], row["cuda_graphs"], row["rank"]) == ("q_galore", "yes", "no", "32")
    assert float(row["tokens_per_second"]) == pytest.approx(256e3 / float(row["update_ms"]), rel=0.01, abs=1)
    assert float(row["python_ms"]) > 0 and float(row["peak_gb"]) > 0


def test_a_row_of_a_run_on_a_cpu(tmp_path: Path) -> None:
    small, path = SmallRun(tmp_path), tmp_path / "cpu_runs.csv"
    result = small.run("run", **flags_of("adamw"), num_training_steps=3)
    argv = ["--run", "small", "--save_dir", str(result.save_dir), "--results", str(path)]
    assert cpu_runs.main(argv) == 0
    row = only_row(path)
    assert header(path) == header(RESULTS / "cpu_runs.csv")
    assert (row["run"], row["seconds"]) == ("small", "")
    assert float(row["train_perplexity_first"]) == round(result.train_lines[0]["train/perplexity"], 1)
    assert float(row["eval_perplexity"]) == round(result.lines[-1]["eval/perplexity"], 1)
    path.unlink()
    assert cpu_runs.main([*argv, "--", "true"]) == 0 and float(only_row(path)["seconds"]) < 60
    path.unlink()
    assert cpu_runs.main([*argv, "--", "false"]) == 1 and not path.exists(), "a run that failed is no row"


def test_rows_of_loss_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven updates are a window of five and one of two; what has rows is not trained again."""
    small, path = SmallRun(tmp_path), tmp_path / "loss_curves.csv"
    trained: list[list[str]] = []

    def train(flags: list[str]) -> int:
        trained.append(flags)
        small.run("run", **flags_of("adamw"), num_training_steps=7)
        shutil.copytree(tmp_path / "run", flags[flags.index("--save_dir") + 1], dirs_exist_ok=True)
        return 0

    monkeypatch.setattr(loss_curves, "train", train)
    argv = ["--methods", "adamw", "--seeds", "4", "--results", str(path)]
    assert loss_curves.main(argv) == 0 and loss_curves.main(argv) == 0
    (flags,) = trained
    assert flags[flags.index("--seed") + 1] == "4" and "--lr" in flags
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = small.result("run").losses
    assert header(path) == header(RESULTS / "loss_curves.csv")
    assert [(row["split"], row["update"]) for row in rows] == [("train", "5"), ("train", "7"), ("eval", "7")]
    assert float(rows[0]["loss"]) == pytest.approx(sum(losses[:5]) / 5, abs=1e-4)
    assert float(rows[1]["loss"]) == pytest.approx(sum(losses[5:]) / 2, abs=1e-4)


def test_a_row_of_the_size_of_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "code_size.csv"
    assert code_size.main(["--commit", "abc1234", "--results", str(path)]) == 0
    row, functions = only_row(path), [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert header(path) == header(RESULTS / "code_size.csv") and row["commit"] == "abc1234"
    assert (
        functions[0][0] == "layer/autograd_op.py" and ["layer/linear.py", "LowRankLinear.quantized_update"] in functions
    )
    assert len(functions) == int(row["gradient_functions"]) > int(row["gradient_functions_in_kernels"]) > 0
    assert int(row["files"]) > 100 and int(row["lines"]) > 100 * int(row["files"])


@pytest.mark.slow
def test_rows_of_random_settings_in_two_checkouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, path = tmp_path / "other", tmp_path / "same_bits.csv"
    shutil.copytree(ROOT / "qgalore", other / "qgalore")
    argv = ["--before", str(other), "--before_commit", "abc1234", "--settings", "3", "--results", str(path)]
    assert same_bits.main(argv) == 0
    row = only_row(path)
    assert header(path) == header(RESULTS / "same_bits.csv")
    assert (row["before"], row["settings"], row["refused_by_both"], row["differing"]) == ("abc1234", "3", "0", "0")
    seeding = other / "qgalore/seeding.py"
    seeding.write_text(seeding.read_text(encoding="utf-8").replace("for part in parts:", "for part in (1, *parts):"))
    path.unlink()
    assert same_bits.main(argv) == 1
    assert int(only_row(path)["differing"]) > 0 and "setting 0: " in capsys.readouterr().out


def test_rows_of_kernels_add_up_to_the_time_of_an_update(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    argv = [
        "--models",
        "9m",
        "--device",
        "cpu",
        "--batch_size",
        "1",
        "--warmup",
        "1",
        "--updates",
        "2",
        "--extra",
        "--max_length 32",
    ]
    with restored_process():
        assert (
            bench_kernels.main([*argv, "--results", str(path), "--methods", "q_galore_full_rank", "--kernels", "1000"])
            == 0
        )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [float(row["ms"]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(float(rows[0]["busy_ms"]), rel=0.02)
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.02)
    products = [row for row in rows if row["kernel"] in ("aten::mm", "aten::addmm", "aten::bmm")]
    assert products and all(float(row["calls"]) >= 1 for row in products)
