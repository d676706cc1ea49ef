"""`benchmarks/tables.py`: runs that are missing, rows of a small model on a CPU, and the text of each table."""

from __future__ import annotations

import csv
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper_figures, table_finetuning, table_jobs, table_layout, table_methods, tables, training_runs
from benchmarks.models import LENGTH
from benchmarks.rows import ROOT
from benchmarks.table_jobs import Job, Row, Study
from benchmarks.table_methods import ABLATION, METHODS, RECIPES, SEQUENCES, SHORT_TOKENS, Budget
from peft_pretraining.checkpoint.folder import lock_folder
from peft_pretraining.config.flags import build_parser
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import GROUPS
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS
from tests.small_run import CONFIG, restored_process, stopping, token_stream

HAS_METHODS = any("--method" in action.option_strings for action in build_parser(GROUPS, "", "")._actions)
OF_METHODS = ("low_rank", "lora", "relora", "qlora")


class Place:
    """A small model and its data, with the flags that go with them; runs are trained in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "tables.csv"
        self.trained: list[str] = []
        self.stop_in = ""
        """A method whose run gets a signal after its first update."""
        (folder / "small.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": LENGTH}))
        (folder / "tokens").mkdir()
        for name, seed, count in (("train", 1, 20_000), ("validation", 2, 2_000)):
            (folder / "tokens" / f"{name}.uint16").write_bytes(token_stream(count, seed).tobytes())

    def argv(self, *argv: str) -> list[str]:
        extra = (
            "--dtype float32 --workers 0 --data_lanes 4 --eval_tokens 600 --weight_group_size 48 --proj_group_size 48"
        )
        flags = ["--models", "small", "--dataset", str(self.folder / "tokens"), "--device", "cpu", "--sequences", "2"]
        flags += ["--batch_size", "2", "--budget", "updates:3", f"--extra={extra}", "--results", str(self.results)]
        return [*flags, "--folder", str(self.folder / "runs"), "--out", str(self.folder / "table.md"), *argv]

    def main(self, *argv: str) -> int:
        with restored_process():
            return tables.main(self.argv(*argv))

    def answers(
        self, jobs: Sequence[Job], command: Sequence[str], gpus: Sequence[str], fresh: bool
    ) -> Generator[tuple[Job, training_runs.Answer], None, None]:
        """As `training_runs.answers` with one worker, in this process."""
        for job in jobs:
            self.trained.append(job.method)
            answer = io.StringIO()
            with stopping(1 if job.method == self.stop_in else -1, 1, signal.SIGTERM):
                training_runs.work([json.dumps(job)], answer, lambda words: table_jobs.measure(Job(*words)))
            yield job, json.loads(answer.getvalue())

    def rows(self) -> list[Row]:
        with self.results.open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(tmp_path)
    for module in (table_jobs, table_methods):
        monkeypatch.setattr(module, "config_path", lambda model: tmp_path / f"{model}.json")
    monkeypatch.setattr(table_methods, "config", lambda model: read_config(tmp_path / f"{model}.json"))
    monkeypatch.setattr(tables, "answers", found.answers)
    return found


def test_what_was_stopped_is_the_only_run_of_the_next_start(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.stop_in = "galore"
    assert place.main("--methods", "full,galore") == 130
    assert "tables: stopped; the same command goes on from here" in capsys.readouterr().err
    (first,) = place.rows()
    assert (first["method"], first["error"], place.trained) == ("full", "", ["full", "galore"])
    assert not (place.folder / "table.md").exists() and len(list((place.folder / "runs").iterdir())) == 1

    place.stop_in = ""
    assert place.main("--methods", "full,galore", "--dry_run") == 0
    listed = capsys.readouterr().out
    assert "| small | galore | x 1 | 0 | 3 |" in listed and "| full |" not in listed and "1 runs are missing" in listed
    assert place.trained == ["full", "galore"], "a dry run trains nothing"
    assert place.main("--methods", "full,galore") == 0
    assert place.trained == ["full", "galore", "galore"]
    resumed = place.rows()[1]
    assert not list((place.folder / "runs").iterdir()), "a run that has its row needs no folder"

    # The same to the last digit as a run that was never stopped.
    place.results.unlink()
    assert place.main("--methods", "galore") == 0
    (whole,) = place.rows()
    assert whole["perplexity"] == resumed["perplexity"] and whole["flags"] == resumed["flags"]
    assert float(resumed["train_hours"]) > 0 and (resumed["updates"], resumed["data"]) == ("3", "tokens")


def test_a_run_that_fails_keeps_its_error_and_the_table_goes_on(place: Place) -> None:
    assert place.main("--methods", "recipe,full", "--extra=--dtype float32 --eval_tokens 600 --rank 999") == 0
    failed, done = place.rows()
    assert "--rank is 999" in failed["error"] and failed["perplexity"] == "" and done["error"] == ""
    text = (place.folder / "table.md").read_text()
    assert "| `--recipe orthogonal` | failed |  |" in text and f"- small recipe, seed 0: {failed['error']}" in text
    argv = ["--methods", "recipe,full", "--extra=--dtype float32 --eval_tokens 600 --rank 999"]
    place.trained.clear()
    assert place.main(*argv) == 0 and place.trained == []
    assert place.main(*argv, "--retry") == 0 and place.trained == ["recipe"]


def test_a_run_that_needs_too_much_memory_has_its_plan(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(argv: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(table_jobs.run_pretrain, "main", out_of_memory)
    assert place.main("--table", "memory", "--methods", "full") == 0
    (row,) = place.rows()
    assert row["error"].endswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
    assert 0 < float(row["weights_and_states_gb"]) < float(row["planned_peak_gb"]) and row["peak_gb"] == ""
    line = f"| small | Full (AdamW) | {row['weights_and_states_gb']} |  | {row['planned_peak_gb']} |  |  |"
    assert line in (place.folder / "table.md").read_text()


def test_data_that_cannot_be_read_are_a_sentence_and_no_rows(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As C4 without a network, which no method can help: every run would have a row of the same error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for argv, said in (
        (["--dataset", str(place.folder / "none")], f"--dataset {place.folder / 'none'} is neither"),
        (["--dataset", "pydocs", "--extra=--tokenizer none/such"], "--tokenizer none/such: it is no local file"),
    ):
        place.trained.clear()
        assert place.main("--methods", "full,galore", *argv) == 2
        error = capsys.readouterr().err
        assert f"tables: {said}" in error and "All runs of the table read it, so none has a row of this" in error
        assert place.trained == ["full"] and not place.results.exists()


def test_runs_of_speed_leave_no_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[list[str]] = []

    def answers(*given: Any) -> Iterator[tuple[Job, training_runs.Answer]]:
        for job, answer in place.answers(*given):
            saved.append([path.name for path in Path(job.folder).rglob("*.safetensors")])
            yield job, answer

    monkeypatch.setattr(tables, "answers", answers)
    monkeypatch.setattr(table_jobs, "speed_updates", lambda model: 3)
    assert place.main("--table", "throughput", "--methods", "full") == 0
    assert place.main("--methods", "full", "--budget", "updates:2") == 0
    assert not saved[0] and saved[1] and len(place.rows()) == 2


def test_a_run_that_another_process_trains_is_left_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.stop_in = "full"
    assert place.main("--methods", "full") == 130
    (folder,) = (place.folder / "runs").iterdir()
    lock = lock_folder(folder)
    place.stop_in = ""
    assert place.main("--methods", "full") == 2
    assert "--folder: another process trains small full in" in capsys.readouterr().err
    assert folder.is_dir() and not place.results.exists()
    lock.file.close()
    assert place.main("--methods", "full") == 0 and not folder.exists()


def test_learning_rates_are_those_of_the_best_trial(place: Place) -> None:
    def perplexity(job: Job) -> float:
        return {0.5: 30.0, 1.0: 40.0, 2.0: float("nan")}[job.rates]

    study = tables.study_of(
        tables.build_parser().parse_args(place.argv("--methods", "muon", "--tuned", "--seeds", "0,1"))
    )
    first = study.jobs({})
    assert [(job.rates, job.seed) for job in first] == [(1.0, 0), (0.5, 0), (2.0, 0)]
    lr = [job.flags[job.flags.index("--lr") + 1] for job in first]
    assert lr == ["0.004", "0.002", "0.008"] and first[1].flags[first[1].flags.index("--full_rank_lr") + 1] == "0.02"
    rows = {job.key: row_of(job, perplexity=str(perplexity(job))) for job in first}
    assert tables.missing(study, rows)[0].rates == 0.5
    assert [(job.rates, job.seed) for job in tables.missing(study, rows)] == [(0.5, 1)]
    done = rows | {job.key: row_of(job) for job in tables.missing(study, rows)}
    text = table_layout.pretrain(study, study.chosen(done), done)
    assert cells(text, "Muon") == ["Muon", "35.00 (2 seeds) / 0.18", ""] and "| small | muon | x 0.5 | 1 |" in text
    assert "The best rate of muon is the largest or smallest that was tried." in text
    failed = {job.key: row_of(job, perplexity="", error="out of memory") for job in first}
    assert {job.rates for job in tables.missing(study, failed)} == {1.0}


def row_of(job: Job, **values: object) -> Row:
    """A row of a run as it stands in a file."""
    row = dict.fromkeys(table_jobs.COLUMNS, "") | {name: str(value) for name, value in job.columns().items()}
    measured = {"perplexity": 40.0, "perplexity_official": 39.0, "weights_and_states_gb": 0.18, "planned_peak_gb": 7.2}
    measured |= {"peak_gb": 7.3, "reserved_gb": 7.5, "tokens_per_second_median": 1_000_000, "train_hours": 0.25}
    measured |= {"refreshes": 56.0, "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "commit": "abc1234"}
    return row | {name: str(value) for name, value in (measured | values).items()}


def study_of(*argv: str) -> Study:
    return tables.study_of(tables.build_parser().parse_args(argv))


def cells(text: str, method: str) -> list[str]:
    """The cells of the first line of a table that begins with a method's label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_pretraining_has_the_papers_figure_in_each_cell() -> None:
    study = study_of("--table", "pretrain", "--models", "60m,130m,350m,1b,7b", "--budget", "paper", "--seeds", "0,1")
    rows = {job.key: row_of(job, perplexity=41.0 + 2 * job.seed) for job in study.jobs({})}
    text = table_layout.pretrain(study, study.chosen(rows), rows)
    for method in study.methods:
        _, *found = cells(text, METHODS[method].label)
        assert found[::2] == ["42.00 (2 seeds) / 0.18"] * 5
        for model, cell in zip(study.models, found[1::2], strict=True):
            figure = paper_figures.PRETRAINING.get((method, model))
            assert cell == (f"{figure.perplexity:.2f} / {figure.gigabytes:g}" if figure else ""), (method, model)
    assert "60M 10,000 updates (1,311M tokens)" in text and text.count("as in the paper") == 1
    assert (
        "| 60m | q_galore | x 1 | 1 | 43.0 | 39.0 | 7.2 | 7.3 | 1,000,000 | 0.25 | 256 | 1 | NVIDIA H100 80GB HBM3 |"
        in text
    )
    assert text.endswith("after 40,000 of 150,000 updates; full is 8-bit Adam, GaLore in 8 bits.")
    short = study_of("--budget", "tokens:52M", "--methods", "qlora,muon")
    assert "which is not the paper's run" in table_layout.pretrain(short, short.chosen({}), {})


