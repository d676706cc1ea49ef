"""The learning rate schedule as a pure function of the update step.

Warm-up and cosine are those of GaLore's official code: linear growth from 0 at update 0, then half a cosine from the
peak to `min_lr_ratio` of it at the end. `linear` goes down to `min_lr_ratio` as well (the official one ignores the
flag and ends at 0). `cosine_restarts` divides the updates after the warm-up into equal cosine cycles, each starting at
the peak without a warm-up of its own (SGDR, arXiv 1608.03983, with cycles of one length).

`constant` stays at the peak after the warm-up. `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) stays there
until the decay, whose length is its own and not that of the run: up to its first update the rates do not depend on
`total_steps`, so that a run can be made longer. Shapes of the decay, with x from 0 at its first update to 1 at the end:
`1-sqrt`, 1 - sqrt(x) between peak and minimum, which was better than a line in arXiv 2405.18392; `linear`; and
`exponential`, min_lr_ratio^x, MiniCPM's own.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from peft_pretraining.config.flag_groups import MethodArgs, ScheduleArgs


@dataclass(frozen=True)
class Decay:
    """The decay of wsd: the last `updates` of a run, and the shape of their learning rates."""

    updates: int
    shape: str = "1-sqrt"

    def at(self, progress: float, min_lr_ratio: float) -> float:
        """The factor on the peak, from 1 at `progress` 0 to `min_lr_ratio` at 1."""
        if self.shape == "exponential":
            return math.pow(min_lr_ratio, progress)
        return min_lr_ratio + (1 - min_lr_ratio) * (1 - (math.sqrt(progress) if self.shape == "1-sqrt" else progress))


def lr_multiplier(
    update_step: int,
    scheduler: str,
    *,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.1,
    restart_cycles: int = 4,
    decay: Decay | None = None,
) -> float:
    """The factor on the peak learning rate for update `update_step` (from 0); `min_lr_ratio` after the end.

    `restart_cycles` are of cosine_restarts, and `decay` is of wsd. `constant` has no end.
    """
    if update_step >= total_steps and scheduler != "constant":
        return min_lr_ratio
    if update_step < warmup_steps:
        return update_step / warmup_steps
    if scheduler == "constant":
        return 1.0
    if scheduler == "wsd":
        updates_left = total_steps - update_step
        if decay is None or updates_left >= decay.updates:
            return 1.0
        return decay.at(1 - updates_left / decay.updates, min_lr_ratio)
    progress = (update_step - warmup_steps) / (total_steps - warmup_steps)  # in [0, 1)
    if scheduler == "linear":
        return 1 - (1 - min_lr_ratio) * progress
    if scheduler == "cosine_restarts":
        progress = progress * restart_cycles % 1.0
    elif scheduler != "cosine":
        raise ValueError(f"scheduler is {scheduler!r}, it must be cosine, linear, cosine_restarts, constant or wsd")
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Restarts:
    """Restarts of ReLoRA (arXiv 2307.05695): after each the rate grows from 0 back to its schedule."""

    every: int
    """Updates between two restarts."""
    warmup: int
    """Updates of a growth."""

    def factor(self, update_step: int) -> float:
        """The factor on the scheduled rate of update `update_step` (from 0)."""
        since = update_step % self.every
        return since / self.warmup if update_step >= self.every and since < self.warmup else 1.0


def restarts_of(method: MethodArgs) -> Restarts | None:
    """Those of a run; None where its method has none."""
    return Restarts(method.relora_every, method.relora_warmup) if method.method == "relora" else None


def scheduled_multiplier(schedule: ScheduleArgs, update_step: int, restarts: Restarts | None = None) -> float:
    """`lr_multiplier` with the options of a run."""
    jag = 1.0 if restarts is None else restarts.factor(update_step)
    return jag * lr_multiplier(
        update_step,
        schedule.scheduler,
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.num_training_steps,
        min_lr_ratio=schedule.min_lr_ratio,
        restart_cycles=schedule.restart_cycles,
        decay=Decay(schedule.decay_updates, schedule.decay_shape),
    )


def describe_schedule(schedule: ScheduleArgs) -> str:
    """The way of the learning rate in words, with the updates at which it turns."""
    total, warmup = schedule.num_training_steps, schedule.warmup_steps
    if warmup >= total:
        return f"grows from 0 and would reach its peak at update {warmup:,}, after the end at {total:,}"
    end = f"to {schedule.min_lr_ratio:g} of it at update {total:,}"
    ways = {
        "constant": f"stays there to update {total:,}",
        "wsd": f"stays there to update {schedule.decay_start:,} and falls ({schedule.decay_shape}) {end}",
        "cosine_restarts": f"falls {schedule.restart_cycles} times in a cosine, at last {end}",
    }
    start = f"grows from 0 to its peak at update {warmup:,}" if warmup else "starts at its peak"
    return f"{start}, {ways.get(schedule.scheduler, f'falls ({schedule.scheduler}) {end}')}"


def describe_change(schedule: ScheduleArgs, before: ScheduleArgs, update_step: int) -> str:
    """A sentence if a run goes on after `update_step` updates at another rate than `before` had planned; else "".

    before: the schedule of the checkpoint.
    """
    now, planned = scheduled_multiplier(schedule, update_step), scheduled_multiplier(before, update_step)
    if now == planned:
        return ""
    text = (
        f"the learning rate goes on at {now:.3g} of its peak, and the schedule of the checkpoint had {planned:.3g} "
        f"for update {update_step:,}"
    )
    if schedule.can_be_extended and before.scheduler == "wsd" and update_step > before.decay_start >= 0:
        text += f": it had begun to decay after update {before.decay_start:,}; a checkpoint from before goes on exactly"
    return text


class HasParamGroups(Protocol):
    """An object with param groups, such as an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their hyperparameters."""


def set_learning_rate(optimizer: HasParamGroups, multiplier: float) -> None:
    """Set each group's `lr` in place to its `initial_lr` (its `lr` on the first call) times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
