"""The runs behind a table of `benchmarks/tables.py`: which they are, their command lines, rows and counted hours."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import run_pretrain
from benchmarks.models import LENGTH, MICRO_BATCHES, config_path
from benchmarks.rows import commit
from benchmarks.table_methods import FACTORS, Budget, flags_of, recipe_of
from benchmarks.training_runs import STOPPED, Answer, measurements
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.build import matrix_shapes, network_on_meta
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS, Card
from peft_pretraining.speed.run_speed import counted_tokens_per_second
from qgalore.subspace.schedule import first_refresh_spread

Row = dict[str, str]
Key = tuple[str, ...]

KEY = ("model", "method", "flags", "updates", "sequences", "seed", "data")
"""Columns by which a run is known: where they are equal, a run is not made again."""
COLUMNS = (
    *KEY,
    *("rates", "micro_batch", "ranks", "perplexity", "perplexity_official", "eval_tokens", "weights_and_states_gb"),
    *("planned_peak_gb", "peak_gb", "reserved_gb", "tokens_per_second_median", "tokens_per_second_steady"),
    *("train_hours", "refreshes", "device", "torch", "commit", "note", "error"),
)
SPEED_UPDATES = 40
"""The last ones of a run, over which `tokens_per_second_steady` is. Runs of memory and throughput, each an update a
micro-batch, have before them those that find all subspaces for the first time, seven at most in each: an SVD takes
longer than the rest of an update of 7B."""
TUNING_TOKENS = "tokens:52428800"
"""800 updates of 256 sequences, as in the study of `docs/quality.md`."""
SAVE_SECONDS = 600
"""About the time between two checkpoints; a run that a signal stops is saved, too."""


class Job(NamedTuple):
    """A run to train."""

    model: str
    method: str
    flags: list[str]
    """Of the method, with its learning rates and what the user adds."""
    updates: int
    sequences: int
    """Of an update."""
    seed: int
    data: str
    """Name of the data set."""
    rates: float
    """The factor of the method's learning rates."""
    micro_batch: int
    """Of a rank."""
    ranks: int
    """GPUs that train it together."""
    argv: list[str]
    """The command line of `run_pretrain.py`."""
    folder: str

    @property
    def key(self) -> Key:
        """The values of `KEY` as they stand in a results file."""
        values = self._asdict() | {"flags": " ".join(self.flags)}
        return tuple(str(values[name]) for name in KEY)

    def columns(self) -> dict[str, object]:
        """What is known of its row beforehand."""
        named = dict(zip(KEY, self.key, strict=True))
        own = {"rates": f"{self.rates:g}", "micro_batch": self.micro_batch, "ranks": self.ranks, "commit": commit()}
        return named | own

    def run_args(self) -> RunArgs:
        """The arguments of the run; raises UserError for what `run_pretrain.py` would refuse."""
        return parse_args(self.argv, self.ranks)