def test_every_figure_of_the_papers_has_a_source_and_a_place() -> None:
    assert len(paper_figures.PRETRAINING) == 6 * 4 + 3
    for (method, model), figure in paper_figures.PRETRAINING.items():
        assert method in METHODS and model in RECIPES and figure.source.startswith("arXiv 2407.08296")
    assert paper_figures.PRETRAINING["q_galore", "1b"][:2] == (16.25, 3.08)
    assert paper_figures.PRETRAINING["full", "60m"][:2] == (34.06, 0.36)
    assert paper_figures.GLUE.keys() == paper_figures.GLUE_MB.keys() == table_finetuning.METHODS.keys()
    for scores in paper_figures.GLUE.values():
        assert sum(scores[:-1]) / 8 == pytest.approx(scores[-1], abs=0.06), "the average of the tasks"
    assert {method for method, _ in paper_figures.MMLU} == set(table_finetuning.METHODS)
    assert {model for _, model in paper_figures.MMLU} == set(table_finetuning.PROGRAMS["mmlu"].models)


def test_the_tables_of_memory_and_throughput() -> None:
    study = study_of("--table", "throughput", "--models", "60m,7b", "--methods", "full,galore,q_galore")
    jobs = study.jobs({})
    # Eight updates find the subspaces of 56 matrices, and 32 those of 224.
    assert all(job.updates == {"60m": 48, "7b": 72}[job.model] and job.sequences == job.micro_batch for job in jobs)
    assert (
        tables.missing(study_of("--table", "memory", "--models", "60m"), {job.key: {} for job in jobs})[0].method
        == "low_rank"
    )
    speeds = {"full": 1_200_000, "galore": 1_000_000, "q_galore": 900_000}
    rows = {
        job.key: row_of(job, tokens_per_second_steady=speeds[job.method])
        if (job.model, job.method) != ("7b", "full")
        else row_of(job, **dict.fromkeys(table_jobs.COLUMNS[8:-1], ""), error="CUDA out of memory | 80 GB")
        for job in jobs
    }  # fmt: skip
    text = table_layout.throughput(study, study.chosen(rows), rows)
    line = "| 60m | Q-GaLore (the paper's) | 900,000 | 0.90 | 0.85 | 0.4 | 7.3 | 256 | 1 | NVIDIA H100 80GB HBM3 |"
    assert f"{line} 2.11.0 | abc1234 |" in text
    assert "| 7b | Full (AdamW) |  |  |  |  |  |" in text and "- 7b full, seed 0: CUDA out of memory | 80 GB" in text
    text = table_layout.memory(study, study.chosen(rows), rows)
    assert "| 60m | GaLore | 0.18 | 0.24 | 7.2 | 7.3 |  | 256 |" in text
    assert "| 7b | Q-GaLore (the paper's) | 0.18 | 15 | 7.2 | 7.3 | 15.26 | 16 |" in text


