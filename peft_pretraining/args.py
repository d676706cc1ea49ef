"""The arguments of a run: read from the command line, checked, and resolved into plain values.

`parse_args` is the only door. All problems of a command line are raised together as one `UserError`; nothing heavy is
imported before it has passed.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from peft_pretraining.arg_checks import find_problems, find_warnings
from peft_pretraining.arg_groups import (
    BatchArgs,
    CheckpointArgs,
    DataArgs,
    EvaluationArgs,
    LoggingArgs,
    ModelArgs,
    OptimizerArgs,
    QuantizationArgs,
    RuntimeArgs,
    ScheduleArgs,
    SubspaceArgs,
)
from peft_pretraining.cli import build_parser, parse_flags
from peft_pretraining.errors import UserError
from peft_pretraining.recipes import with_length, with_recipe

GROUPS: Mapping[str, type] = {
    "model": ModelArgs,
    "data": DataArgs,
    "batch": BatchArgs,
    "optimizer": OptimizerArgs,
    "quantization": QuantizationArgs,
    "subspace": SubspaceArgs,
    "schedule": ScheduleArgs,
    "evaluation": EvaluationArgs,
    "checkpoint": CheckpointArgs,
    "logging": LoggingArgs,
    "runtime": RuntimeArgs,
}
_DESCRIPTION = "Pretrain LLaMA with Q-GaLore, GaLore or a full-rank optimizer. Start it with torchrun or python."
_USAGE = "run_pretrain.py --model_config FILE --batch_size SEQUENCES [flags]"


@dataclass(frozen=True)
class RunArgs:
    """All arguments of a run, resolved: batch sizes, updates and intervals are the numbers that hold."""

    model: ModelArgs
    data: DataArgs
    batch: BatchArgs
    optimizer: OptimizerArgs
    quantization: QuantizationArgs
    subspace: SubspaceArgs
    schedule: ScheduleArgs
    evaluation: EvaluationArgs
    checkpoint: CheckpointArgs
    logging: LoggingArgs
    runtime: RuntimeArgs
    world_size: int = 1
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_update(self) -> int:
        """Positions in the total batch of one update, padding included."""
        return self.batch.total_batch_size * self.batch.max_length

    def save_dir(self, now: datetime) -> Path:
        """The run's folder: `--save_dir`, else that of the checkpoint it continues from, else a new one named by `now`.

        With several ranks, rank 0 decides and tells the others, since their clocks differ.
        """
        if self.checkpoint.save_dir:
            return Path(self.checkpoint.save_dir)
        if self.checkpoint.continue_from:
            source = Path(self.checkpoint.continue_from)
            return source.parent if source.name.startswith("step_") else source
        stem = Path(self.model.model_config).stem
        return Path("checkpoints") / f"{stem}-{self.optimizer.optimizer}-{now:%Y%m%d-%H%M%S}"

    def in_folder(self, save_dir: Path, continue_from: str | None = None) -> RunArgs:
        """These arguments with the run's folder made explicit, and another `--continue_from` where one is given."""
        source = self.checkpoint.continue_from if continue_from is None else continue_from
        checkpoint = dataclasses.replace(self.checkpoint, save_dir=str(save_dir), continue_from=source)
        return dataclasses.replace(self, checkpoint=checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """The resolved values by flag name."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}


def parse_args(argv: Sequence[str] | None = None, world_size: int = 1) -> RunArgs:
    """Read a command line (default: this program's) for a run of `world_size` ranks.

    Raises UserError that lists every problem; `--help` prints the flags and leaves the program.
    """
    parser = build_parser(GROUPS, _DESCRIPTION, _USAGE)
    parsed = parse_flags(parser, GROUPS, sys.argv[1:] if argv is None else argv)
    recipe = with_recipe(parsed.values)
    groups = {}
    for name, group in GROUPS.items():
        fields = dataclasses.fields(group)
        values = {field.name: recipe[field.name] for field in fields if field.name in recipe}
        # A required flag that is missing or unreadable is among the problems already.
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        groups[name] = group(**{key: "" if key == "model_config" else 1 for key in required} | values)
    args = _resolve(RunArgs(**groups, world_size=world_size))
    updates = args.schedule.num_training_steps
    optimizer = with_length(args.optimizer, updates, args.tokens_per_update, parsed.values.keys())
    args = dataclasses.replace(args, optimizer=optimizer)
    problems = list(parsed.problems)
    unreadable = [re.compile(rf"--{name}\b") for name in parsed.unreadable]
    problems += [text for text in find_problems(args) if not any(flag.search(text) for flag in unreadable)]
    if problems:
        raise UserError(_list_problems(problems))
    return dataclasses.replace(args, warnings=tuple(find_warnings(args, parsed.values)))


def _resolve(args: RunArgs) -> RunArgs:
    """Fill in what depends on other flags."""
    batch, subspace, schedule, evaluation = args.batch, args.subspace, args.schedule, args.evaluation
    a_pass = batch.batch_size * args.world_size
    accumulation = batch.gradient_accumulation or max(1, batch.total_batch_size // a_pass)
    batch = dataclasses.replace(
        batch,
        gradient_accumulation=accumulation,
        total_batch_size=batch.total_batch_size or accumulation * a_pass,
    )
    if not subspace.max_update_proj_gap:
        subspace = dataclasses.replace(subspace, max_update_proj_gap=8 * subspace.update_proj_gap)
    if schedule.max_train_tokens:
        updates = -(-schedule.max_train_tokens // (batch.total_batch_size * batch.max_length))
        schedule = dataclasses.replace(schedule, num_training_steps=updates)
    if not evaluation.eval_batch_size:
        evaluation = dataclasses.replace(evaluation, eval_batch_size=batch.batch_size)
    return dataclasses.replace(args, batch=batch, subspace=subspace, schedule=schedule, evaluation=evaluation)


def _list_problems(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"the command line has {len(problems)} problems:"]
    return "\n".join(lines + [f"  {number}. {text}" for number, text in enumerate(problems, 1)])
