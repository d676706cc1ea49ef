"""The outcome of an update, applied, skipped or partly applied, read without making the host wait for the device.

Whether a gradient was finite is known on the device. Reading that at once would make the host wait for all queued work,
so it is copied to the host asynchronously and read while the next update is computed. The training loop decides what
follows from an outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.optim.protocol import TrainingOptimizer
from peft_pretraining.runtime.deferred_metrics import DeferredMetrics

_SKIPPED, _LATE_OVERFLOW = "train/skipped", "train/late_overflow"
_LOSS, _CAN_FALL = "train/loss", "train/loss_scale_can_fall"


class Outcome(Enum):
    """The effect of an update on the weights."""

    MADE = "made"
    SKIPPED = "skipped"
    """No weight changed, since the loss or gradient was not finite."""
    SCALE_TOO_LARGE = "scale too large"
    """No weight changed, since the gradient of the scaled loss overflowed; the loss scale is smaller by now."""
    LATE_OVERFLOW = "late overflow"
    """Some weights, or momenta, changed before another gradient was found not to be finite."""


@dataclass(frozen=True)
class FinishedUpdate:
    """An update that the device has computed."""

    update_step: int
    """Counted from 1."""
    outcome: Outcome
    metrics: Mapping[str, float]


class RollbackError(Exception):
    """An update was partly applied: the run has to go back to a checkpoint and skip the update after `update_step`."""

    def __init__(self, update_step: int) -> None:
        """update_step: how many updates before it were finished."""
        super().__init__(
            f"update {update_step + 1}: a gradient further down was not finite after weights above it had been "
            "updated, or after momenta had the gradients of others (--sum_in_momentum); going back to the newest "
            "checkpoint to leave that update out"
        )
        self.update_step = update_step


class UpdateOutcomes:
    """Keeps the newest update until its values can be read without waiting for the one after it."""

    def __init__(self) -> None:
        """Start without an update."""
        self._deferred = DeferredMetrics()

    def put(
        self,
        update_step: int,
        metrics: Mapping[str, float | Tensor],
        optimizer: TrainingOptimizer,
        measured: Mapping[str, float],
    ) -> None:
        """Store update number `update_step` after `optimizer.step()`; reads nothing from the device.

        `metrics` are host floats and 0-dim device tensors; those of the optimizer and `measured` are added behind
        them. `take` the stored update first.
        """
        full_rank, low_rank, *_ = optimizer.param_groups
        rates = {"train/lr": low_rank["lr"], "train/full_rank_lr": full_rank["lr"]}
        flags = {_SKIPPED: optimizer.skipped(), _LATE_OVERFLOW: optimizer.late_overflow()}
        norm = {"train/grad_norm": optimizer.grad_norm()}
        if (scale := optimizer.loss_scale) is not None:
            flags |= {"train/loss_scale": scale.value, _CAN_FALL: scale.can_fall()}
        self._deferred.put(
            update_step, {**metrics, **rates, **norm, **flags, **optimizer.subspace_metrics(), **measured}
        )

    def take(self) -> FinishedUpdate | None:
        """Remove and return the stored update, after waiting for the device; None if there is none."""
        pending = self._deferred.take()
        if pending is None:
            return None
        update_step, metrics = pending
        outcome, can_fall = Outcome.MADE, metrics.pop(_CAN_FALL, 0.0)
        if metrics.pop(_LATE_OVERFLOW):
            outcome = Outcome.LATE_OVERFLOW
        elif metrics[_SKIPPED] and can_fall and math.isfinite(metrics[_LOSS]):
            outcome = Outcome.SCALE_TOO_LARGE
        elif metrics[_SKIPPED]:
            outcome = Outcome.SKIPPED
        return FinishedUpdate(update_step, outcome, metrics)


def too_many_skipped(args: RunArgs, in_a_row: int, update_step: int) -> str:
    """The error text of a run that ends because its last `in_a_row` updates, up to `update_step`, were skipped."""
    scale = args.optimizer.loss_scale
    other = f"a --loss_scale below {scale:g}" if scale > 1 else "--dtype float32"
    return (
        f"--max_skipped_updates {args.runtime.max_skipped_updates}: {in_a_row} updates in a row had a loss or gradient "
        f"that is not finite, up to update {update_step}. The newest checkpoint in {args.checkpoint.save_dir} is from "
        f"before them: resume from it with a lower --lr, with --grad_clipping 1.0 or with {other}"
    )
