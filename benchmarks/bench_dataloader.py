"""Speed of the training loader: does it keep up with a GPU?

    python benchmarks/bench_dataloader.py --dataset DIR --tokenizer DIR [--packing pad pack] [--workers 1 2] [--seconds
    10]

Reads updates of 512 x 256 as a run does, after the first two, and appends a row for each setting to
results/dataloader.csv. Rows a second are documents with padding; tokens a second do not count padding, positions a
second do.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from peft_pretraining.data.sources.kind import TokenKind  # noqa: E402
from peft_pretraining.data.sources.registry import find_kind  # noqa: E402
from peft_pretraining.data.tokenizer import load_tokenizer  # noqa: E402
from peft_pretraining.data.train_loader import build_train_loader  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "dataloader.csv"
FIRST_UPDATES = 2


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="as in run_pretrain.py")
    parser.add_argument(
        "--label", default="", help="name of the source in the results (default: the last part of --dataset)"
    )
    parser.add_argument("--tokenizer", default="", help="as in run_pretrain.py")
    parser.add_argument("--packing", nargs="+", default=["pad", "pack"], choices=["pad", "pack"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="threads")
    parser.add_argument(
        "--data_lanes", type=int, default=64, help="with more lanes than shards a shard is read several times"
    )
    parser.add_argument("--max_length", type=int, default=256, help="tokens a row")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, each setting")
    args = parser.parse_args()
    rows = [measure(args, packing, workers) for packing in args.packing for workers in args.workers]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(args: argparse.Namespace, packing: str, workers: int) -> dict[str, str | int]:
    """One row of the results."""
    tokens_only = isinstance(find_kind(args.dataset), TokenKind)
    loader = build_train_loader(
        dataset=args.dataset,
        tokenizer=None if tokens_only else load_tokenizer(args.tokenizer, args.dataset),
        packing=packing,
        max_length=args.max_length,
        batch_size=512,
        grad_accum_steps=1,
        seed=0,
        data_lanes=args.data_lanes,
        workers=workers,
    )
    for _ in range(FIRST_UPDATES):
        loader.next_update()
    start = time.perf_counter()
    rows = tokens = 0
    while (elapsed := time.perf_counter() - start) < args.seconds:
        update = loader.next_update()
        rows += sum(len(micro_batch.input_ids) for micro_batch in update.micro_batches)
        tokens += update.tokens
    loader.close()
    row: dict[str, str | int] = {
        "source": args.label or Path(args.dataset).name,
        "packing": "token ids" if tokens_only else packing,
        "workers": workers,
        "data_lanes": args.data_lanes,
        "rows_per_second": round(rows / elapsed),
        "tokens_per_second": round(tokens / elapsed),
        "positions_per_second": round(rows * args.max_length / elapsed),
        "max_length": args.max_length,
        "cpu": f"{cpu_name()} ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f})",
        "python": platform.python_version(),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "numpy": importlib.metadata.version("numpy"),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
    }
    print(row, flush=True)
    return row


def cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout, or empty."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
