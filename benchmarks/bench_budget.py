"""Memory against speed: what `--memory_budget` chooses for budgets from the least to the most, planned and measured.

    python -m benchmarks.bench_budget --models 1b,7b                # on a GPU: each choice in a process of compare.py
    python -m benchmarks.bench_budget --models 1b,7b --plan_only    # without one: what is planned and counted
    python -m benchmarks.bench_budget --plot docs/budget.png        # the rows of the results as a picture

The micro-batch is that of `benchmarks/models.py` and an update has one of them, so that what is chosen is which layers
are computed again and what is kept in INT8. A row has the budget, the flags, the planned peak, the counted speed, and
beside them the peak of the process, which must be below the budget, and the tokens a second of updates in a row.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.compare import Row, in_own_process
from benchmarks.compare_methods import Setting, q_galore_flags
from benchmarks.models import MICRO_BATCHES, RANKS, config_path
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.memory.candidate import Candidate
from peft_pretraining.memory.candidates import Candidates
from peft_pretraining.memory.choice import choose
from peft_pretraining.speed.cards import Card, find_card
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS

WARMUP, UPDATES = 35, 10  # 7B has its first refreshes in 32 updates
MEASURED = ("run_peak_gb", "in_a_row_tokens_per_second", "device", "torch", "error")
COLUMNS = (
    *("model", "micro_batch", "rank", "budget_gb", "flags", "planned_peak_gb", "counted_tokens_per_second", "card"),
    *(*MEASURED, "commit", "note"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 2 where it cannot measure."""
    parser = argparse.ArgumentParser(prog="bench_budget", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="1b,7b", help="of benchmarks/models.py, by commas")
    parser.add_argument("--points", type=int, default=8, help="budgets from the least to the most")
    parser.add_argument("--gpu", default="h100", help="the card whose speed is counted")
    parser.add_argument("--plan_only", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/budget.csv", help="CSV")
    parser.add_argument("--plot", type=Path, help="draw the rows of --results as this picture, and stop")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a measurement may take")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    args = parser.parse_args(argv)
    if args.plot:
        draw(args.results, args.plot)
        return 0
    if not args.plan_only and not torch.cuda.is_available():
        print("bench_budget: there is no CUDA GPU here: give --plan_only for what is planned", file=sys.stderr)
        return 2
    measure = nothing if args.plan_only else measured_by(args.timeout)
    for model in args.models.split(","):
        for row in rows_of(model, find_card(args.gpu), args.points, measure):
            append_row(args.results, row | {"note": args.note})
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
    return 0


def choices(model: str, card: Card, points: int) -> list[tuple[int, Candidate]]:
    """Budgets in bytes, from the least that works to the most that is of use, with what each chooses if that is new."""
    setting = Setting(
        config=config_path(model), rank=RANKS[model], micro_batch=MICRO_BATCHES[model], grad_accum=1,
        checkpoint_every=0, compile=True, extra="", seed=0, device=torch.device("cuda", 0),
    )  # fmt: skip
    candidates = Candidates([*q_galore_flags(setting), "--memory_budget", "1TB"])
    least, most = candidates.smallest.needs, max(each.needs for each in candidates.steps[0])
    found: list[tuple[int, Candidate]] = []
    for number in range(points):
        budget = least + (most - least) * number // max(1, points - 1)
        chosen = choose(candidates, budget, card)
        if chosen and (not found or chosen is not found[-1][1]):
            found.append((budget, chosen))
    return found


def rows_of(model: str, card: Card, points: int, measure: Callable[[str, Candidate], Row]) -> list[Row]:
    """The rows of a model."""
    rows = []
    for budget, chosen in choices(model, card, points):
        row: Row = dict.fromkeys(COLUMNS, "")
        row |= {"model": model, "micro_batch": MICRO_BATCHES[model], "rank": RANKS[model], "card": card.name}
        row |= {"budget_gb": round(budget / 1e9, 3), "flags": " ".join(chosen.flags), "commit": commit()}
        row |= {"planned_peak_gb": round(chosen.peak / 1e9, 3)}
        row |= {"counted_tokens_per_second": round(chosen.tokens_per_second(card))}
        measured = measure(model, chosen)
        rows.append(row | {name: measured[name] for name in MEASURED if name in measured})
    return rows


def nothing(model: str, chosen: Candidate) -> Row:
    """Measure nothing."""
    return {}


def measured_by(timeout: float) -> Callable[[str, Candidate], Row]:
    """Measure each choice in a process of `compare.py`."""

    def measure(model: str, chosen: Candidate) -> Row:
        argv = ["--device", "cuda", "--batch_size", str(MICRO_BATCHES[model]), "--warmup", str(WARMUP)]
        argv += ["--updates", str(UPDATES), f"--extra=--rank {RANKS[model]} {' '.join(chosen.flags)}"]
        return in_own_process("q_galore", model, argv, timeout)

    return measure


def settings_of(model: str) -> tuple[int, int, int]:
    """Micro-batch, micro-batches an update and rank."""
    return MICRO_BATCHES[model], 1, RANKS[model]


def draw(results: Path, picture: Path) -> None:
    """A panel a model: tokens a second over the memory of the peak, counted as a line, measured as points.

    With those of `speed/measured_speeds.py`.
    """
    from matplotlib import pyplot

    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    size = (5 * len(models), 3.6)
    figure, axes = pyplot.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        ours = [row for row in rows if row["model"] == model]
        newest = {row["flags"]: row for row in ours}.values()
        planned = sorted((float(row["planned_peak_gb"]), float(row["counted_tokens_per_second"])) for row in newest)
        axis.plot(*zip(*planned, strict=True), "o-", label=f"planned, counted for {ours[-1]['card']}", markersize=4)
        names = ("run_peak_gb", "in_a_row_tokens_per_second")
        measured = [tuple(float(row[name]) for name in names) for row in ours if row[names[1]]]
        measured += [each[7:9][::-1] for each in MEASURED_SPEEDS if each[:5] == ("h100", model, *settings_of(model))]
        if measured:
            axis.plot(*zip(*measured, strict=True), "s", label="measured on an H100")
        axis.set_title(f"{model.upper()}, micro-batch {ours[-1]['micro_batch']} x 256, rank {ours[-1]['rank']}")
        axis.set_xlabel("peak of memory, GB")
        axis.set_ylabel("tokens/s")
        axis.legend(fontsize=7)
    figure.savefig(picture, bbox_inches="tight", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
