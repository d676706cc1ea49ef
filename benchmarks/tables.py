"""Make the papers' tables: run what is missing of one, and write it with our figures beside theirs.

    python -m benchmarks.tables --table pretrain --models 60m,130m --budget short
    python -m benchmarks.tables --table pretrain --models 60m --budget updates:800 --sequences 256 --dataset DIR --tuned
    python -m benchmarks.tables --table glue --methods full,q_galore --seeds 0
    python -m benchmarks.tables --table ablation --dry_run

A run has one row in `benchmarks/results/tables.csv`, by which it is known: the same command again trains what has no
row yet, after Ctrl-C or a lost machine from the newest checkpoint in `--folder`. A run that fails, out of memory for
example, has a row with its error, and the others go on; `--retry` tries those again. With `--gpus 0,1` two run at once.

pretrain: perplexity and bytes of all methods. memory, throughput: 48 to 72 updates of a micro-batch each. ablation:
Q-GaLore with one thing changed. glue, mmlu: fine-tuning, with rows in `glue_mmlu.csv`. What a method is:
`table_methods.py`, `table_finetuning.py`; the papers' figures: `paper_figures.py`. `--tuned` multiplies a method's
learning rates by the best of 1, 0.5 and 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import table_finetuning, table_guide
from benchmarks.rows import ROOT, append_row, rows_by
from benchmarks.table_jobs import COLUMNS, KEY, Job, Row, Study, hours_in_words, measure, planned, reason
from benchmarks.table_layout import LAYOUTS
from benchmarks.table_methods import ABLATION, METHODS, SEQUENCES, Budget, recipe_of
from benchmarks.training_runs import FAILED, STOPPED, answers, serve
from peft_pretraining.errors import UserError
from peft_pretraining.speed.cards import find_card

RESULTS = ROOT / "benchmarks/results/tables.csv"
LOCKED = "another process is running there"
"""In the words of `run_pretrain.py`."""
OF_ALL_RUNS = ("--dataset ", "--tokenizer ")
"""How `run_pretrain.py` begins to say that data cannot be read, such as those of a hub that is not reached."""
TABLES = (*LAYOUTS, *table_finetuning.TABLES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, failed runs included, 2 for a UserError, 143 or 130 where a signal stopped it."""
    args = build_parser().parse_args(argv)
    if args.worker:
        serve(lambda job: measure(Job(*job)))
        return 0
    signal.signal(signal.SIGTERM, _exit)
    try:
        if args.guide:
            table_guide.write(Path(args.guide), measured_table)
            return 0
        check_gpus(args.gpus, args.ranks)
        check_table(args)
        text = finetuning_table(args) if args.table in table_finetuning.TABLES else pretraining_table(args)
    except UserError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tables: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(text)
    if args.out and not args.dry_run:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default="pretrain")
    text = "names of configs, separated by commas (default: 60m; for glue and mmlu the paper's models)"
    parser.add_argument("--models", default="", help=text)
    parser.add_argument("--tasks", default="", help="of glue, separated by commas (default: all)")
    parser.add_argument("--methods", default="", help="of the table's, separated by commas (default: all)")
    text = "length of a run: paper, short (what an H100 does in an hour), tokens:52M or updates:800"
    parser.add_argument("--budget", default="short", help=text)
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--tuned", action="store_true", help="learning rates times the best of 1, 0.5 and 2")
    text = "length of the runs that choose (default: --budget, or tokens:52M if that is shorter)"
    parser.add_argument("--tune_budget", default="", help=text)
    parser.add_argument("--tune_model", default="", help="model of the runs that choose (default: the first)")
    text = "as for run_pretrain.py, such as a folder of tokens (default: c4; for glue and mmlu the hub's)"
    parser.add_argument("--dataset", default="", help=text)
    parser.add_argument("--sequences", type=int, default=512, help="sequences of 256 tokens an update")
    parser.add_argument(
        "--batch_size", type=int, help="sequences in a micro-batch, 1 or more (default: by model or task)"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--gpus", default="", help="indices of the GPUs, separated by commas (default: the first)")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that train a run together, by torchrun")
    parser.add_argument("--folder", default=str(ROOT / "runs/tables"), help="checkpoints of runs that have not ended")
    parser.add_argument("--results", default="", help="CSV of all runs (default: in benchmarks/results)")
    parser.add_argument("--out", default="", help="file for the table, in Markdown")
    text = "write the tables of docs/results/papers_tables.md, or of another page with such marks, anew; runs nothing"
    parser.add_argument("--guide", nargs="?", const=str(table_guide.PAGE), default="", metavar="PAGE", help=text)
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs with counted hours, run nothing")
    parser.add_argument("--gpu", default="h100", help="card of which --dry_run counts the hours, as for qgalore plan")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("--extra", default="", help="more flags of run_pretrain.py for every run, in one string")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def measured_table(argv: Sequence[str]) -> str:
    """The table of a command line from the rows that there are, without methods and models that have none."""
    args = build_parser().parse_args(argv)
    if args.table in table_finetuning.TABLES:
        jobs = table_finetuning.jobs_of(args, [*table_finetuning.METHODS], seeds_of(args.seeds))
        rows = rows_by(Path(args.results or table_finetuning.RESULTS), table_finetuning.KEY)
        found = {(job.model, job.method) for job in jobs if job.key in rows}
        jobs = [job for job in jobs if (job.model, job.method) in found]
        return table_finetuning.LAYOUTS[args.table](jobs, rows) if jobs else table_guide.NOTHING
    of_runs = rows_by(Path(args.results or RESULTS), KEY)
    study = table_guide.measured(study_of(args), of_runs)
    return LAYOUTS[args.table](study, study.chosen(of_runs), of_runs) if study else table_guide.NOTHING