def test_steady_speed_is_that_of_the_last_updates() -> None:
    """The first updates of a run at 7B have seven SVDs each, and would be most of 40: so would be their median."""
    (job,) = study_of("--table", "throughput", "--models", "7b", "--methods", "q_galore").jobs({})
    lines = [{"update_step": step, "time/update_seconds": 9.0 if step <= 32 else 0.5} for step in range(1, 73)]
    lines[71]["time/update_seconds"] = 2.5  # with the SVD of a matrix
    tokens = job.micro_batch * 256
    assert table_jobs.steady_speed(job, lines) == round(40 * tokens / (39 * 0.5 + 2.5))
    every_eighth = [line | {"time/update_seconds": 0.25} for line in lines if line["update_step"] % 8 == 0]
    assert table_jobs.steady_speed(job, every_eighth) == round(tokens / 0.25), "lines of some updates stand for all"
    assert table_jobs.train_seconds(lines) == 32 * 9 + 39 * 0.5 + 2.5


def test_the_table_of_ablations() -> None:
    study = study_of("--table", "ablation", "--models", "60m,130m", "--budget", "updates:800", "--sequences", "256")
    perplexities = {"nearest_rounding": 45.5, "lazy_off": 39.5}
    refreshes = {"lazy_off": 2800.0, "lazy_0.4": 1013.6}
    rows = {
        job.key: row_of(job, perplexity=perplexities.get(job.method, 40.0), refreshes=refreshes.get(job.method, 224.0))
        for job in study.jobs({})
    }
    text = table_layout.ablation(study, study.chosen(rows), rows)
    assert cells(text, "nothing changed")[1:] == ["40.00", "", "", ""] * 2
    found = cells(text, ABLATION["nearest_rounding"].label)
    assert found[1:] == ["45.50", "+5.50", "+7.86", "", "45.50", "+5.50", "+1.98", ""]
    assert cells(text, ABLATION["lazy_off"].label)[1:5] == ["39.50", "-0.50", "", "100.0 %"]
    assert cells(text, ABLATION["lazy_0.4"].label)[1:5] == ["40.00", "+0.00", "", "36.2 %"]
    assert "in the paper 36.2 % are" in text
    flags = {job.method: " ".join(job.flags) for job in study.jobs({}) if job.model == "60m"}
    assert all("--update_proj_gap 16 " in flags[name] for name in flags if name.startswith("lazy_"))
    assert "--rank 32" in flags["rank_quarter"] and "--update_proj_gap 500" in flags["interval_500"]


