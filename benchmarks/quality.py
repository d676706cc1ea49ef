"""Measure the perplexity of named settings on a fixed token set, each trained by `run_pretrain.py`.

    python -m benchmarks.quality --tokens DIR --settings adamw_tuned,q_galore_streaming --seeds 0,1,2
    python -m benchmarks.quality --tokens DIR --runs benchmarks/open_runs.txt --gpus 0,1 --parallel 2
    python -m benchmarks.quality --plot frontier.png

DIR holds `train.uint16` and `validation.uint16` (`scripts/tokenize_dataset.py` writes such a folder). One row a run
goes to `benchmarks/results/quality.csv`, with the perplexity on DIR's validation tokens, by which settings are chosen,
and on those of `--c4_tokens`, which is only reported. Bytes are those of the plan (`--dry_run`). The setting:
LLaMA-60M, 65,536 tokens an update, sequences of 256, cosine to 10 % after 10 % of warm-up, clipping at 1.

A line of `--runs` has flags of this program that are added to those of the command.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import run_pretrain
from benchmarks.models import config_path
from benchmarks.quality_plot import plot
from benchmarks.rows import ROOT, append_row
from benchmarks.training_runs import FAILED, Answer, answers, measurements, serve
from peft_pretraining.build import build_training
from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.checkpoint.store import load_checkpoint
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.evaluation import evaluate
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.registry import read_config

QUANTIZED = ["--weight_quant", "--stochastic_round", "--proj_quant"]
Q_GALORE = ["--optimizer", "q_galore_adamw8bit", *QUANTIZED, "--recipe", "paper"]
OWN_ADAM8BIT = ["--optimizer", "adam8bit", "--adam8bit_backend", "own"]
LOW_RANK = ["--lr", "1e-2", "--rank", "128", "--galore_scale", "0.25", "--update_proj_gap", "200"]
STREAMING = ["--subspace", "streaming", "--update_proj_gap", "20"]
PER_LAYER = ["--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"]
LIMITED = [*Q_GALORE, *LOW_RANK, *STREAMING, *PER_LAYER, "--norm_growth", "1.01"]
FULL_RANK = [
    "--optimizer", "q_galore_adamw8bit_per_layer", "--weight_quant", "--stochastic_round", "--grad_clipping", "0",
    "--recipe", "orthogonal", "--rank", "full", "--norm_growth", "0", "--weight_decay", "0.4",
    "--full_rank_weight_decay", "0",
]  # fmt: skip
SETTINGS: dict[str, list[str]] = {
    "adamw": ["--optimizer", "adamw", "--lr", "1e-3"],
    "adamw_tuned": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "adamw_tuned_beta2_999": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2", "--beta2", "0.999"],
    "muon": ["--optimizer", "muon", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "adam8bit_tuned": [*OWN_ADAM8BIT, "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "galore_svd": ["--optimizer", "galore_adamw8bit", *LOW_RANK],
    "q_galore_svd": [*Q_GALORE, *LOW_RANK],
    "q_galore_per_layer": [*Q_GALORE, *LOW_RANK, "--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"],
    "q_galore_svd_nearest": [*Q_GALORE, *LOW_RANK, "--no-stochastic_round"],
    "q_galore_streaming": [*Q_GALORE, *LOW_RANK, "--subspace", "streaming", "--update_proj_gap", "50"],
    "q_galore_streaming_20": [*Q_GALORE, *LOW_RANK, *STREAMING],
    "q_galore_layer": [*Q_GALORE, *LOW_RANK, *STREAMING, *PER_LAYER],
    "q_galore_limited": LIMITED,
    "q_galore_fira": [*LIMITED, "--residual", "fira"],
    "q_galore_recipe": ["--optimizer", "q_galore_adamw8bit", *QUANTIZED, "--grad_clipping", "0"],
    "q_galore_recipe_per_layer": ["--optimizer", "q_galore_adamw8bit_per_layer", *QUANTIZED, "--grad_clipping", "0"],
    "q_galore_recipe_float": [
        "--optimizer", "q_galore_adamw8bit_per_layer", "--no-weight_quant", "--no-proj_quant", "--grad_clipping", "0",
    ],
    "full_rank": FULL_RANK,
    "full_rank_recipe": [
        "--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0", "--recipe", "full_rank",
    ],
    "full_rank_in_parts": [*FULL_RANK, "--momentum_rank", "1/16", "--momentum_rest_bits", "4"],
    "q_galore_orthogonal": [*LIMITED, "--direction", "orthogonal"],
    "q_galore_orthogonal_fira": [*LIMITED, "--direction", "orthogonal", "--residual", "fira"],
}  # fmt: skip


class Run(NamedTuple):
    """A run to train."""

    setting: str
    seed: int
    argv: list[str]
    """The flags of this program for the run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program: train every setting with every seed, and append a row for each run when it has ended."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.worker:
        serve(lambda job: measure(Run(*job)))
        return
    if not args.tokens and not args.plot:
        parser.error("--tokens is missing: a folder with train and validation token files (or give --plot alone)")
    runs = runs_of(argv, parser)
    if args.tokens:
        train(runs, args.gpus.split(",") * args.parallel, Path(args.results))
    if args.plot:
        plot(Path(args.results), Path(args.plot), args.model, args.updates, args.settings.split(","))