def finetuning_table(args: argparse.Namespace) -> str:
    """Run what is missing of GLUE or MMLU; returns the table, or with `--dry_run` the list of runs."""
    methods = names_of("methods", args.methods, [*table_finetuning.METHODS])
    return table_finetuning.table(args, methods, seeds_of(args.seeds))


def pretraining_table(args: argparse.Namespace) -> str:
    """Train what is missing of a table of pretraining runs; returns the table, or with `--dry_run` the list of runs."""
    study, results = study_of(args), Path(args.results or RESULTS)
    if args.dry_run:
        rows = rows_by(results, KEY)
        return hours_in_words(study, study.jobs(rows), missing(study, rows, args.retry), rows, find_card(args.gpu))
    retry = args.retry
    while jobs := missing(study, rows_by(results, KEY), retry):
        train(jobs, gpus_of_runs(args.gpus, args.ranks), results, args.note, study.is_of_speed)
        retry = False
    rows = rows_by(results, KEY)
    return LAYOUTS[args.table](study, study.chosen(rows), rows)


def study_of(args: argparse.Namespace) -> Study:
    """The study that the flags ask for; raises UserError for names, numbers and lengths that there are not."""
    known = [*METHODS] if args.table != "ablation" else ["q_galore", *ABLATION]
    methods = names_of("methods", args.methods, known)
    models = [name for name in args.models.split(",") if name] or ["60m"]
    for model in [*models, *filter(None, [args.tune_model])]:
        recipe_of(model)
    if args.sequences < 1:
        raise UserError(f"--sequences {args.sequences}: an update has 1 sequence or more; the papers' has {SEQUENCES}")
    if args.ranks < 1 or args.sequences % args.ranks:
        raise UserError(f"--ranks {args.ranks}: give a number of GPUs that divides --sequences {args.sequences}")
    study = Study(
        args.table,
        models,
        methods,
        seeds=seeds_of(args.seeds),
        budget=Budget(args.budget),
        sequences=args.sequences,
        tuned=args.tuned,
        tune_budget=Budget(args.tune_budget or args.budget),
        tune_is_capped=not args.tune_budget,
        tune_model=args.tune_model or models[0],
        dataset=args.dataset or "c4",
        batch_size=args.batch_size,
        ranks=args.ranks,
        device=args.device,
        folder=Path(args.folder),
        extra=tuple(args.extra.split()),
    )
    study.jobs({})  # for what is wrong with a length
    return study


