"""Perplexity of named settings on a fixed token set: each is trained by the real `run_pretrain.py`.

    python -m benchmarks.quality --tokens DIR --settings adamw_tuned,q_galore_streaming --seeds 0,1,2 --parallel 3
    python -m benchmarks.quality --plot frontier.png

DIR holds `train.uint16` and `validation.uint16` (`scripts/tokenize_dataset.py` writes such a folder). One row a run
goes to `benchmarks/results/quality.csv`, with the perplexity on DIR's validation tokens, by which settings are chosen,
and on those of `--c4_tokens`, which is only reported. Bytes are those of the plan (`--dry_run`). The setting:
LLaMA-60M, 65,536 tokens an update, sequences of 256, cosine to 10 % after 10 % of warm-up, clipping at 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

import run_pretrain
from benchmarks.models import config_path
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.args import RunArgs, parse_args
from peft_pretraining.checkpoint import load_checkpoint
from peft_pretraining.checkpoint_folder import list_checkpoints
from peft_pretraining.distributed import Processes
from peft_pretraining.dry_run import plan
from peft_pretraining.eval_set import build_eval_set
from peft_pretraining.evaluation import evaluate
from peft_pretraining.model_config import LlamaConfig

_HIGHEST = 1.35
"""Perplexities that a picture has room for, as a multiple of the lowest."""
BYTES = ("weights_gb", "states_gb", "gradients_gb")
QUANTIZED = ["--weight_quant", "--stochastic_round", "--proj_quant"]
Q_GALORE = ["--optimizer", "q_galore_adamw8bit", *QUANTIZED, "--recipe", "paper"]
LOW_RANK = ["--lr", "1e-2", "--rank", "128", "--galore_scale", "0.25", "--update_proj_gap", "200"]
STREAMING = ["--subspace", "streaming", "--update_proj_gap", "20"]
PER_LAYER = ["--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"]
LIMITED = [*Q_GALORE, *LOW_RANK, *STREAMING, *PER_LAYER, "--norm_growth", "1.01"]
SETTINGS: dict[str, list[str]] = {
    "adamw": ["--optimizer", "adamw", "--lr", "1e-3"],
    "adamw_tuned": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "adamw_tuned_beta2_999": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2", "--beta2", "0.999"],
    "muon": ["--optimizer", "muon", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "adam8bit_tuned": ["--optimizer", "adam8bit", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "galore_svd": ["--optimizer", "galore_adamw8bit", *LOW_RANK],
    "q_galore_svd": [*Q_GALORE, *LOW_RANK],
    "q_galore_per_layer": [*Q_GALORE, *LOW_RANK, "--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"],
    "q_galore_svd_nearest": [*[flag for flag in Q_GALORE if flag != "--stochastic_round"], *LOW_RANK],
    "q_galore_streaming": [*Q_GALORE, *LOW_RANK, "--subspace", "streaming", "--update_proj_gap", "50"],
    "q_galore_streaming_20": [*Q_GALORE, *LOW_RANK, *STREAMING],
    "q_galore_layer": [*Q_GALORE, *LOW_RANK, *STREAMING, *PER_LAYER],
    "q_galore_limited": LIMITED,
    "q_galore_fira": [*LIMITED, "--residual", "fira"],
    "q_galore_recipe": ["--optimizer", "q_galore_adamw8bit", *QUANTIZED, "--grad_clipping", "0"],
    "q_galore_recipe_per_layer": ["--optimizer", "q_galore_adamw8bit_per_layer", *QUANTIZED, "--grad_clipping", "0"],
    "q_galore_recipe_float": ["--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"],
    "q_galore_orthogonal": [*LIMITED, "--direction", "orthogonal"],
    "q_galore_orthogonal_fira": [*LIMITED, "--direction", "orthogonal", "--residual", "fira"],
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Train the settings asked for with every seed, and append a row for each run as soon as it has ended."""
    parser = build_parser()
    args = parser.parse_args(argv)
    drawn_only = removed_settings(Path(args.results)) if args.plot and not args.tokens else []
    unknown = sorted(set(args.settings.split(",")) - {*SETTINGS, *drawn_only})
    if unknown:
        parser.error(f"--settings {','.join(unknown)}: there are {', '.join([*SETTINGS, *drawn_only])}")
    if not args.tokens and not args.plot:
        parser.error("--tokens is missing: a folder with train and validation token files (or give --plot alone)")
    if args.tokens:
        runs = [(name, int(seed)) for name in args.settings.split(",") for seed in args.seeds.split(",")]
        with ThreadPoolExecutor(args.parallel) as pool:
            for done in as_completed([pool.submit(measure, name, seed, args) for name, seed in runs]):
                print(json.dumps(done.result()), flush=True)
                append_row(Path(args.results), done.result())
    if args.plot:
        plot(Path(args.results), Path(args.plot), args.model, args.updates, args.settings.split(","))


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
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
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/quality.csv"), help="CSV to append to")
    parser.add_argument(
        "--plot",
        help="draw perplexity against bytes of --settings with --model and --updates into this file",
    )
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    parser.add_argument("--extra", default="", help="more flags for every run, in one string")
    return parser


