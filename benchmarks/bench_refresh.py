"""The share of a training update that is spent on refreshing subspaces.

    python -m benchmarks.bench_refresh --models 60m,130m,350m,1b
    python -m benchmarks.bench_refresh --models 7b --methods q_galore_checkpointing,q_galore_orthogonal_checkpointing

One training alternates between blocks of updates with the refreshes of its schedule, and blocks without, for which the
schedule is postponed. Updates of a block follow one another without waiting for the device, as in a run. The share is
the additional time of the blocks with refreshes, divided by their time; a block has at least a few refreshes. Rows go
to `benchmarks/results/refresh.csv`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compare import Row, seconds_in_a_row
from benchmarks.compare_methods import add_methods, setting_of, split_method, train_ours, training_parser
from benchmarks.rows import append_row, commit
from peft_pretraining.runtime.process import make_reproducible
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import World, start_world
from qgalore.optimizer import LowRankAdamW
from qgalore.subspace.schedule import first_refresh_spread

RECIPES = {"q_galore": "paper", "q_galore_orthogonal": "orthogonal"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = training_parser("bench_refresh", __doc__.splitlines()[0], "60m,130m,350m,1b", "refresh.csv")
    add_methods(parser, RECIPES)
    parser.add_argument("--updates", type=int, default=40, help="updates of a block")
    parser.add_argument("--blocks", type=int, default=5, help="pairs of blocks")
    args = parser.parse_args(argv)
    world = start_world(args.device, StopRequest())
    make_reproducible()
    for model in args.models.split(","):
        for method in args.methods:
            row = measure(model, method, args, world)
            print(json.dumps(row), flush=True)
            append_row(Path(args.results), row)
    return 0


def measure(model: str, method: str, args: argparse.Namespace, world: World) -> Row:
    """Measure one row."""
    device = world.device
    setting = setting_of(model, method, args, device)
    training, _, optimizer = train_ours(setting, RECIPES[split_method(method)[0]], world)
    assert isinstance(optimizer, LowRankAdamW)
    schedules = [weight.subspace.schedule for weight in optimizer.low_rank_weights()]
    interval = schedules[0].options.update_proj_gap
    # The warm-up has all first refreshes, and the steps before CUDA graphs are captured.
    seconds_in_a_row(training.update, first_refresh_spread(len(schedules), interval) + 3, device)
    with_refreshes, without = [], []
    before = sum(schedule.refreshes for schedule in schedules)
    for _ in range(args.blocks):
        with_refreshes.append(seconds_in_a_row(training.update, args.updates, device))
        made = sum(schedule.refreshes for schedule in schedules) - before
        for schedule in schedules:
            schedule.next_refresh += args.updates
        without.append(seconds_in_a_row(training.update, args.updates, device))
        assert sum(schedule.refreshes for schedule in schedules) - before == made, "a refresh that was put off"
    pairs = [1 - without_any / some for some, without_any in zip(with_refreshes, without, strict=True)]
    return {
        "model": model,
        "method": method,
        "micro_batch": setting.micro_batch,
        "interval": interval,
        "refreshes_an_update": round(made / args.blocks / args.updates, 3),
        "update_ms": round(1e3 * statistics.mean(with_refreshes), 2),
        "without_refreshes_ms": round(1e3 * statistics.mean(without), 2),
        "refresh_share": round(1 - statistics.mean(without) / statistics.mean(with_refreshes), 4),
        "shares_of_pairs": " ".join(f"{share:.4f}" for share in pairs),
        "updates": 2 * args.blocks * args.updates,
        "flags": training.flags,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }


if __name__ == "__main__":
    sys.exit(main())
