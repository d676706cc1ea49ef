"""One set of flags for all ranks of a run: what each has chosen for its own card must not tell them apart.

Ranks whose micro-batches differ in number would wait for each other's collectives, or pair them up wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft_pretraining.config.flags import flag_values
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.card_memory import memory_of_card
from peft_pretraining.runtime.world import World

OF_A_MACHINE = {
    "model_config", "init_from", "dataset", "tokenizer", "save_dir", "continue_from", "workers", "damaged_limit",
}  # fmt: skip
"""Flags that name a place, or say how a rank reads: they may differ between machines."""


def agree_on_flags(args: RunArgs, world: World) -> RunArgs:
    """What all ranks train with: where they have chosen differently, what the one with the smallest card has chosen.

    args: what this rank has read from its command line. Raises UserError on all ranks where their command lines ask for
    different runs.
    """
    if world.world_size == 1:
        return args
    card = None if args.runtime.device == "cpu" else memory_of_card(world.world_size)
    memory = 0 if card is None else card[0]
    everyone = world.gather((args, memory))
    commands = [each for each, _ in everyone]
    values = [each.to_dict() for each in commands]
    given = {name for each in commands for name in _given(each.command)} & values[0].keys() - OF_A_MACHINE
    for name in values[0]:
        if name in given and any(other[name] != values[0][name] for other in values):
            found = ", ".join(f"{other[name]} on rank {rank}" for rank, other in enumerate(values))
            raise UserError(
                f"--{name} is {found}: all ranks train one model by the same flags; start them with the same command"
            )
    least = min(range(len(everyone)), key=lambda rank: everyone[rank][1])
    return _with_own_paths(args, commands[least])


def _given(command: Sequence[str]) -> set[str]:
    """The flags of a command line by name, a --no- form under that of its flag."""
    return {flag.removeprefix("--").removeprefix("no-") for flag, _ in flag_values(command)}


def _with_own_paths(own: RunArgs, chosen: RunArgs) -> RunArgs:
    """The chosen arguments with this rank's own flags of its machine, and its command."""
    groups: dict[str, Any] = {}
    for name in GROUPS:
        group, mine = getattr(chosen, name), getattr(own, name)
        fields = {field.name for field in dataclasses.fields(group)} & OF_A_MACHINE
        groups[name] = dataclasses.replace(group, **{field: getattr(mine, field) for field in fields})
    return dataclasses.replace(chosen, **groups, command=own.command)
