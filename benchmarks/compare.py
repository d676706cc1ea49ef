"""Time and memory of a training update: ours, torch's AdamW, and other projects' optimizers on the same model and data.

    python -m benchmarks.compare --models 60m,1b --methods adamw_compiled,galore_torch,q_galore
    python -m benchmarks.compare --models 7b --methods q_galore_checkpointing --grad_accum 2 --cap_gib 16

Every measurement is a process of its own: a few updates to warm up (compilation, tuning, first subspaces), then timed
ones, each between two waits for the device, and three times as many in a row, as a run makes them (`in_a_row_`, the
median of the three). One that fails, out of memory for example, is a row with its error, and the others go on. Rows go
to `benchmarks/results/compare.csv`, a table is printed last. Peaks are in GB (10^9 bytes); those whose names begin with
`run_` count the warm-up too, and with it the peers' SVDs and what CUDA graphs write to inside, which PyTorch counts
only while they are captured. Ratios, of memory of the `run_` peaks, are to `adamw_compiled` of the same model in the
same invocation. `compiled` says whether torch.compile compiled anything. Where `svd_excluded` is true, all SVDs fall
into the warm-up; ours refreshes its subspaces during the timed updates as in a run.

With `--together N` so many processes are prepared at once, which on a machine with many cores saves most of the time of
such a comparison; for its timed updates each has the device to itself. All of them have to fit into memory, and the
seconds of a warm-up include waiting for others.

The name of any method may end in `_checkpointing`: each decoder layer is then recomputed in the backward pass, or with
`_checkpointing2` every second one. The peers' packages and what is adapted in them: `compare_peers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from benchmarks.compare_methods import CHECKPOINTING, METHODS, Setting, setting_of, split_method, training_parser
from benchmarks.models import LENGTH, config_path
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.throughput import memory_metrics

Row = dict[str, object]

BASELINE = "adamw_compiled"
DEFAULT_METHODS = "adamw_compiled,adamw,adam8bit_bitsandbytes,galore_torch,apollo_torch,q_galore_torch,q_galore"
COLUMNS = (
    *("model", "method", "tokens_per_second", "speed_ratio", "peak_gb", "memory_ratio", "reserved_gb"),
    *("run_peak_gb", "run_reserved_gb", "seconds_median", "seconds_mean", "warmup_seconds"),
    *("in_a_row_tokens_per_second", "in_a_row_speed_ratio"),
    *("micro_batch", "grad_accum", "length", "rank", "warmup_updates", "updates", "compiled", "svd_excluded"),
    *("first_loss", "last_loss", "cap_gib", "flags", "libraries", "device", "torch", "commit", "note", "error"),
)
RATIOS = {
    "speed_ratio": "tokens_per_second",
    "in_a_row_speed_ratio": "in_a_row_tokens_per_second",
    "memory_ratio": "run_peak_gb",
}
"""Columns of ratios to the baseline, each with the column that is compared."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all was measured, failures included, and 2 for a UserError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        models, methods = check_names(args)
        if args.one:
            print(json.dumps(measure(args.one, models[0], args)))
            return 0
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        turn = ["--turn", args.turn or f"{folder}/turn"]

        def measure_one(method: str, model: str) -> Row:
            return in_own_process(method, model, [*argv, *turn], args.timeout)

        print(table(compare(models, methods, Path(args.results), measure_one, args.together)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = training_parser("compare", __doc__.splitlines()[0], "60m,130m,350m,1b", "compare.csv")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help=f"of {', '.join(METHODS)}, or with {CHECKPOINTING}")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-batches an update; ours sums them in INT8")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--warmup", type=int, default=20, help="updates before the timed ones")
    parser.add_argument("--updates", type=int, default=10, help="timed updates")
    parser.add_argument("--no_compile", action="store_true", help="compile nothing")
    parser.add_argument("--cap_gib", type=float, help="device memory in GiB that a process may take")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and token ids")
    add_process_flags(parser, timeout=900.0)
    return parser


