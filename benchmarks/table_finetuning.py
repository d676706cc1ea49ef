"""The tables of fine-tuning, GLUE and MMLU: run the programs of `peft_pretraining/finetune`, write what they measured.

Each is a process that goes on by itself from the checkpoints of its folder and leaves a line of JSON with its scores,
of which a row of `benchmarks/results/glue_mmlu.csv` is made.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import paper_figures
from benchmarks.rows import ROOT, append_row, commit, rows_by
from benchmarks.table_layout import failures, markdown
from peft_pretraining.errors import UserError

Row = dict[str, str]

RESULTS = ROOT / "benchmarks/results/glue_mmlu.csv"
SHORT_UPDATES = 300
KEY = ("table", "task", "method", "model", "data", "flags", "seed")
GROUPS = {
    "stem": "mmlu_stem", "social": "mmlu_social_sciences", "humanities": "mmlu_humanities", "other": "mmlu_other",
    "average": "mmlu",
}  # fmt: skip
"""Columns of MMLU's parts, with their names in lm-eval."""
COLUMNS = (
    *KEY,
    *("metric", "score", "best_score", *GROUPS, "counted_gb", "peak_gb", "updates", "seconds"),
    *("device", "torch", "commit", "note", "error"),
)
OF_ALL_RUNS = ("--init_from ", "--dataset ")
"""How a program begins to say that a model or its data cannot be read."""
METHODS: Mapping[str, str] = {
    "full": "Full", "lora": "LoRA", "galore": "GaLore", "qlora": "QLoRA (8 bits)", "q_galore": "Q-GaLore",
}  # fmt: skip


class Program(NamedTuple):
    """A table's program."""

    module: str
    tasks: tuple[str, ...]
    models: Mapping[str, str]
    """Names on the hub of the paper's models; any other text is a path or a name itself."""


PROGRAMS: Mapping[str, Program] = {
    "glue": Program(
        "peft_pretraining.finetune.glue", paper_figures.GLUE_TASKS, {"roberta-base": "FacebookAI/roberta-base"}
    ),
    "mmlu": Program(
        "peft_pretraining.finetune.mmlu",
        ("mmlu",),
        {
            "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
            "gemma-7b": "google/gemma-7b",
            "mistral-7b": "mistralai/Mistral-7B-v0.1",
        },
    ),
}
TABLES = tuple(PROGRAMS)


class Job(NamedTuple):
    """A run of fine-tuning."""

    table: str
    task: str
    method: str
    model: str
    data: str
    flags: str
    seed: int
    argv: list[str]
    """Of its program."""
    folder: Path

    @property
    def key(self) -> tuple[str, ...]:
        """The values of `KEY`."""
        return tuple(str(getattr(self, name)) for name in KEY)


