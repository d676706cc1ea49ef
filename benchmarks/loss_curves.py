"""Loss curves of small runs on a CPU: LLaMA-9M on Python's own documentation, by three methods and three seeds.

    python -m benchmarks.loss_curves                        # trains what has no rows: minutes a run on one core
    python -m benchmarks.loss_curves --methods recipe --seeds 3

The runs are those of `scripts/quickstart.sh`, with other flags for the other methods. A row is the mean training loss
of five updates, or an evaluation on held-out tokens. Rows go to `benchmarks/results/loss_curves.csv`, and
`docs/make/loss_curves.py` draws them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import ROOT, append_row, commit, rows_by
from peft_pretraining.reporting.jsonl import read_metrics

RESULTS = ROOT / "benchmarks/results/loss_curves.csv"
UPDATES = 150
WINDOW = 5
"""Updates whose losses a row has the mean of."""
_SHARED = (
    "--model_config 9m --dataset pydocs --packing pack --dtype float32 --batch_size 8 --total_batch_size 8 "
    f"--max_length 128 --num_training_steps {UPDATES} --warmup_steps {UPDATES // 10} --eval_every {UPDATES // 2} "
    "--eval_tokens 50K --save_every 0 --wandb_mode off --device cpu --workers 0"
)
METHODS: Mapping[str, str] = {
    "recipe": "--optimizer q_galore_adamw8bit_per_layer --recipe orthogonal",
    "paper": "--optimizer q_galore_adamw8bit_per_layer --recipe paper --lr 0.01 --rank 32 --galore_scale 0.25",
    "adamw": "--optimizer adamw --lr 0.001 --full_rank_lr 0.01",
}
"""The flags of each method beside those of the quickstart. The rates of adamw are those of its first rows in
`docs/quality.md` and were not tuned for this model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what has no rows; returns 0, or the exit code of the run that failed."""
    parser = argparse.ArgumentParser(prog="loss_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV to append to")
    parser.add_argument("--device", default="one core of a Xeon, other work beside", help="what it runs on, in words")
    parser.add_argument("--extra", default="", help="more flags of run_pretrain.py, which win")
    args = parser.parse_args(argv)
    made = {key[:2] for key in rows_by(args.results, ("method", "seed", "update"))}
    for seed in args.seeds.split(","):
        for method in args.methods.split(","):
            if (method, seed) in made:
                continue
            with tempfile.TemporaryDirectory(prefix="loss-curves-") as folder:
                flags = f"{_SHARED} {METHODS[method]} --seed {seed} --save_dir {folder} {args.extra}".split()
                code = train(flags)
                if code:
                    return code
                for row in rows_of(read_metrics(Path(folder))):
                    about = {"flags": METHODS[method], "device": args.device, "torch": torch.__version__}
                    append_row(args.results, {"method": method, "seed": seed, **row, **about, "commit": commit()})
    return 0


def train(flags: Sequence[str]) -> int:
    """Train in a process of its own, on one core; returns its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "run_pretrain.py", *flags], cwd=ROOT, env=environment, check=False
    ).returncode


def rows_of(lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, object]]:
    """The mean loss of every `WINDOW` updates, and the loss of each evaluation."""
    losses = [(line["update_step"], line["train/loss"]) for line in lines if "train/loss" in line]
    for begin in range(0, len(losses), WINDOW):
        window = losses[begin : begin + WINDOW]
        mean = statistics.fmean(loss for _, loss in window)
        yield {"update": window[-1][0], "split": "train", "loss": round(mean, 4)}
    for line in lines:
        if "eval/loss" in line:
            yield {"update": line["update_step"], "split": "eval", "loss": round(line["eval/loss"], 4)}


if __name__ == "__main__":
    sys.exit(main())
