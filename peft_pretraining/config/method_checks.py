"""Find what cannot work with `--method`: sentences that name the flag, say what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from peft_pretraining.config.flags import is_given

if TYPE_CHECKING:
    from peft_pretraining.config.run_config import RunArgs

OPTIMIZERS = ("adam", "adamw", "adam8bit", "sgd", "adafactor")
"""Those that train factors and adapters."""
_OF_METHOD = {
    "lora_alpha": ("lora", "relora", "qlora"),
    "lora_dropout": ("lora", "relora", "qlora"),
    "qlora_bits": ("qlora",),
    "relora_every": ("relora",),
    "relora_warmup": ("relora",),
    "relora_prune": ("relora",),
}
"""Flags with the methods for which they have a meaning."""


def unused_by_method(args: RunArgs, given: Collection[str]) -> list[str]:
    """List the flags of other methods among those `given` by name."""
    method = args.method.method
    return [
        f"--{name} {getattr(args.method, name):g} has no meaning with --method {method}: leave it out, or give "
        f"--method {' or '.join(methods)}"
        for name, methods in _OF_METHOD.items()
        if name in given and method not in methods
    ]


def method_problems(args: RunArgs) -> list[str]:
    """List what in `args` cannot work beside a method other than full."""
    method, name = args.method.method, args.optimizer.optimizer
    if method == "full":
        return []
    problems = []
    if name not in OPTIMIZERS:
        reason = "projects the gradients of whole matrices" if args.optimizer.is_low_rank else "is for whole matrices"
        problems.append(
            f"--optimizer {name} cannot work with --method {method}: it {reason}, and of a matrix there are two "
            f"factors: use one of {', '.join(OPTIMIZERS)}, or --method full"
        )
    # Of an optimizer that is refused the rank is its recipe's, unless it is given.
    given = is_given(args.command, "rank")
    if not isinstance(args.subspace.rank, int) and (given or name in OPTIMIZERS):
        problems.append(
            f"--rank {args.subspace.rank} cannot work with --method {method}, whose factors have one rank: give a "
            "whole number such as 128"
        )
    if args.model.recompute:
        problems.append(
            f"--recompute {args.model.recompute} cannot work with --method {method}, whose layers keep more than these "
            "tensors: use --activation_checkpointing, or leave it out"
        )
    if args.subspace.mlp_rank:
        problems.append(
            f"--mlp_rank {args.subspace.mlp_rank} cannot work with --method {method}, which has --rank for all "
            "matrices: leave it out"
        )
    if args.schedule.average_last:
        problems.append(
            f"--average_last {args.schedule.average_last:g} cannot work with --method {method}: the mean of factors is "
            "not the mean of their product; leave it out"
        )
    if method == "low_rank" and args.model.init_from:
        problems.append(
            f"--init_from {args.model.init_from} cannot work with --method low_rank, which has no whole matrices to "
            "begin with: use relora or lora, which keep them, or leave it out"
        )
    return problems + _compile_problems(args) + _relora_problems(args)


def _compile_problems(args: RunArgs) -> list[str]:
    if args.model.compile != "on" or args.method.method != "qlora":
        return []
    return ["--compile on cannot work with --method qlora, whose frozen layers it cannot see into: leave it out"]


def _relora_problems(args: RunArgs) -> list[str]:
    if args.method.method != "relora":
        return []
    every, total, warmup = args.method.relora_every, args.schedule.num_training_steps, args.method.relora_warmup
    if not every:
        return [
            "--method relora needs --relora_every, the updates between two merges: give a number of updates, such as a "
            f"quarter of the run's, {max(2, total // 4)}, more than --relora_warmup, {warmup}"
        ]
    problems = []
    if every >= total:
        problems.append(
            f"--relora_every {every} is not less than the run's {total} updates, so nothing would ever be merged: give "
            "less, or --method lora"
        )
    if warmup >= every:
        problems.append(
            f"--relora_warmup {warmup} is not less than --relora_every {every}: the learning rate would never be that "
            f"of its schedule again; give less, such as {every // 10}"
        )
    return problems