def train(runs: Sequence[Run], gpus: Sequence[str], results: Path) -> None:
    """Train the runs with a worker for each entry of `gpus`; raises SystemExit at the end if some have failed."""
    failures: list[str] = []
    command = [sys.executable, "-m", "benchmarks.quality", "--worker"]
    with contextlib.closing(answers(runs, command, gpus)) as answered:
        for run, row in answered:
            if FAILED in row:
                failures.append(f"{run.setting} with seed {run.seed} failed: {row[FAILED]}")
                continue
            print(json.dumps(row), flush=True)
            append_row(results, row)
    if failures:
        raise SystemExit("\n".join(failures))


def runs_of(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[Run]:
    """The runs of a command line, or of each line of `--runs`; an unknown name ends the program."""
    args = parser.parse_args(argv)
    lines: list[list[str]] = [[]]
    if args.runs:
        lines = [flags for line in Path(args.runs).read_text().splitlines() if (flags := shlex.split(line, True))]
    runs = []
    for line in lines:
        own = [*argv, *line]
        args = parser.parse_args(own)
        drawn_only = removed_settings(Path(args.results)) if args.plot and not args.tokens else []
        unknown = sorted(set(args.settings.split(",")) - {*SETTINGS, *drawn_only})
        if unknown:
            parser.error(f"--settings {','.join(unknown)}: there are {', '.join([*SETTINGS, *drawn_only])}")
        runs += [Run(name, int(seed), own) for name in args.settings.split(",") for seed in args.seeds.split(",")]
    return runs


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", help="folder with train and validation token files")
    parser.add_argument("--c4_tokens", help="folder with the validation tokens of C4, which are only reported")
    parser.add_argument(
        "--settings",
        default=",".join(SETTINGS),
        help="names, separated by commas; for --plot alone also those of rows whose setting is gone",
    )
    parser.add_argument("--model", default="60m", help="name of a config")
    parser.add_argument("--updates", type=int, default=800, help="updates a run")
    parser.add_argument("--sequences", type=int, default=256, help="sequences of 256 tokens an update")
    parser.add_argument("--batch_size", type=int, default=256, help="sequences in a micro-batch")
    parser.add_argument("--seeds", default="0", help="seeds of weights, data order and rounding, separated by commas")
    parser.add_argument("--runs", help="file whose lines have more flags, one study each; # begins a comment")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--gpus", default="", help="indices of the GPUs, separated by commas (default: the first)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/quality.csv"), help="CSV to append to")
    parser.add_argument(
        "--plot",
        help="draw perplexity against bytes of --settings with --model and --updates into this file",
    )
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    text = "more flags for every run, in one string (--extra=--flag for one alone)"
    parser.add_argument("--extra", default="", help=text)
    return parser


def flags_of_run(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The command line of `run_pretrain.py`, without its folder."""
    flags = ["--model_config", str(config_path(args.model)), "--dataset", args.tokens]
    flags += ["--max_length", "256", "--batch_size", str(args.batch_size), "--total_batch_size", str(args.sequences)]
    flags += ["--seed", str(seed), "--num_training_steps", str(args.updates), "--device", args.device]
    flags += ["--warmup_steps", str(args.updates // 10), "--grad_clipping", "1.0"]
    return [*flags, "--wandb_mode", "off", "--save_every", "0", *SETTINGS[name], *args.extra.split()]


def measure(run: Run) -> Answer:
    """Train and read the metrics."""
    args = build_parser().parse_args(run.argv)
    flags = flags_of_run(run.setting, run.seed, args)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if run_pretrain.main([*flags, "--save_dir", folder]):
            raise SystemExit("run_pretrain.py has refused it")
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        of_run = parse_args([*flags, "--save_dir", folder, "--compile", "off"])
        c4 = round(perplexity_on(args.c4_tokens, of_run), 3) if args.c4_tokens else ""
    row = summarize(run.setting, run.seed, args, lines, seconds) | {"c4_perplexity": c4}
    return row | planned_bytes(of_run)


def perplexity_on(tokens: str, run: RunArgs) -> float:
    """The perplexity of a run's newest checkpoint on the validation tokens of another folder."""
    use_cuda = run.runtime.device == "cuda" or (run.runtime.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    model, _ = build_training(run, device)
    model.load_state_dict(load_checkpoint(list_checkpoints(Path(run.checkpoint.save_dir))[-1]).model_tensors)
    eval_set = build_eval_set(
        dataset=tokens, tokenizer=None, packing=run.data.packing, max_length=run.batch.max_length,
        eval_batch_size=run.evaluation.eval_batch_size, eval_tokens=run.evaluation.eval_tokens,
    )  # fmt: skip
    return evaluate(model, eval_set, device).perplexity


def planned_bytes(run: RunArgs) -> dict[str, float]:
    """GB that are allocated throughout a run: weights; projections and optimizer states; summed gradients."""
    lasting = plan(run, read_config(run.model.model_config)).lasting
    first_words = {
        "weights_gb": ("decoder weights", "embeddings"),
        "states_gb": ("projections", "optimizer states"),
        "gradients_gb": ("gradients",),
    }
    return {
        column: round(sum(size for name, size in lasting.items() if name.startswith(words)) / 1e9, 4)
        for column, words in first_words.items()
    }


def summarize(name: str, seed: int, args: argparse.Namespace, lines: list[dict[str, float]], seconds: float) -> Answer:
    """The row of a run from the lines of its metrics.jsonl."""
    row: Answer = {
        "setting": name,
        "flags": " ".join(SETTINGS[name] + args.extra.split()),
        "model": args.model,
        "updates": args.updates,
        "seed": seed,
        "run_seconds": round(seconds, 1),
        "micro_batch": args.batch_size,
        "note": args.note + averaged_note(lines[-1]),
    }
    return row | measurements(lines)


def averaged_note(evaluation: dict[str, float]) -> str:
    """What `--average_last` has given, in words; empty without it."""
    names = {"eval_averaged": "averaged", "eval_averaged_quantized": "averaged and quantized"}
    found = {text: evaluation.get(f"{name}/perplexity") for name, text in names.items()}
    return "".join(f"; {text} {value:.3f}" for text, value in found.items() if value is not None)


def removed_settings(results: Path) -> list[str]:
    """Names in a results file that are not in `SETTINGS`."""
    with results.open(newline="") as file:
        return [name for name in dict.fromkeys(row["setting"] for row in csv.DictReader(file)) if name not in SETTINGS]


if __name__ == "__main__":
    main()