def add_process_flags(parser: argparse.ArgumentParser, timeout: float) -> None:
    """Add the flags of a program whose measurements are processes of their own; timeout: the default, in seconds."""
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds that a measurement may take")
    parser.add_argument("--together", type=int, default=1, help="measurements that get ready at the same time")
    parser.add_argument("--turn", help="lock file: who holds it times updates (default: one for each invocation)")
    parser.add_argument("--one", metavar="METHOD", help="measure this in this process and print its row as JSON")


def check_names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The models and methods of the flags; raises UserError for an unknown name."""
    models, methods = args.models.split(","), ([args.one] if args.one else args.methods.split(","))
    for model in models:
        if not config_path(model).is_file():
            known = sorted(path.stem.removeprefix("llama_") for path in (ROOT / "configs").glob("llama_*.json"))
            raise UserError(f"--models {model}: there is no such config; there are {', '.join(known)}")
    for method in methods:
        if split_method(method)[0] not in METHODS:
            flag, names = "--one" if args.one else "--methods", ", ".join(METHODS)
            raise UserError(f"{flag} {method}: there is no such method; there are {names}, each also {CHECKPOINTING}")
    if args.together < 1:
        raise UserError(f"--together {args.together}: give a number of processes, at least 1")
    if args.one and len(models) > 1:
        raise UserError(f"--models {args.models}: with --one give a single model")
    return models, methods


# ---- all measurements


def compare(
    models: Sequence[str],
    methods: Sequence[str],
    results: Path,
    measure_one: Callable[[str, str], Row],
    together: int = 1,
    baseline: str = BASELINE,
    columns: Mapping[str, str] = RATIOS,
) -> list[Row]:
    """Measure every method on every model, append a row for each to `results` at once, and return the rows.

    baseline: the method that `columns`, like `RATIOS`, compare with.
    """
    rows = []
    # What the others are compared with comes first; otherwise in the order asked for.
    names = [(method, model) for model in models for method in sorted(methods, key=lambda name: name != baseline)]
    baselines: dict[str, Row] = {}
    with ThreadPoolExecutor(together) as threads:
        for (method, model), row in zip(names, threads.map(lambda name: measure_one(*name), names), strict=True):
            if method == baseline:
                baselines[model] = row
            row |= ratios(row, baselines.get(model, {}), columns)
            append_row(results, row)
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
            rows.append(row)
    return rows


def ratios(row: Row, baseline: Row, columns: Mapping[str, str] = RATIOS) -> Row:
    """The ratios of `columns` as multiples of the baseline's; without one where either is unknown."""
    return {
        name: round(row[column] / baseline[column], 3)  # type: ignore[operator]
        for name, column in columns.items()
        if row.get(column) and baseline.get(column)
    }


