"""Perplexity of named settings on a fixed token set: each is trained by the real `run_pretrain.py`.

    python benchmarks/quality.py --tokens DIR [--settings adamw_tuned,q_galore_streaming] [--updates 800]

DIR holds `train.uint16` and `validation.uint16` (`scripts/tokenize_dataset.py` writes such a folder). One row a run
goes to `benchmarks/results/quality.csv`. The setting: LLaMA-60M, 65,536 tokens an update, sequences of 256, cosine to
10 % after 10 % of warm-up, clipping at 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Q_GALORE = ["--optimizer", "q_galore_adamw8bit", "--weight_quant", "--stochastic_round", "--proj_quant"]
LOW_RANK = ["--lr", "1e-2", "--rank", "128", "--galore_scale", "0.25", "--update_proj_gap", "200"]
SETTINGS: dict[str, list[str]] = {
    "adamw": ["--optimizer", "adamw", "--lr", "1e-3"],
    "adamw_tuned": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "adamw_tuned_beta2_999": ["--optimizer", "adamw", "--lr", "1e-3", "--full_rank_lr", "1e-2", "--beta2", "0.999"],
    "adam8bit_tuned": ["--optimizer", "adam8bit", "--lr", "1e-3", "--full_rank_lr", "1e-2"],
    "galore_svd": ["--optimizer", "galore_adamw8bit", *LOW_RANK],
    "q_galore_svd": [*Q_GALORE, *LOW_RANK],
    "q_galore_per_layer": [*Q_GALORE, *LOW_RANK, "--optimizer", "q_galore_adamw8bit_per_layer", "--grad_clipping", "0"],
    "q_galore_svd_nearest": [*[flag for flag in Q_GALORE if flag != "--stochastic_round"], *LOW_RANK],
    "q_galore_streaming": [*Q_GALORE, *LOW_RANK, "--subspace", "streaming", "--update_proj_gap", "50"],
    "q_galore_streaming_20": [*Q_GALORE, *LOW_RANK, "--subspace", "streaming", "--update_proj_gap", "20"],
}  # fmt: skip


def main() -> None:
    """Train the settings asked for, one after the other, and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", required=True, help="folder with train and validation token files")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, separated by commas")
    parser.add_argument("--model", default="60m", help="name of a config")
    parser.add_argument("--updates", type=int, default=800, help="updates a run")
    parser.add_argument("--batch_size", type=int, default=256, help="sequences of 256 tokens in a micro-batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and rounding")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/quality.csv"), help="CSV to append to")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    parser.add_argument("--extra", default="", help="more flags for every run, in one string")
    args = parser.parse_args()
    for name in args.settings.split(","):
        row = measure(name, args)
        print(json.dumps(row), flush=True)
        append_row(Path(args.results), row)


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train one setting and read its metrics."""
    flags = ["--model_config", f"configs/llama_{args.model}.json", "--dataset", args.tokens, "--max_length", "256"]
    flags += ["--batch_size", str(args.batch_size), "--total_batch_size", "256", "--seed", str(args.seed)]
    flags += ["--num_training_steps", str(args.updates), "--warmup_steps", str(args.updates // 10)]
    flags += [
        "--grad_clipping",
        "1.0",
        "--wandb_mode",
        "off",
        "--save_every",
        "0",
        *SETTINGS[name],
        *args.extra.split(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "run_pretrain.py", *flags, "--save_dir", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return summarize(name, args, lines, time.perf_counter() - start)


def summarize(name: str, args: argparse.Namespace, lines: list[dict[str, float]], seconds: float) -> dict[str, object]:
    """One row of results from the lines of a metrics.jsonl."""
    import torch

    train = [line for line in lines if "train/loss" in line]
    speeds = sorted(line["throughput/tokens_per_second"] for line in train)
    last, evaluation = train[-1], lines[-1]
    return {
        "setting": name,
        "flags": " ".join(SETTINGS[name] + args.extra.split()),
        "model": args.model,
        "updates": args.updates,
        "seed": args.seed,
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


def commit() -> str:
    """The commit measured, from git or, for a copy without a repository, from the variable COMMIT."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def append_row(path: Path, row: dict[str, object]) -> None:
    """Append a row to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