def table(args: argparse.Namespace, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Run what is missing of a table and return it; with `--dry_run` only list the commands.

    Raises UserError for what the flags ask for and is not there, such as a model of a hub that is not reached.
    """
    results = Path(args.results or RESULTS)
    jobs = jobs_of(args, methods, seeds)
    rows = rows_by(results, KEY)
    todo = [job for job in jobs if job.key not in rows or (args.retry and rows[job.key]["error"])]
    if args.dry_run:
        commands = [f"python -m {PROGRAMS[job.table].module} {' '.join(job.argv)}" for job in todo]
        return "\n".join([*commands, f"{len(todo)} runs are missing; none was timed yet, so there are no hours."])
    for job, row in finished(todo, args.gpus.split(",")):
        error = str(row["error"])
        if (why := error.removeprefix(f"{job.table}: ")).startswith(OF_ALL_RUNS):
            raise UserError(
                f"{why} All runs of {job.model} read it, so none has a row of this; --models and --dataset give others."
            )
        row |= {"note": args.note, "error": error[:300]}
        append_row(results, row)
        print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
        shutil.rmtree(job.folder, ignore_errors=True)
    return LAYOUTS[args.table](jobs, rows_by(results, KEY))


def jobs_of(args: argparse.Namespace, methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The runs that the flags ask for; raises UserError for tasks, lengths and flags that there are not."""
    program = PROGRAMS[args.table]
    tasks = [name for name in args.tasks.split(",") if name] or list(program.tasks)
    if unknown := [name for name in tasks if name not in program.tasks]:
        raise UserError(f"--tasks {','.join(unknown)}: --table {args.table} has {', '.join(program.tasks)}")
    if args.tuned:
        raise UserError(f"--tuned: --table {args.table} has the papers' rates for every method; leave it out")
    micro_batch = ["--batch_size", str(args.batch_size)] if args.batch_size else []
    flags = " ".join([*_length(args.budget), *micro_batch, *args.extra.split()])
    data = args.dataset and ["--dataset", args.dataset]
    models = [name for name in args.models.split(",") if name] or list(program.models)
    found = []
    for model, task, method, seed in itertools.product(models, tasks, methods, seeds):
        key = (args.table, task, method, Path(model).name, Path(args.dataset).name, flags, seed)
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
        folder = Path(args.folder) / f"{args.table}-{task}-{method}-{digest}"
        argv = ["--task", task] if len(program.tasks) > 1 else []
        argv += ["--method", method, "--seed", str(seed), "--init_from", program.models.get(model, model)]
        argv += ["--save_dir", str(folder), *data, "--device", args.device, *flags.split()]
        found.append(Job(*key, argv, folder))
    return found


def _length(budget: str) -> list[str]:
    """The flags of a length: none for the paper's epochs."""
    kind, _, number = budget.partition(":")
    if budget == "paper":
        return []
    if budget == "short":
        return ["--num_training_steps", str(SHORT_UPDATES)]
    if kind == "updates" and number.isdecimal() and int(number):
        return ["--num_training_steps", number]
    raise UserError(
        f"--budget {budget}: for fine-tuning give paper (its epochs), short ({SHORT_UPDATES} updates) or a number of "
        "updates such as updates:1000"
    )


# ---- runs


def finished(jobs: Sequence[Job], gpus: Sequence[str]) -> Any:
    """Run the jobs, as many at a time as there are GPUs; yields (job, row) as each ends."""
    idle: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        idle.put(gpu)

    processes: set[subprocess.Popen[str]] = set()

    def run(job: Job) -> dict[str, object]:
        gpu = idle.get()
        try:
            return row_of(job, gpu, processes)
        finally:
            idle.put(gpu)

    pool = ThreadPoolExecutor(len(gpus))
    futures = {pool.submit(run, job): job for job in jobs}
    try:
        for done in as_completed(futures):
            yield futures[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(processes):  # they go on from their newest checkpoints
            process.terminate()
        pool.shutdown(wait=True)


def row_of(job: Job, gpu: str, processes: set[subprocess.Popen[str]]) -> dict[str, object]:
    """Run a job in a process of its own, one of `processes` meanwhile; returns its row, with the error if it failed."""
    row: dict[str, object] = {**dict.fromkeys(COLUMNS, ""), **dict(zip(KEY, job.key, strict=True)), "commit": commit()}
    lines = job.folder.parent / f"{job.folder.name}.jsonl"
    command = [sys.executable, "-m", PROGRAMS[job.table].module, *job.argv, "--results", str(lines)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    processes.add(process)
    _, errors = process.communicate()
    processes.remove(process)
    if process.returncode or not lines.exists():
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        print(errors[-3000:], file=sys.stderr, flush=True)
        return row | {"error": last}
    found = json.loads(lines.read_text(encoding="utf-8").splitlines()[-1])
    lines.unlink()
    row |= {name: found[name] for name in COLUMNS if name in found and name not in KEY}
    shots = found.get("mmlu_5shot") or {}
    return (
        row | {column: shots.get(name, "") for column, name in GROUPS.items()} | {"torch": found["versions"]["torch"]}
    )


# ---- layouts


def glue(jobs: Sequence[Job], rows: Mapping[tuple[str, ...], Row]) -> str:
    """Scores by method and task with their average, ours / the paper's, and the bytes."""
    tasks, methods, models = (
        [*dict.fromkeys(getattr(job, name) for job in jobs)] for name in ("task", "method", "model")
    )
    parts = []
    for model in models:
        of_paper = model == "roberta-base"
        lines = []
        for method in methods:
            found = {task: _rows(jobs, rows, model, method, task) for task in tasks}
            ours = {task: _mean(found[task], "score") for task in tasks}
            paper = dict(zip([*paper_figures.GLUE_TASKS, "average"], paper_figures.GLUE[method], strict=True))
            average = statistics.mean(ours.values()) if all(ours.values()) else None  # type: ignore[type-var]
            same = of_paper and set(tasks) == set(paper_figures.GLUE_TASKS)
            line = [METHODS[method], *(_beside(ours[task], paper[task] if of_paper else None) for task in tasks)]
            line.append(_beside(average, paper["average"] if same else None))
            some = [row for each in found.values() for row in each]
            line += [_beside(_gb(some, 1000), paper_figures.GLUE_MB[method] if of_paper else None), *_cost(some)]
            lines.append(line)
        head = ["method", *tasks, "average", "weights and states MB", "peak GB", "hours", "card", "commit"]
        parts += [f"{model}, ours / the paper's:", markdown(head, lines)]
    return "\n\n".join([*parts, *failures(_errors(jobs, rows)), f"The paper's figures: {paper_figures.GLUE_SOURCE}."])


def mmlu(jobs: Sequence[Job], rows: Mapping[tuple[str, ...], Row]) -> str:
    """Accuracies of MMLU's parts with 5 examples by model and method, ours / the paper's, and the bytes."""
    lines = []
    for model, method in dict.fromkeys((job.model, job.method) for job in jobs):
        found = _rows(jobs, rows, model, method, "mmlu")
        paper = paper_figures.MMLU.get((method, model), (None,) * len(GROUPS))
        line = [
            model,
            METHODS[method],
            *(_beside(_mean(found, name), each) for name, each in zip(GROUPS, paper, strict=True)),
        ]
        size = paper_figures.MMLU_GB[method] if model == "llama-3-8b" else None
        lines.append([*line, _beside(_mean(found, "score"), None), _beside(_gb(found, 1), size), *_cost(found)])
    head = [
        "model",
        "method",
        *GROUPS,
        "validation accuracy",
        "weights and states GB",
        "peak GB",
        "hours",
        "card",
        "commit",
    ]
    words = "Ours / the paper's; the five parts by lm-eval with 5 examples, where it is installed."
    source = f"The paper's figures: {paper_figures.MMLU_SOURCE}; it names no data, epochs or rates."
    return "\n\n".join([words, markdown(head, lines), *failures(_errors(jobs, rows)), source])


LAYOUTS: Mapping[str, Callable[[Sequence[Job], Mapping[tuple[str, ...], Row]], str]] = {"glue": glue, "mmlu": mmlu}


def _rows(jobs: Sequence[Job], rows: Mapping[tuple[str, ...], Row], *cell: str) -> list[Row]:
    """The rows of a cell (model, method, task), a seed each."""
    return [rows[job.key] for job in jobs if (job.model, job.method, job.task) == cell and job.key in rows]


def _mean(rows: Sequence[Row], column: str) -> float | None:
    found = [float(row[column]) for row in rows if row[column]]
    return statistics.mean(found) if found else None


def _gb(rows: Sequence[Row], factor: int) -> float | None:
    mean = _mean(rows, "counted_gb")
    return None if mean is None else round(factor * mean, 1)


def _beside(ours: float | None, paper: float | None) -> str:
    """Ours / the paper's."""
    words = "" if ours is None else f"{ours:.2f}".removesuffix(".00")
    return words if paper is None else f"{words} / {paper:g}".strip()


def _cost(rows: Sequence[Row]) -> list[str]:
    """Largest peak, hours of all runs, cards and commits."""
    done = [row for row in rows if not row["error"]]
    if not done:
        return ["", "", "", ""]
    hours = sum(float(row["seconds"]) for row in done) / 3600
    cards, commits = (", ".join(dict.fromkeys(row[name] for row in done)) for name in ("device", "commit"))
    return [f"{max(float(row['peak_gb']) for row in done):.2f}", f"{hours:.2f}", cards, commits]


def _errors(jobs: Sequence[Job], rows: Mapping[tuple[str, ...], Row]) -> list[tuple[str, str]]:
    return [
        (f"{job.model} {job.task} {job.method}, seed {job.seed}", rows[job.key]["error"])
        for job in jobs
        if job.key in rows
    ]
