"""Compare speed and memory of training in two checkouts, before and after a change.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.before_after --before /tmp/before --models 60m,1b,7b

Runs `benchmarks.compare --one` in each checkout in turn, before, after, after, before, ..., `--runs` times each, every
run a process of its own. With `--together N` so many are prepared at once; a lock gives each the device to itself for
its timed updates. Every run is a row of `benchmarks/results/before_after.csv`; a table of medians and
their ratios is printed last. `warmup_seconds` has the compilation and the capture of CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.rows import ROOT, append_row

Row = dict[str, object]

COLUMNS = (
    *("model", "method", "tree", "run", "tokens_per_second", "in_a_row_tokens_per_second", "peak_gb", "run_peak_gb"),
    *("run_reserved_gb", "warmup_seconds", "last_loss", "updates", "device", "torch", "commit", "note", "error"),
)
COMPARED = ("tokens_per_second", "in_a_row_tokens_per_second", "run_peak_gb", "warmup_seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all runs succeeded, 1 if one failed."""
    args = build_parser().parse_args(argv)
    trees = {"before": Path(args.before).resolve(), "after": ROOT}
    commits = {"before": args.before_commit, "after": args.after_commit}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.together) as threads:

        def measure(job: tuple[str, int, str]) -> Row:
            model, run, tree = job
            row = measure_one(trees[tree], model, Path(folder) / "turn", args)
            row |= {"model": model, "method": args.method, "tree": tree, "run": run, "note": args.note}
            return {name: row.get(name, "") for name in COLUMNS} | {"commit": commits[tree] or row.get("commit", "")}

        for row in threads.map(measure, schedule(args.models.split(","), args.runs)):
            append_row(Path(args.results), row)
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
            rows.append(row)
    print(table(rows))
    return int(any(row["error"] for row in rows))


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(prog="before_after", description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="folder of the checkout to compare with")
    parser.add_argument("--models", default="60m,1b,7b", help="names of configs, separated by commas")
    parser.add_argument("--method", default="q_galore", help="of benchmarks.compare")
    parser.add_argument("--runs", type=int, default=5, help="runs of each checkout and model")
    parser.add_argument("--together", type=int, default=1, help="runs that get ready at the same time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a run may take")
    parser.add_argument("--compare", default="", help="more flags of benchmarks.compare, in one string")
    parser.add_argument("--before_commit", default="", help="commit of a checkout without a repository")
    parser.add_argument("--after_commit", default="", help="the same of this one")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/before_after.csv"), help="CSV to append to")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    return parser


def schedule(models: Sequence[str], runs: int) -> list[tuple[str, int, str]]:
    """(model, run, tree) of each run in order; the order of the two trees alternates from run to run."""
    orders = (("before", "after"), ("after", "before"))
    return [(model, run, tree) for model in models for run in range(runs) for tree in orders[run % 2]]


def measure_one(tree: Path, model: str, turn: Path, args: argparse.Namespace) -> Row:
    """Measure one run in a checkout; returns its row, with the text of a failure in `error`."""
    command = [sys.executable, "-m", "benchmarks.compare", "--models", model, "--one", args.method]
    command += ["--turn", str(turn), *args.compare.split()]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ | {"PYTHONPATH": str(tree)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    try:
        done = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, timeout=args.timeout, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than --timeout {args.timeout:g} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        found: Row = json.loads(lines[-1])
        return found
    return {"error": f"exit code {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:300]}"}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of medians before and after, their ratio and the spread of the runs."""
    lines = ["| model | figure | before | after | after / before | spread before | spread after | runs |"]
    lines.append("|" + " --- |" * 8)
    for model in dict.fromkeys(row["model"] for row in rows):
        for name in COMPARED:
            found = {tree: values(rows, model, tree, name) for tree in ("before", "after")}
            if not all(found.values()):
                continue
            medians = {tree: statistics.median(values) for tree, values in found.items()}
            spreads = [f"{(max(values) - min(values)) / medians[tree]:.2%}" for tree, values in found.items()]
            ratio = medians["after"] / medians["before"]
            cells = [model, name, f"{medians['before']:,.6g}", f"{medians['after']:,.6g}", f"{ratio:.4f}", *spreads]
            lines.append("| " + " | ".join(map(str, [*cells, len(found["after"])])) + " |")
    return "\n".join(lines)


def values(rows: Sequence[Row], model: object, tree: str, name: str) -> list[float]:
    """The values of a column in all runs of a model in one checkout that have it."""
    chosen = [row for row in rows if row["model"] == model and row["tree"] == tree and not row["error"]]
    return [float(row[name]) for row in chosen if row[name] != ""]  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