def flags_of_run(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The command line of `run_pretrain.py`, without its folder."""
    flags = ["--model_config", str(config_path(args.model)), "--dataset", args.tokens]
    flags += ["--max_length", "256", "--batch_size", str(args.batch_size), "--total_batch_size", str(args.sequences)]
    flags += ["--seed", str(seed), "--num_training_steps", str(args.updates), "--device", args.device]
    flags += ["--warmup_steps", str(args.updates // 10), "--grad_clipping", "1.0"]
    return [*flags, "--wandb_mode", "off", "--save_every", "0", *SETTINGS[name], *args.extra.split()]


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Train one setting and read its metrics."""
    flags = flags_of_run(name, seed, args)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "run_pretrain.py", *flags, "--save_dir", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        run = parse_args([*flags, "--save_dir", folder, "--compile", "off"])
        c4 = round(perplexity_on(args.c4_tokens, run), 3) if args.c4_tokens else ""
    row = summarize(name, seed, args, lines, seconds) | {"c4_perplexity": c4}
    return row | planned_bytes(run)


def perplexity_on(tokens: str, run: RunArgs) -> float:
    """Of the newest checkpoint of a run, on the validation tokens of another folder."""
    use_cuda = run.runtime.device == "cuda" or (run.runtime.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    model, _ = run_pretrain.build(run, Processes(0, 1, device))
    model.load_state_dict(load_checkpoint(list_checkpoints(Path(run.checkpoint.save_dir))[-1]).model_tensors)
    eval_set = build_eval_set(
        dataset=tokens, tokenizer=None, packing=run.data.packing, max_length=run.batch.max_length,
        eval_batch_size=run.evaluation.eval_batch_size, eval_tokens=run.evaluation.eval_tokens,
    )  # fmt: skip
    return evaluate(model, eval_set, device).perplexity


def planned_bytes(run: RunArgs) -> dict[str, float]:
    """GB of what stays during a run: weights; projections and optimizer states; gradients that wait for the update."""
    lasting = plan(run, LlamaConfig.from_json(run.model.model_config)).lasting
    first_words = {
        "weights_gb": ("decoder weights", "embeddings"),
        "states_gb": ("projections", "optimizer states"),
        "gradients_gb": ("gradients",),
    }
    return {
        column: round(sum(size for name, size in lasting.items() if name.startswith(words)) / 1e9, 4)
        for column, words in first_words.items()
    }


def summarize(
    name: str, seed: int, args: argparse.Namespace, lines: list[dict[str, float]], seconds: float
) -> dict[str, object]:
    """One row of results from the lines of a metrics.jsonl."""
    train = [line for line in lines if "train/loss" in line]
    speeds = sorted(line["throughput/tokens_per_second"] for line in train)
    last, evaluation = train[-1], lines[-1]
    return {
        "setting": name,
        "flags": " ".join(SETTINGS[name] + args.extra.split()),
        "model": args.model,
        "updates": args.updates,
        "seed": seed,
        "perplexity": round(evaluation["eval/perplexity"], 3),
        "perplexity_official": round(evaluation["eval/perplexity_official"], 3),
        "eval_tokens": int(evaluation["eval/tokens"]),
        "tokens_per_second_median": round(speeds[len(speeds) // 2]),
        "run_seconds": round(seconds, 1),
        "peak_gb": round(last["memory/peak_gb"], 2),
        "reserved_gb": round(last.get("memory/reserved_gb", 0.0), 2),
        "refreshes": last.get("subspace/refreshes", 0),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "micro_batch": args.batch_size,
        "note": args.note,
    }


class Point(NamedTuple):
    """The runs of one setting with the same flags; of a seed that has run again the newest."""

    mean: float
    """Of the perplexities of its seeds."""
    size: float
    """GB of weights, states and gradients."""
    setting: str
    rank: str
    """And the bits of weights, if they are not 8; what the flags say of both."""
    seeds: list[float]


def removed_settings(results: Path) -> list[str]:
    """Names that a results file has rows of and `SETTINGS` has not."""
    with results.open(newline="") as file:
        return [name for name in dict.fromkeys(row["setting"] for row in csv.DictReader(file)) if name not in SETTINGS]


def read_points(results: Path, model: str, updates: int, settings: Sequence[str]) -> list[Point]:
    """Those of a model and a length with known bytes, the best first."""
    runs: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = (row["model"], row["updates"]) == (model, str(updates)) and row["setting"] in settings
            if wanted and row["weights_gb"]:
                runs.setdefault((row["setting"], row["flags"]), {})[row["seed"]] = row
    points = []
    for (setting, flags), by_seed in runs.items():
        rows = list(by_seed.values())
        seeds = [float(row["perplexity"]) for row in rows]
        told = [f"rank {rank}" for rank in re.findall(r"--rank (\d+)", flags)[-1:]]
        told += ["INT4 weights"] * ("--weight_bits 4" in flags)
        size = sum(float(rows[0][name]) for name in BYTES)
        points.append(Point(sum(seeds) / len(seeds), size, setting, ", ".join(told), seeds))
    return sorted(points)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one undercuts in perplexity with as few bytes, by bytes."""
    return sorted(
        (point for point in points if all(other.mean >= point.mean or other.size > point.size for other in points)),
        key=lambda point: point.size,
    )


def plot(results: Path, picture: Path, model: str, updates: int, settings: Sequence[str] = tuple(SETTINGS)) -> None:
    """Perplexity of settings against the bytes of weights, states and gradients.

    A point is the mean of a setting's seeds with the same flags, a bar their range. The frontier of a setting is a line
    in its colour with the ranks; other flags are grey. The axis of bytes is cut where nothing is. What is too high for
    the picture is at its top, with its perplexity.
    """
    from matplotlib import pyplot

    points = read_points(results, model, updates, settings)
    if not points:
        raise SystemExit(f"{results} has no run of --model {model} over --updates {updates} with these --settings")
    sizes = sorted({point.size for point in points})
    gap = max(range(len(sizes)), key=lambda index: sizes[index] - sizes[max(0, index - 1)])
    parts = [part for part in (sizes[:gap], sizes[gap:]) if part]
    figure, axes = pyplot.subplots(
        1, len(parts), sharey=True, squeeze=False, figsize=(9, 5), width_ratios=[3, 1][: len(parts)]
    )
    top = _HIGHEST * points[0].mean
    for number, setting in enumerate(dict.fromkeys(point.setting for point in points)):
        own = [point for point in points if point.setting == setting]
        best = frontier(own)
        label = f"{setting}: {own[0].mean:.1f}" + (f" ({len(own[0].seeds)} seeds)" if len(own[0].seeds) > 1 else "")
        spread = [[p.mean - min(p.seeds) for p in best], [max(p.seeds) - p.mean for p in best]]
        x, y = [p.size for p in best], [min(p.mean, top) for p in best]
        others = [p for p in own if p not in best and p.mean <= top]
        for part in axes[0]:
            part.errorbar(x, y, yerr=spread, fmt="o-", color=f"C{number}", linewidth=1, capsize=3, label=label)
            part.plot([p.size for p in others], [p.mean for p in others], ".", color="lightgrey", zorder=0)
            for p, height in zip(best, y, strict=True):
                told = p.rank + (f": {p.mean:.0f}" if p.mean > top else "")
                part.annotate(told, (p.size, height), (5, -3), textcoords="offset points", fontsize=7, clip_on=True)
    for part, within in zip(axes[0], parts, strict=True):
        margin = 0.2 * (within[-1] - within[0]) or 0.02
        part.set_xlim(within[0] - margin, within[-1] + margin)
    axes[0][0].set_xlabel("weights, optimizer states and gradients, GB")
    axes[0][0].set_ylabel(f"perplexity, {model}, {updates} updates")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(picture, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
