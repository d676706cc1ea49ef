"""Record a whole run on a CPU as a row: its time and its perplexities, from its metrics.jsonl.

    python -m benchmarks.cpu_runs --run "quickstart, default recipe" --save_dir runs/q -- \
        bash scripts/quickstart.sh --save_dir runs/q
    python -m benchmarks.cpu_runs --run "LLaMA-9M, ..., seed 1" --save_dir runs/9m   # a run that is there

`seconds` is the time of the whole command, empty where none is given. Rows go to `benchmarks/results/cpu_runs.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.reporting.jsonl import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if there is a row, else the exit code of the command."""
    parser = argparse.ArgumentParser(prog="cpu_runs", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="what was run, in words")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--device", default=f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/cpu_runs.csv"), help="CSV to append to")
    parser.add_argument("command", nargs="*", help="what makes the run, after --")
    args = parser.parse_args(argv)
    seconds: float | None = None
    if args.command:
        start = time.perf_counter()
        code = subprocess.run(args.command, cwd=ROOT, check=False).returncode
        if code:
            return code
        seconds = time.perf_counter() - start
    row = row_of(args.run, read_metrics(args.save_dir), seconds) | {
        "device": args.device, "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    append_row(Path(args.results), row)
    return 0


def row_of(run: str, lines: Sequence[dict[str, Any]], seconds: float | None) -> dict[str, object]:
    """The perplexities of the first and last update and of the last evaluation in a metrics.jsonl."""
    train = [line for line in lines if "train/loss" in line]
    evaluation = [line for line in lines if "eval/perplexity" in line][-1]
    times = [line["time/update_seconds"] for line in train if "time/update_seconds" in line]
    return {
        "run": run,
        "seconds": "" if seconds is None else round(seconds),
        "train_perplexity_first": round(train[0]["train/perplexity"], 1),
        "train_perplexity_last": round(train[-1]["train/perplexity"], 1),
        "eval_perplexity": round(evaluation["eval/perplexity"], 1),
        "eval_tokens": int(evaluation["eval/tokens"]),
        "median_update_seconds": round(statistics.median(times), 2),
        "peak_gb": round(max(line.get("memory/peak_gb", 0.0) for line in train), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
