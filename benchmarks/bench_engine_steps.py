"""Time of an update on the device and on its host, for the methods of `benchmarks/compare.py`.

    python -m benchmarks.bench_engine_steps --models 60m,1b --methods adamw_compiled,q_galore
    torchrun --standalone --nproc_per_node 2 -m benchmarks.bench_engine_steps --models 350m --methods q_galore

`update_ms` is of updates that follow one another without waiting for the device, as in a run. `python_ms` is what the
host needs to launch an update while the device is idle: if it is longer than `update_ms`, Python is the limit. Peaks
are of the timed updates. Ours trains on all GPUs of a launch, other methods on one. Rows go to
`benchmarks/results/engine_steps.csv`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_refresh import RECIPES
from benchmarks.compare import Row, seconds_in_a_row, wait_for
from benchmarks.compare_methods import (
    METHODS,
    Setting,
    add_methods,
    setting_of,
    split_method,
    train_ours,
    training_parser,
)
from benchmarks.models import LENGTH
from benchmarks.rows import append_row, commit
from peft_pretraining.reporting.throughput import memory_metrics
from peft_pretraining.runtime.process import make_reproducible
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import World, start_world

OURS = {**RECIPES, "q_galore_int8_activations": "paper"}
"""The recipes of the methods that `train_ours` trains, on any number of ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, one process for each GPU."""
    parser = training_parser("bench_engine_steps", __doc__.splitlines()[0], "60m,350m,1b", "engine_steps.csv")
    add_methods(parser, METHODS)
    parser.add_argument("--warmup", type=int, default=20, help="updates before the timed ones")
    parser.add_argument("--updates", type=int, default=20, help="timed updates, in a row and again one by one")
    args = parser.parse_args(argv)
    world = start_world(args.device, StopRequest())
    for model in args.models.split(","):
        for method in args.methods:
            row = measure(model, method, args, world)
            if world.is_main:
                print(json.dumps(row), flush=True)
                append_row(Path(args.results), row)
    world.close()
    return 0


def measure(model: str, method: str, args: argparse.Namespace, world: World) -> Row:
    """Measure one row, on every rank; its times are those of the slowest rank."""
    device = world.device
    setting = setting_of(model, method, args, device)
    update, replays = training_of(method, setting, world)
    seconds_in_a_row(update, args.warmup, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = max(world.gather(seconds_in_a_row(update, args.updates, device)))
    host_seconds = max(world.gather(seconds_of_host(update, args.updates, device)))
    memory, graphs = memory_metrics(device), replays()
    del update, replays
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = world.world_size * setting.micro_batch * LENGTH
    ours = split_method(method)[0] in OURS
    return {
        "model": model,
        "method": split_method(method)[0],
        "micro_batch": setting.micro_batch,
        "rank": setting.rank if ours else "",
        "checkpointing": "yes" if setting.checkpoint_every else "no",
        "cuda_graphs": "yes" if graphs else "no",
        "gpus": world.world_size,
        "update_ms": round(1e3 * seconds, 2),
        "python_ms": round(1e3 * host_seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_gb": round(memory.get("memory/peak_gb", 0.0), 3),
        "reserved_gb": round(memory["memory/reserved_gb"], 3) if "memory/reserved_gb" in memory else "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }


def training_of(method: str, setting: Setting, world: World) -> tuple[Callable[[], Tensor], Callable[[], bool]]:
    """(function that makes an update, function that tells whether updates are replayed from CUDA graphs by now)."""
    name = split_method(method)[0]
    if name not in OURS:
        if world.world_size > 1:
            raise SystemExit(f"--methods {method}: only {', '.join(OURS)} train on several GPUs")
        return METHODS[name](setting).update, lambda: False
    make_reproducible()
    if name == "q_galore_int8_activations":
        setting = replace(setting, extra=f"--int8_activations {setting.extra}")
    training, model, _ = train_ours(setting, OURS[name], world)
    return training.update, lambda: bool(getattr(model.model.run_layers, "replays", False))


def seconds_of_host(update: Callable[[], Tensor], count: int, device: torch.device) -> float:
    """The median time in which the host launches an update on an idle device."""
    seconds = []
    for _ in range(count):
        wait_for(device)
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