@dataclass(frozen=True)
class Study:
    """What a command line asks for: the runs of a table."""

    table: str
    models: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    budget: Budget
    sequences: int
    tuned: bool
    tune_budget: Budget
    tune_is_capped: bool
    """Whether `tune_budget` is at most `TUNING_TOKENS`."""
    tune_model: str
    dataset: str
    batch_size: int | None
    """Of a rank; None: by model."""
    ranks: int
    device: str
    folder: Path
    extra: tuple[str, ...]
    """More flags of run_pretrain.py."""

    @property
    def length(self) -> int:
        """Tokens of a sequence: the papers' 256, unless other flags say otherwise."""
        return int(dict(itertools.pairwise(self.extra)).get("--max_length", LENGTH))

    @property
    def is_of_speed(self) -> bool:
        """Whether its runs measure memory and speed alone."""
        return self.table in ("memory", "throughput")

    @property
    def is_the_papers(self) -> bool:
        """Whether its runs have the papers' length and data."""
        return self.budget.text == "paper" and self.dataset in ("c4", "allenai/c4") and not self.is_of_speed

    def jobs(self, rows: Mapping[Key, Row]) -> list[Job]:
        """All runs, each once: those that choose learning rates, and of the others those for which they have chosen."""
        found = [*(self.trials() if self.tuned else []), *(job for jobs in self.chosen(rows).values() for job in jobs)]
        return list({job.key: job for job in found}.values())

    def trials(self) -> list[Job]:
        """The runs that choose the learning rates of each method."""
        methods = ["q_galore"] if self.table == "ablation" else self.methods
        return [self._trial(method, factor) for method in methods for factor in FACTORS]

    def chosen(self, rows: Mapping[Key, Row]) -> dict[tuple[str, str], list[Job]]:
        """The runs whose figures stand in the table, a seed each, by (model, method)."""
        found = {}
        for model in self.models:
            for method in self.methods:
                factor = self.factor(method, rows)
                if factor is not None:
                    seeds = self.seeds[:1] if self.is_of_speed else self.seeds
                    found[model, method] = [self.job(model, method, seed, factor) for seed in seeds]
        return found

    def factor(self, method: str, rows: Mapping[Key, Row]) -> float | None:
        """The multiple of a method's learning rates: 1, or the best of the trials; None as long as one has no row."""
        if not self.tuned or self.is_of_speed:
            return 1.0
        trials = [self._trial("q_galore" if self.table == "ablation" else method, each) for each in FACTORS]
        if any(job.key not in rows for job in trials):
            return None
        return min(trials, key=lambda job: perplexity_of(rows[job.key])).rates

    def _trial(self, method: str, factor: float) -> Job:
        updates = self.tune_budget.updates(self.tune_model, self.sequences)
        if self.tune_is_capped:
            updates = min(updates, Budget(TUNING_TOKENS).updates(self.tune_model, self.sequences))
        return self.job(self.tune_model, method, self.seeds[0], factor, updates)

    def job(self, model: str, method: str, seed: int, factor: float = 1.0, updates: int = 0) -> Job:
        """A run; updates: its length, by default the study's."""
        recipe = recipe_of(model)
        micro_batch = MICRO_BATCHES.get(model, 16) if self.batch_size is None else self.batch_size
        sequences = self.ranks * micro_batch if self.is_of_speed else self.sequences
        micro_batch = max(1, min(micro_batch, sequences // self.ranks))
        updates = updates or (speed_updates(model) if self.is_of_speed else self.budget.updates(model, sequences))
        flags = [*flags_of(method, recipe, updates, factor), *self.extra]
        known = (model, method, flags, updates, sequences, seed, Path(self.dataset).name)
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:10]
        folder = str(self.folder / f"{model}-{method}-{digest}")
        argv = ["--model_config", str(config_path(model)), "--dataset", self.dataset, "--max_length", str(LENGTH)]
        argv += ["--batch_size", str(micro_batch), "--total_batch_size", str(sequences), "--seed", str(seed)]
        argv += ["--num_training_steps", str(updates), "--warmup_steps", str(updates // 10), "--device", self.device]
        argv += ["--wandb_mode", "off", "--save_dir", folder, "--continue_from", "auto"]
        argv += ["--activation_checkpointing"] if recipe.large else []
        argv += ["--eval_tokens", "100K", "--no-save_last"] if self.is_of_speed else []
        return Job(*known, factor, micro_batch, self.ranks, [*argv, *flags], folder)


def speed_updates(model: str) -> int:
    """The updates of a run of memory and throughput, the same for all methods of a model."""
    return (
        first_refresh_spread(
            len(matrix_shapes(network_on_meta(read_config(config_path(model))))), recipe_of(model).interval
        )
        + SPEED_UPDATES
    )


def perplexity_of(row: Mapping[str, str]) -> float:
    """The perplexity of a row, infinity for a run that failed or came to no number."""
    value = float(row["perplexity"]) if row["perplexity"] else math.inf
    return math.inf if math.isnan(value) else value


# ---- in a worker


def measure(job: Job) -> Answer:
    """Train a run, or go on with it, and return the columns that it measured; raises SystemExit if it was refused."""
    argv = [*job.argv, "--save_every", str(save_every(job))]
    if (run_pretrain.main(argv) if job.ranks == 1 else by_torchrun(argv, job.ranks)) != 0:
        raise SystemExit
    lines = [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]
    if not lines or lines[-1]["update_step"] < job.updates or "eval/perplexity" not in lines[-1]:
        return {STOPPED: f"after {lines[-1]['update_step'] if lines else 0} updates"}
    reported = recipe_of(job.model).reported_at
    evaluations = [line for line in lines if line["update_step"] == reported and "eval/perplexity" in line]
    times = {"train_hours": round(train_seconds(lines) / 3600, 6), "tokens_per_second_steady": steady_speed(job, lines)}
    return measurements([*lines, *evaluations[-1:]]) | planned(job) | times


def planned(job: Job) -> Answer:
    """The columns of the plan, also of a run that failed; none where its flags are refused."""
    try:
        run = job.run_args()
    except UserError:
        return {}
    memory = plan(run, read_config(run.model.model_config))
    size, peak = memory.weights_and_states_bytes / 1e9, memory.peak_bytes / 1e9
    return {"weights_and_states_gb": round(size, 4), "planned_peak_gb": round(peak, 3)}


def by_torchrun(argv: Sequence[str], ranks: int) -> int:
    """Train on several ranks, processes of their own, and print what they print; returns the exit code.

    A SIGTERM is theirs: the run saves its state.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(run_pretrain.__file__), *argv], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    print(process.communicate()[0])
    return process.returncode


def save_every(job: Job) -> int:
    """Updates between two checkpoints, by the time that an H100 would take; 0 if none is due before the run's end.

    0 for a run of memory and throughput, too, which is short, and whose weights nobody reads.
    """
    try:
        run = job.run_args()
    except UserError:  # which the run will report
        return 0
    if not run.checkpoint.save_last:
        return 0
    speed = counted_tokens_per_second(run, read_config(run.model.model_config), CARDS["h100"])
    updates = max(1, int(SAVE_SECONDS * speed / run.tokens_per_update))
    return updates if updates < job.updates else 0


def train_seconds(lines: Sequence[Mapping[str, float]], after: int = 0) -> float:
    """The time of the updates after so many, without evaluations, checkpoints, and what a stopped run had to repeat."""
    seconds, before = 0.0, float(after)
    for line in lines:
        if "time/update_seconds" in line and line["update_step"] > after:
            seconds += (line["update_step"] - before) * line["time/update_seconds"]
            before = line["update_step"]
    return seconds


def steady_speed(job: Job, lines: Sequence[Mapping[str, float]]) -> int:
    """Tokens a second over the last `SPEED_UPDATES` updates of a run, with the refreshes among them."""
    after = max(0, job.updates - SPEED_UPDATES)
    seconds = train_seconds(lines, after)
    return round((job.updates - after) * job.run_args().tokens_per_update / seconds) if seconds else 0


def reason(failure: str) -> str:
    """Why a run failed, in a line: what `run_pretrain.py` says of it, or else the exception."""
    lines = [line for line in failure.strip().splitlines() if line.strip()] or ["it gave no reason"]
    program = f"{run_pretrain.PROGRAM}: "
    said = [number for number, line in enumerate(lines) if line.startswith(program)]
    text = " ".join(lines[said[-1] :]).removeprefix(program) if said else lines[-1]
    return " ".join(text.split())


# ---- hours


def tokens_per_second(job: Job, rows: Mapping[Key, Row], card: Card) -> tuple[float, str]:
    """(tokens a second of a run on a card or 0, how that is known): as the newest row measured it, else counted."""
    found = [
        row
        for row in rows.values()
        if (row["model"], row["method"], row["device"]) == (job.model, job.method, card.device)
        and float(row["tokens_per_second_median"] or 0) > 0
    ]
    if found and card.device:
        return float(found[-1]["tokens_per_second_median"]), "measured"
    try:
        run = job.run_args()
    except UserError:  # which the run will report
        return 0.0, "unknown"
    return counted_tokens_per_second(run, read_config(run.model.model_config), card), "counted"


def hours_in_words(study: Study, jobs: Sequence[Job], todo: Sequence[Job], rows: Mapping[Key, Row], card: Card) -> str:
    """The runs `todo` of a study with their hours, a line each; counted ones without SVDs and evaluations."""
    lines = [f"| model | method | rates | seed | updates | tokens | tokens/s on {card.name} | | hours |"]
    lines.append("| " + " | ".join(["---"] * 9) + " |")
    if study.tuned and not study.is_of_speed:
        # What the trials choose is not known yet; any factor takes as long.
        assumed = dataclasses.replace(study, tuned=False)
        open_methods = {method for method in study.methods if study.factor(method, rows) is None}
        later = [job for (_, method), found in assumed.chosen(rows).items() if method in open_methods for job in found]
        known = {job.key for job in jobs}
        todo = [*todo, *(job for job in later if job.key not in known)]
    total = 0.0
    for job in todo:
        tokens = job.updates * job.sequences * LENGTH
        speed, how = tokens_per_second(job, rows, card)
        hours = tokens / speed / 3600 if speed else 0.0
        total += hours
        cells = [job.model, job.method, f"x {job.rates:g}", job.seed, f"{job.updates:,}", f"{tokens / 1e6:,.4g}M"]
        cells += [f"{speed:,.0f}" if speed else "", how, f"{hours:.3g}" if speed else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    words = f"{len(todo)} runs are missing: {total:.3g} hours of one {card.name}"
    if any(tokens_per_second(job, rows, card)[1] != "measured" for job in todo):
        words += "; counted speeds are without SVDs, and evaluations, compiling and starting come on top"
    return "\n".join([*lines, "", words + "."])
