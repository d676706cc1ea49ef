"""Measure speed and memory of the training loader.

    python -m benchmarks.bench_dataloader --dataset DIR --tokenizer DIR [--packing pad pack] [--workers 1 2] [--seconds
    10] [--against CHECKOUT]
    python -m benchmarks.bench_dataloader --dataset synthetic --tokenizer DIR --packing pad --workers 2 --documents 1e6

Reads updates of 512 x 256 as a run does, after the first two, each setting in a process of its own, and appends a row
for each to results/dataloader.csv. Rows a second are documents with padding; tokens a second do not count padding,
positions a second do; on a shared machine tokens a second of processor time are the most reliable. `--against`
measures another checkout of the project, such as one of an older commit, in turn with this one. Memory is the resident
set after the first tenth and at the end; "synthetic" are endless short documents.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = Path(os.environ.get("BENCH_CHECKOUT", ROOT))
sys.path.insert(0, str(CHECKOUT))  # runs from a checkout, installed or not

from benchmarks.rows import append_row  # noqa: E402
from peft_pretraining.data.sources.kind import TokenKind  # noqa: E402
from peft_pretraining.data.sources.registry import find_kind  # noqa: E402
from peft_pretraining.data.tokenizer import load_tokenizer  # noqa: E402
from peft_pretraining.data.train_loader import build_train_loader  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "dataloader.csv"
SYNTHETIC = "synthetic"
FIRST_UPDATES = 2


class Synthetic:
    """Endless documents of 5 to 15 words in 64 shards, each generated from its index alone."""

    name, shards = SYNTHETIC, 64

    def __init__(self) -> None:
        letters = random.Random(0)
        self._words = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(2, 9))) for _ in range(5000)]

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str]:
        """See `Source.read`."""
        number = part + start * slices
        while True:
            choice = random.Random(number * self.shards + shard)
            yield " ".join(choice.choices(self._words, k=choice.randint(5, 15)))
            number += slices

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return SYNTHETIC


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="as in run_pretrain.py, or synthetic")
    parser.add_argument(
        "--label", default="", help="name of the source in the results (default: the last part of --dataset)"
    )
    parser.add_argument("--tokenizer", default="", help="as in run_pretrain.py")
    parser.add_argument("--packing", nargs="+", default=["pad", "pack"], choices=["pad", "pack"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="threads")
    parser.add_argument(
        "--data_lanes",
        type=int,
        default=64,
        help="logical shards; with more of them than files each file is read often",
    )
    parser.add_argument("--max_length", type=int, default=256, help="tokens a row")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, each setting")
    parser.add_argument("--documents", type=float, default=0.0, help="rows to read, instead of --seconds")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--dry", action="store_true", help="print the rows only")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.packing[0], args.workers[0])))
        return
    for packing in args.packing:
        for workers in args.workers:
            for checkout in [ROOT, *([args.against.resolve()] if args.against else [])]:
                row = measure_in_a_process(checkout, packing, workers)
                print(row, flush=True)
                if not args.dry:
                    append_row(RESULTS, row)


def measure_in_a_process(checkout: Path, packing: str, workers: int) -> dict[str, Any]:
    """Measure a setting with the code of a checkout, with the other arguments of this process; returns its row."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one"]
    command += ["--packing", packing, "--workers", str(workers)]
    environment = {**os.environ, "BENCH_CHECKOUT": str(checkout)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(args: argparse.Namespace, packing: str, workers: int) -> dict[str, Any]:
    """Measure one setting; returns its row."""
    synthetic = args.dataset == SYNTHETIC
    tokens_only = not synthetic and isinstance(find_kind(args.dataset), TokenKind)
    tokenizer = None if tokens_only else load_tokenizer(args.tokenizer, args.dataset)
    loader = build_train_loader(
        dataset=args.dataset,
        tokenizer=tokenizer,
        packing=packing,
        max_length=args.max_length,
        batch_size=512,
        grad_accum_steps=1,
        seed=0,
        data_lanes=args.data_lanes,
        workers=workers,
        source=Synthetic() if synthetic else None,
    )
    for _ in range(FIRST_UPDATES):
        loader.next_update()
    start, cpu_start = time.perf_counter(), time.process_time()
    rows = tokens = 0
    memory: list[float] = []
    while (done := rows / args.documents if args.documents else (time.perf_counter() - start) / args.seconds) < 1:
        update = loader.next_update()
        rows += sum(len(micro_batch.input_ids) for micro_batch in update.micro_batches)
        tokens += update.tokens
        if done >= 0.1 and not memory:
            memory.append(resident_mb())
    elapsed, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory.append(resident_mb())
    loader.close()
    return {
        "source": args.label or Path(args.dataset).name,
        "packing": "token ids" if tokens_only else packing,
        "encoder": "" if tokenizer is None else getattr(tokenizer, "encoder", "tokenizers"),
        "workers": workers,
        "data_lanes": args.data_lanes,
        "rows": rows,
        "rows_per_second": round(rows / elapsed),
        "tokens_per_second": round(tokens / elapsed),
        "tokens_per_cpu_second": round(tokens / cpu_seconds),
        "positions_per_second": round(rows * args.max_length / elapsed),
        "resident_mb_early": memory[0],
        "resident_mb_end": memory[-1],
        "max_length": args.max_length,
        "cpu": f"{cpu_name()} ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f})",
        "python": platform.python_version(),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "sentencepiece": importlib.metadata.version("sentencepiece"),
        "numpy": importlib.metadata.version("numpy"),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def resident_mb() -> float:
    """Resident memory of this process in MB; 0 if unknown."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0.0
    return round(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def cpu_name() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout that is measured, or ""."""
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
