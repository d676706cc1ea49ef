"""Compare planned and measured memory: the plan of `--dry_run` for each cell, and the peak of the same run on a GPU.

    python -m benchmarks.bench_memory --models 60m,7b
    python -m benchmarks.bench_memory --models 7b --cap_gib 16

A cell is a model with micro-batch, rank, checkpointing and micro-batches an update. Each runs by itself in a process of
`benchmarks/compare.py`: updates to warm up, in which all subspaces have their first refresh, then a few more. A row
holds the planned bytes by component, the planned peak and what PyTorch's allocator measured: the peak of the later
updates, that of the whole process (`run_`), and what was reserved. `ratio` is the measured peak of the process over the
planned one: memory inside CUDA graphs is measured only while they are captured. Rows go to
`benchmarks/results/memory.csv`, a table is printed last. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.compare import Row, in_own_process
from benchmarks.compare_methods import CHECKPOINTING, Setting, q_galore_flags
from benchmarks.models import MICRO_BATCHES, RANKS, config, config_path
from benchmarks.rows import ROOT, append_row
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import MemoryPlan, plan

WARMUP, UPDATES = 35, 3  # 7B has its first refreshes in 32 updates


@dataclass(frozen=True)
class Cell:
    """A command to plan and to measure."""

    model: str
    micro_batch: int
    checkpointing: bool = False
    grad_accum: int = 1

    @property
    def rank(self) -> int:
        """The rank of the subspaces."""
        return RANKS[self.model]


CELLS = (
    *(Cell(model, MICRO_BATCHES[model]) for model in ("60m", "130m", "350m", "1b")),
    *(Cell(model, MICRO_BATCHES[model], checkpointing=True) for model in ("60m", "1b", "7b")),
    Cell("60m", 64, grad_accum=4),
    Cell("7b", 4),
    Cell("7b", MICRO_BATCHES["7b"], checkpointing=True, grad_accum=3),
)
COMPONENTS = (
    *("decoder weights", "embeddings, head, norms", "projections", "optimizer states, decoder"),
    *("optimizer states, embeddings, head, norms", "gradients", "for refreshes of subspaces (at most)"),
    *("workspaces of cuBLAS", "memory of CUDA graphs", "of these, activations"),
)
COLUMNS = (
    *("model", "micro_batch", "grad_accum", "rank", "checkpointing", "planned_peak_gb", "peak_gb", "ratio"),
    *("reserved_gb", "run_peak_gb", "run_reserved_gb", "phase", "phase_bytes", *COMPONENTS),
    *("cap_gib", "flags", "device", "torch", "commit", "note", "error"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all was measured, failures included, and 2 for a UserError."""
    args = build_parser().parse_args(argv)
    models = args.models.split(",")
    unknown = sorted(set(models) - {cell.model for cell in CELLS})
    if unknown:
        known = ", ".join(dict.fromkeys(cell.model for cell in CELLS))
        print(
            f"bench_memory: --models {','.join(unknown)}: there are no cells for it; there are {known}", file=sys.stderr
        )
        return 2
    if not torch.cuda.is_available():
        print("bench_memory: it measures the memory of a CUDA GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    cells = [cell for cell in CELLS if cell.model in models]
    rows = bench(cells, Path(args.results), lambda cell: measure(cell, args), args.extra)
    print(table(rows))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(prog="bench_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="60m,130m,350m,1b,7b", help="models of the cells, separated by commas")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/memory.csv"), help="CSV to append to")
    parser.add_argument("--cap_gib", type=float, help="device memory in GiB that a process may take")
    parser.add_argument("--extra", default="", help="more flags of run_pretrain.py, in one string")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a cell may take")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    return parser


def bench(cells: Sequence[Cell], results: Path, measure_one: Callable[[Cell], Row], extra: str = "") -> list[Row]:
    """Plan and measure every cell, append a row for each to `results` at once, and return the rows."""
    rows = []
    for cell in cells:
        row = row_of(cell, planned(cell, extra), measure_one(cell))
        append_row(results, row)
        print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
        rows.append(row)
    return rows


# ---- the plan


def planned(cell: Cell, extra: str = "") -> MemoryPlan:
    """The plan of the command of a cell with the flags `extra`."""
    return plan(parse_args(q_galore_flags(setting_of(cell, extra))), config(cell.model))


def setting_of(cell: Cell, extra: str) -> Setting:
    """The `Setting` of a cell for `compare.py`."""
    return Setting(
        config=config_path(cell.model),
        rank=cell.rank,
        micro_batch=cell.micro_batch,
        grad_accum=cell.grad_accum,
        checkpoint_every=int(cell.checkpointing),
        compile=True,
        extra=extra,
        seed=0,
        device=torch.device("cuda", 0),
    )


# ---- the measurement


def measure(cell: Cell, args: argparse.Namespace) -> Row:
    """Measure a cell with `compare.py` in a process of its own; returns its row."""
    return in_own_process(method_of(cell), cell.model, compare_argv(cell, args), args.timeout)


def method_of(cell: Cell) -> str:
    """The name of the cell's method in `compare.py`."""
    return "q_galore" + (CHECKPOINTING if cell.checkpointing else "")


def compare_argv(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The flags of `compare.py` for the cell, without model and method."""
    argv = ["--device", "cuda", "--batch_size", str(cell.micro_batch), "--grad_accum", str(cell.grad_accum)]
    argv += ["--warmup", str(WARMUP), "--updates", str(UPDATES), f"--extra=--rank {cell.rank} {args.extra}"]
    argv += ["--note", args.note]
    return argv + (["--cap_gib", str(args.cap_gib)] if args.cap_gib else [])


# ---- rows and table


def row_of(cell: Cell, memory: MemoryPlan, measured: Mapping[str, object]) -> Row:
    """The row of a cell for the results."""
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {name: measured[name] for name in COLUMNS if name in measured}
    row |= {"model": cell.model, "micro_batch": cell.micro_batch, "grad_accum": cell.grad_accum, "rank": cell.rank}
    row |= {"checkpointing": cell.checkpointing, "planned_peak_gb": round(memory.peak_bytes / 1e9, 3)}
    components = memory.lasting | memory.overhead | {"of these, activations": memory.activations}
    row |= {name: components.get(name, 0) for name in COMPONENTS}
    row["phase"] = max(memory.passing, key=lambda name: memory.passing[name])
    row["phase_bytes"] = memory.passing[str(row["phase"])]
    # With the warm-up, in which graphs are captured: what they write to inside counts only then.
    peak = measured.get("run_peak_gb")
    if isinstance(peak, int | float):
        row["ratio"] = round(peak / (memory.peak_bytes / 1e9), 3)
    return row


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    head = ["model", "rank", "micro-batch", "checkpointing", "planned GB", "measured GB", "measured / planned"]
    head += ["reserved GB", "without warm-up GB", "phase of the planned peak"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        batch = f"{row['grad_accum']} x {row['micro_batch']}" if row["grad_accum"] != 1 else row["micro_batch"]
        cells = [row["model"], row["rank"], batch, "yes" if row["checkpointing"] else "no", row["planned_peak_gb"]]
        if row["error"]:
            cells += [str(row["error"]).replace("|", "/")[:120], *[""] * 4]
        else:
            cells += [row["run_peak_gb"], row["ratio"], row["run_reserved_gb"], row["peak_gb"]]
            cells += [row["phase"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