def names_of(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """The names of a list by commas, all of `known` for an empty one; raises UserError for others."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--{flag} {','.join(unknown)}: there is no such name; there are {', '.join(known)}")
    return names or list(known)


def seeds_of(text: str) -> list[int]:
    """Whole numbers of a list by commas; raises UserError for anything else."""
    if not all(word.isdecimal() for word in text.split(",")):
        raise UserError(f"--seeds {text}: give whole numbers separated by commas, such as 0,1,2")
    return [int(word) for word in dict.fromkeys(text.split(","))]


def check_gpus(gpus: str, ranks: int) -> None:
    """Raise UserError where `--gpus` is no list of indices, or they cannot be dealt to runs of so many ranks each."""
    each = gpus.split(",")
    if gpus and not all(word.isdecimal() for word in each):
        raise UserError(f"--gpus {gpus}: give indices of GPUs separated by commas, such as 0,1")
    if gpus and ranks > 0 and len(each) % ranks:
        raise UserError(
            f"--gpus {gpus}: {len(each)} GPUs are no multiple of --ranks {ranks}; give as many for each run"
        )


def check_table(args: argparse.Namespace) -> None:
    """Raise UserError for a micro-batch of no sequence, and for flags of which the table's runs take no notice."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(
            f"--batch_size {args.batch_size}: a micro-batch has 1 sequence or more; leave it out for as many as the "
            "table has for each of its runs"
        )
    tunes = args.table in table_finetuning.TABLES
    others = {"sequences": 512, "ranks": 1, "tune_budget": "", "tune_model": ""} if tunes else {"tasks": ""}
    for name, default in others.items():
        if getattr(args, name) != default:
            here, there = "fine-tuning", "pretraining"
            here, there = (here, there) if tunes else (there, here)
            raise UserError(
                f"--{name} {getattr(args, name)}: --table {args.table} has runs of {here}, and the flag is of {there}; "
                "leave it out"
            )


def gpus_of_runs(gpus: str, ranks: int) -> list[str]:
    """The GPUs of each of the runs that train at a time, from those of `--gpus`; "" for those that a run chooses."""
    each = gpus.split(",")
    return [",".join(each[first : first + ranks]) for first in range(0, len(each), ranks)]


# ---- rows


def missing(study: Study, rows: dict[tuple[str, ...], Row], retry: bool = False) -> list[Job]:
    """The runs of a study that have no row, or with `retry` one with an error."""
    done = {key for key, row in rows.items() if not (retry and row["error"])}
    return [job for job in study.jobs(rows) if job.key not in done]


def train(jobs: Sequence[Job], gpus: Sequence[str], results: Path, note: str = "", fresh: bool = False) -> None:
    """Train runs with a worker for each entry of `gpus`, and append a row for each as it ends.

    fresh: each in a process of its own, for peaks of memory.
    A run's folder is removed when it has ended well. Raises KeyboardInterrupt if a run was stopped from outside, and
    UserError if another process trains it, or what it was to read is no fault of its own.
    """
    command = [sys.executable, "-m", "benchmarks.tables", "--worker"]
    with contextlib.closing(answers(jobs, command, gpus, fresh)) as answered:
        for job, answer in answered:
            if STOPPED in answer:
                raise KeyboardInterrupt
            if LOCKED in str(answer.get(FAILED)):
                raise UserError(
                    f"--folder: another process trains {job.model} {job.method} in {job.folder}; wait until it has "
                    "ended, or give another --folder"
                )
            row: dict[str, object] = {**dict.fromkeys(COLUMNS, ""), **job.columns(), "note": note}
            if FAILED in answer:
                why = reason(str(answer[FAILED]))
                if why.startswith(OF_ALL_RUNS):
                    raise UserError(
                        f"{why} All runs of the table read it, so none has a row of this; --dataset gives them other "
                        "data, and --extra='--tokenizer NAME' another tokenizer."
                    )
                row |= planned(job) | {"error": why[:300]}
                print(f"{job.model} {job.method} failed:\n{answer[FAILED]}", file=sys.stderr, flush=True)
            else:
                row |= answer
            append_row(results, row)
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
            if FAILED not in answer:  # else `--retry` goes on from what it has saved
                shutil.rmtree(job.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