def in_own_process(
    method: str,
    model: str,
    argv: Sequence[str],
    timeout: float,
    program: str = "compare",
    columns: Sequence[str] = COLUMNS,
) -> Row:
    """Measure in a process of its own; returns the row, with the text of a failure in `error`.

    program: a module of `benchmarks` that has the flags --models and --one, with the columns of its rows.
    """
    command = [sys.executable, "-m", f"benchmarks.{program}", *argv, "--models", model, "--one", method]
    row: Row = dict.fromkeys(columns, "") | {"model": model, "method": method, "commit": commit()}
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ  # as a run has it
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"took longer than --timeout {timeout:g} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        row |= json.loads(lines[-1])
    else:
        row["error"] = f"exit code {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:300]}"
    if row["error"]:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    head = ["model", "micro-batch", "method", "compiled", "tokens/s", "x AdamW", "in a row", "x AdamW"]
    head += ["peak GB", "x AdamW", "reserved GB", "warm-up s"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        batch = f"{row['grad_accum']} x {row['micro_batch']}" if row["grad_accum"] != 1 else row["micro_batch"]
        cells = [row["model"], batch, row["method"], {True: "yes", False: "no"}.get(row["compiled"], "")]
        if row["error"]:
            cells += [str(row["error"]).replace("|", "/")[:120]]
        else:
            cells += [f"{row['tokens_per_second']:,}", row["speed_ratio"]]
            cells += [f"{row['in_a_row_tokens_per_second']:,}", row["in_a_row_speed_ratio"]]
            cells += [row["run_peak_gb"], row["memory_ratio"], row["run_reserved_gb"], row["warmup_seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |" + " |" * (len(head) - len(cells)))
    return "\n".join(lines)


# ---- one measurement


def measure(method: str, model: str, args: argparse.Namespace) -> Row:
    """Measure one row in this process, without its ratios; an exception becomes its `error`."""
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", 0) if use_cuda else torch.device("cpu")
    setting = replace(
        setting_of(model, method, args, device),
        grad_accum=args.grad_accum,
        compile=not args.no_compile,
        seed=args.seed,
        length=args.length,
        config=with_positions(config_path(model), args.length),
    )
    row: Row = dict.fromkeys(COLUMNS, "") | {
        "model": model,
        "method": method,
        "micro_batch": setting.micro_batch,
        "grad_accum": setting.grad_accum,
        "length": setting.length,
        "rank": setting.rank,
        "warmup_updates": args.warmup,
        "updates": args.updates,
        "cap_gib": args.cap_gib or "",
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }
    try:
        return row | timed(method, setting, args)
    except Exception as error:  # whatever another project's code raises
        traceback.print_exc()
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def with_positions(config: Path, length: int) -> Path:
    """A configuration, or a copy of it in the folder for temporary files, with positions for sequences of `length`."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    if raw.get("max_position_embeddings", length) >= length:
        return config
    longer = Path(tempfile.gettempdir()) / f"{config.stem}_{length}.json"
    longer.write_text(json.dumps(raw | {"max_position_embeddings": length}), encoding="utf-8")
    return longer


def timed(method: str, setting: Setting, args: argparse.Namespace) -> Row:
    """Train, and return what was measured."""
    device = setting.device
    if device.type == "cuda" and args.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total), device)
    training = METHODS[split_method(method)[0]](setting)

    def update() -> torch.Tensor:
        with turn(args.turn, alone=False):
            loss = training.update()
            wait_for(device)
            return loss

    warmup_seconds, losses = time_updates(update, args.warmup, device)
    before = memory_metrics(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with turn(args.turn, alone=True):
        seconds, more_losses = time_updates(training.update, args.updates, device)
        in_a_row = statistics.median(seconds_in_a_row(training.update, args.updates, device) for _ in range(3))
    after = memory_metrics(device)
    losses += more_losses
    tokens = setting.grad_accum * setting.micro_batch * setting.length
    peaks = {}
    for column, key in (("peak_gb", "memory/peak_gb"), ("reserved_gb", "memory/reserved_gb")):
        if key in after:
            peaks |= {column: round(after[key], 3), f"run_{column}": round(max(before[key], after[key]), 3)}
    return peaks | {
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "in_a_row_tokens_per_second": round(tokens / in_a_row),
        "seconds_median": round(statistics.median(seconds), 5),
        "seconds_mean": round(statistics.mean(seconds), 5),
        "warmup_seconds": round(sum(warmup_seconds), 2),
        "compiled": counters["stats"]["unique_graphs"] > 0,
        "svd_excluded": training.svd_excluded,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "flags": training.flags,
        "libraries": training.libraries,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }


@contextlib.contextmanager
def turn(path: str | None, alone: bool) -> Iterator[None]:
    """Hold a readers-writer lock on this file: exclusive with `alone`, else shared.

    A second lock (the door) keeps new shared holders out while one waits for the exclusive lock.
    """
    if path is None:
        yield
        return
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with Path(f"{path}.door").open("w") as door, Path(path).open("w") as room:
        fcntl.flock(door, kind)
        fcntl.flock(room, kind)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:  # closing is not enough where a child process has the files, too
            fcntl.flock(room, fcntl.LOCK_UN)
            fcntl.flock(door, fcntl.LOCK_UN)


def time_updates(
    update: Callable[[], torch.Tensor], count: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """The seconds and the loss of each of `count` updates."""
    seconds, losses = [], []
    for _ in range(count):
        wait_for(device)
        start = time.perf_counter()
        losses.append(update())
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return seconds, [float(loss) for loss in losses]


def seconds_in_a_row(update: Callable[[], torch.Tensor], count: int, device: torch.device) -> float:
    """The seconds per update of `count` updates without waiting for the device in between, as in a run."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        update()
    wait_for(device)
    return (time.perf_counter() - start) / count


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
