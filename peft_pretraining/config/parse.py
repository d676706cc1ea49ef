"""Read the arguments of a run from the command line, check them and resolve them into plain values.

All problems of a command line are raised together as one `UserError`. Nothing heavy, such as torch, is imported for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from peft_pretraining.config.checks import find_problems, find_warnings, unused_by_full_rank
from peft_pretraining.config.dealt_ranks import (
    dealing_problems,
    dealt_in_words,
    rank_to_deal,
    with_dealt_ranks,
)
from peft_pretraining.config.flags import build_parser, parse_flags
from peft_pretraining.config.method_checks import unused_by_method
from peft_pretraining.config.model_source import fill_model_config
from peft_pretraining.config.named_method import (
    left_to_name,
    recorded_in_words,
    recorded_method,
    with_named_method,
)
from peft_pretraining.config.recipes import (
    length_in_words,
    recipe_in_words,
    why_recipe,
    with_length,
    with_recipe,
)
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.data.sources.registry import all_kinds_in_words, default_tokenizers_in_words
from peft_pretraining.errors import UserError

_DESCRIPTION = "Pretrain LLaMA with Q-GaLore, GaLore or a full-rank optimizer. Start it with torchrun or python."
_USAGE = "--model_config NAME_OR_PATH --batch_size SEQUENCES [flags]"


@lru_cache(maxsize=8)
def _parser(program: str, *_kinds_in_words: str) -> argparse.ArgumentParser:
    """Made once for the kinds of data that there are: `--memory_budget` reads many command lines."""
    return build_parser(GROUPS, _DESCRIPTION, f"{program} {_USAGE}")


def parse_args(argv: Sequence[str] | None = None, world_size: int = 1, program: str = "run_pretrain.py") -> RunArgs:
    """Read a command line (default: this program's) for a run of `world_size` ranks; the usage names `program`.

    Raises UserError that lists every problem; `--help` prints the flags and leaves the program.
    """
    parser = _parser(program, all_kinds_in_words(), default_tokenizers_in_words())
    command = tuple(sys.argv[1:] if argv is None else argv)
    parsed = parse_flags(parser, GROUPS, command)
    problems = [*parsed.problems, *fill_model_config(parsed.values)]
    recorded = recorded_method(parsed.values)
    of_recipe: dict[str, Any] = {name: recorded[name] for name in ("recipe", "newton_schulz") if name in recorded}
    given_or_recorded = {**of_recipe, **parsed.values}
    values, why = with_recipe(given_or_recorded), why_recipe(given_or_recorded)
    chosen, kept = with_named_method(values, recorded), recorded_in_words(with_recipe(parsed.values), recorded)
    dealt, groups = rank_to_deal(parsed.values), {}
    if dealt is not None:
        chosen["rank"] = dealt
    for name, group in GROUPS.items():
        fields = dataclasses.fields(group)
        own = {field.name: chosen[field.name] for field in fields if field.name in chosen}
        # A required flag that is missing or unreadable is in the list of problems already.
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        groups[name] = group(**{key: "" if key == "model_config" else 1 for key in required} | own)
    runtime = groups["runtime"]
    world_size = (runtime.dry_run and runtime.nproc) or world_size
    args = RunArgs(**groups, world_size=world_size, command=command, left_to_name=left_to_name(parsed.values))
    args = _resolve(args) if dealt is None else with_dealt_ranks(_resolve(args), dealt)
    updates = args.schedule.num_training_steps
    optimizer = with_length(args.optimizer, updates, args.tokens_per_update, parsed.values.keys())
    args = dataclasses.replace(args, optimizer=optimizer)
    unreadable = [re.compile(rf"--{name}\b") for name in parsed.unreadable - parsed.values.keys()]
    given = parsed.values.keys()
    found = [
        *find_problems(args),
        *unused_by_full_rank(args, given),
        *unused_by_method(args, given),
        *dealing_problems(args, parsed.values),
    ]
    problems += [text for text in found if not any(flag.search(text) for flag in unreadable)]
    if problems:
        reasons = "; ".join(filter(None, [kept, why]))
        raise UserError(_list_problems(problems) + (f" ({reasons})." if reasons else ""))
    of_length = length_in_words(args.optimizer, args.schedule, parsed.values.keys())
    notes = tuple(
        filter(None, [recipe_in_words(given_or_recorded), of_length, kept, dealt_in_words(args, parsed.values)])
    )
    return dataclasses.replace(args, warnings=tuple(find_warnings(args, parsed.values)), notes=notes)


def _resolve(args: RunArgs) -> RunArgs:
    """Compute the values that depend on other flags."""
    batch, subspace, schedule, evaluation = args.batch, args.subspace, args.schedule, args.evaluation
    model = args.model
    if model.compile == "auto" and args.method.method == "qlora":
        model = dataclasses.replace(model, compile="off")
    a_pass = batch.batch_size * args.world_size
    accumulation = batch.gradient_accumulation or max(1, batch.total_batch_size // a_pass)
    batch = dataclasses.replace(
        batch,
        gradient_accumulation=accumulation,
        total_batch_size=batch.total_batch_size or accumulation * a_pass,
    )
    if subspace.projects:
        subspace = dataclasses.replace(subspace, max_update_proj_gap=subspace.longest_interval)
    if schedule.max_train_tokens:
        updates = -(-schedule.max_train_tokens // (batch.total_batch_size * batch.max_length))
        schedule = dataclasses.replace(schedule, num_training_steps=updates)
    if not evaluation.eval_batch_size:
        evaluation = dataclasses.replace(evaluation, eval_batch_size=batch.batch_size)
    return dataclasses.replace(
        args, model=model, batch=batch, subspace=subspace, schedule=schedule, evaluation=evaluation
    )


def _list_problems(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"the command line has {len(problems)} problems:"]
    return "\n".join(lines + [f"  {number}. {text}" for number, text in enumerate(problems, 1)])