@pytest.mark.parametrize("model", ["60m", "7b", "9m"])
def test_the_flags_of_every_method_parse_and_are_its_recipe(model: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "tokens" / f"{name}.uint16").write_bytes(bytes(2000))
    for table in ("pretrain", "ablation"):
        argv = ["--table", table, "--models", model, "--budget", "updates:800", "--dataset", str(tmp_path / "tokens")]
        for job in study_of(*argv).jobs({}):
            if job.method in OF_METHODS and not HAS_METHODS:
                continue
            run = parse_args(job.argv)
            assert run.batch.total_batch_size == 512 and run.schedule.warmup_steps == 80
            assert run.model.activation_checkpointing == (model == "7b")
            # What a method's name says, whatever a flag's default has come to be.
            ours = job.method in ABLATION or job.method in ("q_galore", "recipe", "full_rank")
            assert run.quantization.weight_quant == ours and run.optimizer.optimizer.startswith("q_galore") == ours
            if job.method == "q_galore" and model != "9m":
                recipe = RECIPES[model]
                assert run.optimizer.lr == recipe.q_galore_lr and run.subspace.rank == recipe.rank
                assert (run.subspace.galore_scale, run.subspace.update_proj_gap) == (0.25, recipe.interval)
                assert run.subspace.subspace == "svd" and run.optimizer.recipe == "paper"


