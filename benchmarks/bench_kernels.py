"""Where the time of an update goes: its kernels, those of one name together, the longest first.

    python -m benchmarks.bench_kernels --models 130m,350m --methods adamw_compiled,q_galore_full_rank

PyTorch's profiler watches a few updates that follow one another. `ms` is the time of a kernel in one update, `calls`
how often it runs in it, `share` its part of the time in which the device was busy. `update_ms` is an update without the
profiler, `busy_ms` the kernels of one together: where the first is longer the device waits, where it is shorter kernels
ran side by side. On a CPU the operators of PyTorch take the place of kernels. Rows go to
`benchmarks/results/kernels.csv`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare import Row, seconds_in_a_row, wait_for
from benchmarks.compare_methods import METHODS, add_methods, setting_of, split_method, training_parser
from benchmarks.rows import append_row, commit

NAME_LENGTH = 100
"""Characters of a kernel's name that are kept: names of templates are longer, and end alike."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = training_parser("bench_kernels", __doc__.splitlines()[0], "60m,130m,350m", "kernels.csv")
    add_methods(parser, METHODS)
    parser.add_argument("--warmup", type=int, default=20, help="updates before the profiled ones")
    parser.add_argument("--updates", type=int, default=5, help="profiled updates, and as many timed ones before them")
    parser.add_argument("--kernels", type=int, default=25, help="rows for each method")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    for model in args.models.split(","):
        for method in args.methods:
            rows = measure(model, method, args, device)
            for row in rows:
                append_row(Path(args.results), row)
            print(table(rows), flush=True)
    return 0


def measure(model: str, method: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows of the kernels that take most of an update's time."""
    setting = setting_of(model, method, args, device)
    update = METHODS[split_method(method)[0]](setting).update
    seconds_in_a_row(update, args.warmup, device)
    seconds = seconds_in_a_row(update, args.updates, device)
    found = kernels_of(update, args.updates, device)
    del update
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    busy = sum(ms for _, ms in found.values())
    longest = sorted(found.items(), key=lambda item: -item[1][1])[: args.kernels]
    circumstances = {
        "update_ms": round(1e3 * seconds, 2),
        "busy_ms": round(busy, 2),
        "micro_batch": setting.micro_batch,
        "extra": args.extra,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }
    return [
        {"model": model, "method": method, "kernel": name, "calls": round(calls, 1), "ms": round(ms, 3)}
        | {"share": round(ms / busy, 4)}
        | circumstances
        for name, (calls, ms) in longest
    ]


def kernels_of(update: Callable[[], Tensor], updates: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """By the name of a kernel (calls, milliseconds) in one of `updates` updates."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(updates):
            update()
        wait_for(device)
    found: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        microseconds = _own_time(event, on_gpu)
        if microseconds > 0:
            name = event.key[:NAME_LENGTH]
            calls, ms = found.get(name, (0.0, 0.0))
            found[name] = calls + event.count / updates, ms + microseconds / 1e3 / updates
    return found


def _own_time(event: Any, on_gpu: bool) -> float:
    if not on_gpu:
        return float(event.self_cpu_time_total)
    return float(event.self_device_time_total) if event.device_type.name == "CUDA" else 0.0


def table(rows: Sequence[Row]) -> str:
    """The rows of one method, for people."""
    first = rows[0]
    lines = [f"{first['model']} {first['method']}: {first['update_ms']} ms an update, kernels {first['busy_ms']} ms"]
    lines += [f"{row['ms']:>9} ms {row['share']:>7.1%} {row['calls']:>7} x {row['kernel']}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
