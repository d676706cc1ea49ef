"""Speed on several GPUs as a multiple of the speed on one.

    torchrun --standalone --nproc_per_node 4 -m benchmarks.bench_scaling --models 350m,7b --shard none,optimizer,full

Every rank first trains alone, all of them at the same time without communication; then they train data-parallel, each
on as many sequences as before, once for each mode of `--shard`. With `--total_batch_size` an update has that many
sequences, in as many micro-batches as it takes, alone as on all ranks; 0 is a micro-batch each. Updates follow one
another without waiting for the device, as in a run. `ratio` is the data-parallel speed over the mean of the single
speeds; `ratio_to_slowest` compares with the slowest GPU, for which the others have to wait.

`message_mb` is the size of all gradients that a rank sends in an update without a refresh, `gradient_mb` what it would
be with full gradients. `wire_mb` is what a rank sends on average over all collectives of an update, counted at their
calls: of S bytes over W ranks 2 S (W - 1) / W for an all-reduce and half of it for a reduce, a broadcast or a gather;
`wire_ratio` is that of an all-reduce of the full gradient in bfloat16 for each update. Replicas are compared at the
end. Rows go to `benchmarks/results/scaling.csv`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.compare import Row, seconds_in_a_row
from benchmarks.compare_methods import CHECKPOINTING, Setting, setting_of, train_ours, training_parser
from benchmarks.models import LENGTH
from benchmarks.rows import append_row, commit
from peft_pretraining.checkpoint.run_state import tensors_here
from peft_pretraining.reporting.throughput import memory_metrics
from peft_pretraining.runtime.process import make_reproducible
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import World, start_world
from qgalore.optimizer import LowRankAdamW

NOTHING_RECOMPUTED = ("60m", "130m", "350m", "1b")
"""Other models use activation checkpointing."""
METHODS = {"paper": "q_galore", "orthogonal": "q_galore_orthogonal", "full_rank": "q_galore_full_rank"}
"""The names in `benchmarks.compare` of the recipes."""
_BYTES = 2
"""The size of a value in a bucket: gradients of a single micro-batch are summed in bfloat16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, one process for each GPU."""
    parser = training_parser("bench_scaling", __doc__.splitlines()[0], "350m,7b", "scaling.csv")
    text = "updates before the timed ones (default: all first refreshes; of several micro-batches as many fewer)"
    parser.add_argument("--warmup", type=int, help=text)
    text = "timed updates of one micro-batch; of several as many fewer"
    parser.add_argument("--updates", type=int, default=12, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="how often they are timed; the median counts")
    parser.add_argument("--shard", default="none", help="modes, separated by commas: none, optimizer, full")
    parser.add_argument("--recipe", choices=METHODS, default="paper", help="the recipe of the training")
    sizes = "sequences of an update, 0 for one pass; several are separated by commas (default: 0)"
    parser.add_argument("--total_batch_size", type=_sizes, default=[0], help=sizes)
    args = parser.parse_args(argv)
    world = start_world(args.device, StopRequest())
    make_reproducible()
    for model in args.models.split(","):
        for total in args.total_batch_size:
            for row in measure(model, total, args, world):
                if world.is_main:
                    print(json.dumps(row), flush=True)
                    append_row(Path(args.results), row)
    world.close()
    return 0


def _sizes(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: give numbers of sequences, such as 0,512")
    return [int(part) for part in text.split(",")]


def measure(model: str, total: int, args: argparse.Namespace, world: World) -> Iterator[Row]:
    """Measure a row for each mode, on every rank; total: sequences of an update, 0 for one pass of each rank."""
    method = METHODS[args.recipe] + ("" if model in NOTHING_RECOMPUTED else CHECKPOINTING)
    device = world.device
    setting = setting_of(model, method, args, device)
    micro_batch = setting.micro_batch
    by_one = replace(setting, grad_accum=max(1, total // micro_batch))
    by_all = replace(setting, grad_accum=max(1, total // micro_batch // world.world_size))
    alone = world.gather(train(by_one, World(0, 1, device), args, "none"))
    single = [by_one.grad_accum * micro_batch * LENGTH / row["seconds"] for row in alone]
    tokens = world.world_size * by_all.grad_accum * micro_batch * LENGTH
    for shard in args.shard.split(","):
        all_ranks = world.gather(train(by_all, world, args, shard))
        seconds = max(row["seconds"] for row in all_ranks)
        wire = statistics.mean(row["wire_mb"] for row in all_ranks)
        gradient = all_ranks[0]["gradient_mb"]
        yield {
            "model": model,
            "method": method,
            "micro_batch": micro_batch,
            "gpus": world.world_size,
            "tokens_per_second": round(tokens / seconds),
            "alone_tokens_per_second": " ".join(str(round(speed)) for speed in single),
            "ratio": round(tokens / seconds / statistics.mean(single), 3),
            "ratio_to_slowest": round(tokens / seconds / min(single), 3),
            "update_ms": round(1e3 * seconds, 2),
            "peak_gb": max(row["peak_gb"] for row in all_ranks),
            "alone_peak_gb": max(row["peak_gb"] for row in alone),
            "message_mb": round(all_ranks[0]["message_mb"], 1),
            "gradient_mb": round(gradient, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "commit": commit(),
            "note": args.note,
            "shard": shard,
            "grad_accum": by_all.grad_accum,
            "wire_mb": round(wire, 1),
            "wire_ratio": round(wire / (2 * gradient * _share_of(world.world_size)), 3),
            "extra": args.extra,
        }


def _share_of(ranks: int) -> float:
    """Of a message what each of several ranks sends on average in one pass of it over all."""
    return (ranks - 1) / ranks


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """Within it, the bytes that a rank sends on average are added to the first element of the list."""
    sent, before = [0.0], {name: getattr(dist, name) for name in _PASSES}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
            sent[0] += _PASSES[name] * tensor.nbytes * _share_of(dist.get_world_size(options.get("group")))
            return call(tensor, *rest, **options)

        return counted

    try:
        for name, call in before.items():
            setattr(dist, name, counting(name, call))
        yield sent
    finally:
        for name, call in before.items():
            setattr(dist, name, call)


_PASSES = {"all_reduce": 2, "reduce": 1, "broadcast": 1}
"""How often a collective takes a message over all ranks."""


def train(setting: Setting, world: World, args: argparse.Namespace, shard: str) -> dict[str, float]:
    """Train on the ranks of `world`, compare the replicas, and return what was measured."""
    device = setting.device
    training, model, optimizer = train_ours(setting, args.recipe, world, shard)
    assert isinstance(optimizer, LowRankAdamW)
    matrices, passes = len(list(optimizer.low_rank_weights())), setting.grad_accum
    warmup = args.warmup if args.warmup is not None else max(2, max(12, matrices // 7 + 3) // passes)
    seconds_in_a_row(training.update, warmup, device)
    updates = max(1, args.updates // passes)
    seconds = statistics.median(seconds_in_a_row(training.update, updates, device) for _ in range(max(1, args.repeats)))
    sent = [0.0]
    if world.world_size > 1:
        with counted_bytes() as sent:
            seconds_in_a_row(training.update, 1, device)
        world.check_replicas(tensors_here(model, optimizer), warmup + args.repeats * updates + 1)
    weights = optimizer.weights_of(model)
    found = {
        "seconds": seconds,
        "peak_gb": round(memory_metrics(device).get("memory/peak_gb", 0.0), 3),
        "wire_mb": sent[0] / 1e6,
        "message_mb": _BYTES * sum(weight.values_to_sum for weight in weights) / 1e6,
        "gradient_mb": _BYTES * sum(weight.shape.numel() for weight in weights) / 1e6,
    }
    del training, model, optimizer, weights
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


if __name__ == "__main__":
    sys.exit(main())