def test_gpus_are_dealt_to_runs() -> None:
    assert tables.gpus_of_runs("", 2) == [""] and tables.gpus_of_runs("0,0", 1) == ["0", "0"]
    assert tables.gpus_of_runs("0,1,2,3", 2) == ["0,1", "2,3"]
    (job,) = study_of("--ranks", "8", "--methods", "full").jobs({})
    assert (job.micro_batch, job.run_args().batch.gradient_accumulation) == (64, 1)
    (job,) = study_of("--ranks", "8", "--methods", "full", "--table", "throughput").jobs({})
    assert (job.micro_batch, job.sequences, job.run_args().batch.gradient_accumulation) == (256, 2048, 1)


@pytest.mark.slow
def test_a_run_on_two_ranks(place: Place) -> None:
    assert place.main("--methods", "full", "--ranks", "2", "--extra=--dtype float32 --workers 0 --eval_tokens 600") == 0
    assert place.main("--methods", "full", "--extra=--dtype float32 --workers 0 --eval_tokens 600 --seed 0") == 0
    two, one = place.rows()
    assert (two["ranks"], two["micro_batch"], two["error"], one["ranks"], one["micro_batch"]) == (
        "2",
        "1",
        "",
        "1",
        "2",
    )
    assert float(two["perplexity"]) == pytest.approx(float(one["perplexity"]), rel=1e-3)


def test_a_paper_that_reports_before_the_end_is_compared_at_that_update(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "small", table_methods.Recipe(3, 16, reported_at=2))
    extra = "--dtype float32 --workers 0 --data_lanes 4 --eval_tokens 600"
    assert place.main("--methods", "full", f"--extra={extra} --eval_every 1") == 0
    assert place.main("--methods", "full", f"--extra={extra}") == 0
    at_two, last = (float(row["perplexity"]) for row in place.rows())
    assert at_two > 1.001 * last, "the run that did not evaluate there has its last perplexity"


