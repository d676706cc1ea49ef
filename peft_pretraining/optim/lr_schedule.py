"""The learning rate schedule as a pure function of the update step.

Warm-up and cosine are those of GaLore's official code: linear growth from 0 at update 0, then half a cosine from the
peak to `min_lr_ratio` of it at the end. `linear` goes down to `min_lr_ratio` as well (the official one ignores the
flag and ends at 0). `cosine_restarts` divides the updates after the warm-up into equal cosine cycles, each starting at
the peak without a warm-up of its own (SGDR, arXiv 1608.03983, with cycles of one length).
"""

import math
from typing import Any, Protocol

from peft_pretraining.config.flag_groups import ScheduleArgs


def lr_multiplier(
    update_step: int,
    scheduler: str,
    *,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.1,
    restart_cycles: int = 4,
) -> float:
    """The factor on the peak learning rate for update `update_step` (from 0); `min_lr_ratio` after the end."""
    if update_step >= total_steps:
        return min_lr_ratio
    if update_step < warmup_steps:
        return update_step / warmup_steps
    progress = (update_step - warmup_steps) / (total_steps - warmup_steps)  # in [0, 1)
    if scheduler == "linear":
        return 1 - (1 - min_lr_ratio) * progress
    if scheduler == "cosine_restarts":
        progress = progress * restart_cycles % 1.0
    elif scheduler != "cosine":
        raise ValueError(f"scheduler is {scheduler!r}, it must be cosine, linear or cosine_restarts")
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def scheduled_multiplier(schedule: ScheduleArgs, update_step: int) -> float:
    """`lr_multiplier` with the options of a run."""
    return lr_multiplier(
        update_step,
        schedule.scheduler,
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.num_training_steps,
        min_lr_ratio=schedule.min_lr_ratio,
        restart_cycles=schedule.restart_cycles,
    )


class HasParamGroups(Protocol):
    """An object with param groups, such as an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their hyperparameters."""


def set_learning_rate(optimizer: HasParamGroups, multiplier: float) -> None:
    """Set each group's `lr` in place to its `initial_lr` (its `lr` on the first call) times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