def test_lengths() -> None:
    assert Budget("tokens:52M").updates("60m", 256) == 794 and Budget("updates:800").updates("60m", 1) == 800
    assert Budget("paper").updates("7b", 512) == 150_000 and Budget("paper").updates("60m", 256) == 20_000
    for model, tokens in SHORT_TOKENS.items():
        recipe = RECIPES[model]
        speeds = [
            each.tokens_per_second for each in MEASURED_SPEEDS
            if (each.card, each.model, each.rank) == ("h100", model, recipe.rank) and not each.int8_activations
        ]  # fmt: skip
        assert tokens == pytest.approx(min(3600 * max(speeds), recipe.updates * SEQUENCES * LENGTH), rel=0.03), model


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--methods", "sgd"], "--methods sgd: there is no such name; there are full, low_rank, lora,"),
        (["--methods", "full", "--table", "ablation"], "--methods full: there is no such name; there are q_galore,"),
        (["--models", "60n"], "--models 60n: there is no such config; there are 100m,"),
        (["--tune_model", "60n"], "--models 60n: there is no such config"),
        (["--budget", "long"], "--budget long: give paper, short, a number of tokens such as tokens:52M"),
        (["--budget", "tokens:x"], "--budget tokens:x: the number behind the colon must be"),
        (["--budget", "updates:0"], "--budget updates:0: give paper, short, a number of tokens"),
        (["--models", "9m", "--budget", "paper"], "the papers have no run of 9m, only of 60m, 130m, 350m, 1b, 7b"),
        (["--seeds", "0;1"], "--seeds 0;1: give whole numbers separated by commas, such as 0,1,2"),
        (["--sequences", "0"], "--sequences 0: an update has 1 sequence or more; the papers' has 512"),
        (["--batch_size", "0"], "--batch_size 0: a micro-batch has 1 sequence or more; leave it out for as many as"),
        (["--gpus", "x", "--dry_run"], "--gpus x: give indices of GPUs separated by commas, such as 0,1"),
        (["--gpus", "0,", "--dry_run"], "--gpus 0,: give indices of GPUs separated by commas"),
        (["--gpus", "0,1,2", "--ranks", "2", "--dry_run"], "--gpus 0,1,2: 3 GPUs are no multiple of --ranks 2"),
        (["--gpus", "x", "--table", "glue", "--dry_run"], "--gpus x: give indices of GPUs separated by commas"),
        (["--ranks", "3"], "--ranks 3: give a number of GPUs that divides --sequences 512"),
        (["--gpu", "abacus", "--dry_run"], "--gpu abacus is not in the table of cards"),
        (["--table", "glue", "--tasks", "wnli"], "--tasks wnli: --table glue has cola, stsb,"),
        (["--table", "glue", "--budget", "tokens:1M"], "--budget tokens:1M: for fine-tuning give paper (its epochs)"),
        (
            ["--table", "glue", "--batch_size", "0"],
            "--batch_size 0: a micro-batch has 1 sequence or more; leave it out",
        ),
        (
            ["--table", "glue", "--sequences", "64"],
            "--sequences 64: --table glue has runs of fine-tuning, and the flag",
        ),
        (["--table", "mmlu", "--ranks", "2"], "--ranks 2: --table mmlu has runs of fine-tuning, and the flag is of"),
        (["--tasks", "rte"], "--tasks rte: --table pretrain has runs of pretraining, and the flag is of fine-tuning"),
        (["--table", "mmlu", "--tuned"], "--tuned: --table mmlu has the papers' rates for every method"),
    ],
)
def test_what_the_user_can_mend(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with restored_process():
        assert tables.main([*argv, "--results", str(tmp_path / "tables.csv")]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_hours_are_measured_where_a_row_is_of_that_card(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(*place.argv("--methods", "full,q_galore", "--tuned"))
    job = study.job("small", "full", 7, updates=100)
    rows = {job.key: row_of(job, tokens_per_second_median=1536)}
    card = tables.find_card("h100")
    assert table_jobs.tokens_per_second(job, rows, card) == (1536, "measured")
    assert table_jobs.tokens_per_second(job, rows, tables.find_card("4090"))[1] == "counted"
    text = table_jobs.hours_in_words(study, study.jobs({}), tables.missing(study, rows), rows, card)
    assert (
        len(text.splitlines()) == 2 + 2 * 3 + 2
        and "6 runs are missing: 0.000834 hours of one H100 SXM; counted" in text
    )
    assert "| small | full | x 0.5 | 0 | 3 | 0.001536M | 1,536 | measured | 0.000278 |" in text


def test_why_a_run_failed_is_a_line() -> None:
    refused = "device: cpu\nrun_pretrain.py: the command line has 2 problems:\n  1. --a\n  2. --b\n"
    assert table_jobs.reason(refused) == "the command line has 2 problems: 1. --a 2. --b"
    assert table_jobs.reason("update 1\nTraceback ...\n  x\nValueError: no\n") == "ValueError: no"
    assert table_jobs.reason("\n") == "it gave no reason"


# ---- fine-tuning

FAKE = """
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--init_from"] == "none/such":
    sys.exit("glue: --init_from none/such: there is no tokenizer that transformers can load")
if flags["--method"] == "galore":
    sys.exit("glue: --device cuda: torch sees no CUDA GPU")
row = {"metric": "accuracy", "score": 60.0 + int(flags["--seed"]), "best_score": 70.0, "counted_gb": 0.747,
       "peak_gb": 1.5, "updates": 300, "seconds": 36.0, "device": "H100", "versions": {"torch": "2.11.0"},
       "mmlu_5shot": {"mmlu": 64.5, "mmlu_stem": 54.0}, "flags": flags}
with open(flags["--results"], "a") as file:
    file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of those that fine-tune, which answers at once and fails for GaLore."""
    (tmp_path / "fake_finetune.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, program in table_finetuning.PROGRAMS.items():
        monkeypatch.setitem(table_finetuning.PROGRAMS, name, program._replace(module="fake_finetune"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "glue_mmlu.csv"


def test_fine_tuning_runs_what_is_missing_and_stands_beside_the_paper(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(*argv: str) -> list[str]:
        with restored_process():
            files = ["--results", str(programs), "--folder", str(programs.parent / "runs")]
            assert tables.main(["--table", "glue", "--tasks", "rte,mrpc", *argv, *files]) == 0
        return capsys.readouterr().out.splitlines()

    main("--methods", "full")
    found = main("--methods", "full,galore", "--seeds", "0,1")
    assert [json.loads(line)["seed"] for line in found if line.startswith("{")] == ["1", "0", "1", "1", "0", "1"]
    line = next(line for line in found if line.startswith("| Full "))
    assert line.startswith("| Full | 60.50 / 79.42 | 60.50 / 91.3 | 60.50 | 747 / 747 | 1.50 | 0.04 | H100 |")
    assert "| GaLore | / 79.06 | / 91.9 |  | / 257 |  |  |  |  |" in found
    assert "- roberta-base rte galore, seed 1: glue: --device cuda: torch sees no CUDA GPU" in found
    assert found[-1] == f"The paper's figures: {paper_figures.GLUE_SOURCE}."
    with programs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and tuple(rows[0]) == table_finetuning.COLUMNS
    assert rows[0]["flags"] == "--num_training_steps 300" and rows[0]["torch"] == "2.11.0"
    commands = main("--methods", "q_galore", "--budget", "paper", "--dry_run", "--batch_size", "4")
    assert commands[0].endswith("--device auto --batch_size 4") and "2 runs are missing" in commands[-1]
    commands = main("--methods", "q_galore", "--budget", "paper", "--dry_run", "--dataset", "files/glue")
    assert "--task rte --method q_galore --seed 0 --init_from FacebookAI/roberta-base" in commands[0]
    assert commands[0].endswith("--dataset files/glue --device auto") and "2 runs are missing" in commands[-1]


def test_a_model_that_cannot_be_read_is_a_sentence_and_no_rows(
    programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--table", "glue", "--models", "none/such", "--methods", "full", "--results", str(programs)]
    with restored_process():
        assert tables.main([*argv, "--folder", str(programs.parent / "runs")]) == 2
    error = capsys.readouterr().err
    assert "tables: --init_from none/such: there is no tokenizer" in error and "--models and --dataset give" in error
    assert not programs.exists()


def test_the_table_of_glue_has_the_papers_figure_in_each_cell() -> None:
    args = tables.build_parser().parse_args(["--table", "glue"])
    jobs = table_finetuning.jobs_of(args, [*table_finetuning.METHODS], [0])
    text = table_finetuning.glue(jobs, {})
    assert f"| method | {' | '.join(paper_figures.GLUE_TASKS)} | average |" in text
    for method, label in table_finetuning.METHODS.items():
        paper = [*paper_figures.GLUE[method], paper_figures.GLUE_MB[method]]
        assert cells(text, label)[1:11] == [f"/ {each:g}" for each in paper]
    some = [job for job in jobs if job.task != "rte"]
    assert cells(table_finetuning.glue(some, {}), "Full")[8] == "", "an average over other tasks is another figure"
    others = [job._replace(model="my_roberta") for job in jobs]
    assert set(cells(table_finetuning.glue(others, {}), "Full")[1:]) == {""}


def test_the_table_of_mmlu_has_the_papers_figures(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--table", "mmlu", "--results", str(programs), "--folder", str(programs.parent / "runs")]
    with restored_process():
        assert tables.main([*argv, "--methods", "full,q_galore"]) == 0
    found = capsys.readouterr().out.splitlines()
    for model in table_finetuning.PROGRAMS["mmlu"].models:
        for method in ("full", "q_galore"):
            label = table_finetuning.METHODS[method]
            line = next(line for line in found if line.startswith(f"| {model} | {label} |"))
            paper = [f"{each:g}" for each in paper_figures.MMLU[method, model]]
            assert [cell.split("/")[-1].strip() for cell in line.split("|")[3:8]] == paper
            assert [cell.split("/")[0].strip() for cell in line.split("|")[3:8]] == ["54", "", "", "", "64.50"]


@pytest.mark.parametrize("table", table_finetuning.TABLES)
def test_the_programs_of_fine_tuning_take_these_flags(table: str, tmp_path: Path) -> None:
    flags = pytest.importorskip("peft_pretraining.finetune.flags")
    program = importlib.import_module(table_finetuning.PROGRAMS[table].module)
    assert flags.METHODS.keys() == table_finetuning.METHODS.keys()
    groups = {
        "glue": lambda: {"task": program.GlueArgs, "method": flags.MethodArgs, "fine-tuning": flags.TuningArgs},
        "mmlu": lambda: {
            "measurement": program.MmluArgs, "method": program.MmluMethodArgs, "fine-tuning": program.MmluTuningArgs,
        },
    }  # fmt: skip
    args = tables.build_parser().parse_args(["--table", table, "--folder", str(tmp_path), "--dataset", "files"])
    for job in table_finetuning.jobs_of(args, [*table_finetuning.METHODS], [3]):
        found = flags.read_command_line([*job.argv, "--results", "x"], groups[table](), "", "")
        assert found["fine-tuning"].seed == 3 and found["fine-tuning"].save_dir == str(job.folder)
        assert found["method"].method == job.method and found["fine-tuning"].num_training_steps == 300
    if table == "glue":
        assert set(program.TASKS) == set(paper_figures.GLUE_TASKS)


@pytest.mark.slow
def test_a_row_of_glue_by_the_program_itself(tmp_path: Path) -> None:
    files = pytest.importorskip("tests.finetune_files")
    files.save_roberta(tmp_path / "roberta")
    files.write_glue(tmp_path / "glue", "rte", ("sentence1", "sentence2"), 2, ("validation",))
    argv = ["--table", "glue", "--tasks", "rte", "--methods", "q_galore", "--models", str(tmp_path / "roberta")]
    argv += ["--dataset", str(tmp_path / "glue"), "--device", "cpu", "--budget", "updates:2", "--folder", str(tmp_path)]
    argv += [
        "--results",
        str(tmp_path / "rows.csv"),
        "--extra=--max_length 32 --rank 4",
        "--out",
        str(tmp_path / "table.md"),
    ]
    with restored_process():
        assert tables.main(argv) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["error"] == "" and (row["model"], row["data"], row["updates"]) == ("roberta", "glue", "2")
    assert 0 <= float(row["score"]) <= 100 and float(row["peak_gb"]) > 0 and row["torch"]
    assert f"| Q-GaLore | {float(row['score']):.2f}".removesuffix(".00") in (tmp_path / "table.md").read_text()


# ---- worker processes

ECHO = "import json, sys, time, signal\nfor line in sys.stdin:\n    job = json.loads(line)\n"


def test_a_worker_that_ends_is_started_again_and_the_others_jobs_are_done() -> None:
    program = ECHO + "    if job == 1: sys.exit(3)\n    print(json.dumps({'squared': job * job}), flush=True)\n"
    found = dict(training_runs.answers([1, 2, 3], [sys.executable, "-c", program], [""]))
    assert found == {1: {"failed": "its worker has ended"}, 2: {"squared": 4}, 3: {"squared": 9}}


@pytest.mark.parametrize(("fresh", "processes"), [(False, 1), (True, 3)])
def test_jobs_share_a_process_or_have_their_own(fresh: bool, processes: int) -> None:
    program = f"import os\n{ECHO}    print(json.dumps({{'process': os.getpid()}}), flush=True)\n"
    found = dict(training_runs.answers([1, 2, 3], [sys.executable, "-c", program], [""], fresh))
    assert len({answer["process"] for answer in found.values()}) == processes


def test_an_exception_stops_the_workers_and_what_waits_is_not_begun(tmp_path: Path) -> None:
    program = ECHO + (
        "    open(job, 'w').write('begun')\n"
        "    signal.signal(signal.SIGTERM, lambda *_: open(job, 'w').write('saved'))\n"
        "    if not job.endswith('0'): signal.pause()\n"
        "    print(json.dumps({}), flush=True)\n"
    )
    jobs = [str(tmp_path / str(number)) for number in range(4)]
    answered = training_runs.answers(jobs, [sys.executable, "-c", program], ["", ""])
    assert next(answered) == (jobs[0], {})
    while not (tmp_path / "1").exists() or not (tmp_path / "2").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # until both have their signal handlers
    with pytest.raises(KeyboardInterrupt):
        answered.throw(KeyboardInterrupt)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["begun", "saved", "saved"]


@pytest.mark.slow
def test_the_program_is_stopped_by_a_signal_and_goes_on(tmp_path: Path) -> None:
    """With real workers, on 9M: SIGTERM while the first of two runs is trained, then the same command again."""
    place = Place(tmp_path)
    argv = place.argv("--models", "9m", "--methods", "full,galore", "--budget", "updates:4", "--batch_size", "1")
    extra = "--dtype float32 --workers 0 --eval_tokens 600 --compile off"
    command = [sys.executable, "-m", "benchmarks.tables", *argv, "--sequences", "1", f"--extra={extra}"]
    process = subprocess.Popen(command, cwd=ROOT)
    while not list((tmp_path / "runs").glob("9m-full-*/metrics.jsonl")):
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM and not place.results.exists()
    assert list((tmp_path / "runs").glob("9m-full-*/step_*"))
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=300).returncode == 0
    assert [row["method"] for row in place.rows()] == ["full", "galore"]


def test_the_caption_has_the_length_that_other_flags_give() -> None:
    assert study_of("--methods", "full").length == 256
    assert study_of("--methods", "full", "--extra=--lr 1 --max_length 32 --rank 4").length == 32
