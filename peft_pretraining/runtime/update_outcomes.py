"""What became of an update: made, skipped, or partly made.

The device alone knows whether a gradient was finite. Asking it at once would make the host wait for all work that is
queued, so its answer is copied to the host behind the work of the update and read while the next update is computed.
What follows from an outcome is for the training loop to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.optim.protocol import TrainingOptimizer
from peft_pretraining.runtime.deferred_metrics import DeferredMetrics

_SKIPPED, _PARTLY_MADE = "train/skipped", "train/partly_made"


class Outcome(Enum):
    """What an update did to the weights."""

    MADE = "made"
    SKIPPED = "skipped"
    """Nothing, since its loss or gradient was not finite."""
    PARTLY_MADE = "partly made"
    """It changed some of them before a gradient further down was found not to be finite."""


@dataclass(frozen=True)
class FinishedUpdate:
    """An update that the device has computed."""

    update_step: int
    """Its number, from 1."""
    outcome: Outcome
    metrics: Mapping[str, float]


class GoBackError(Exception):
    """The weights are those of no update: the run has to go back and leave out the update after `update_step`."""

    def __init__(self, update_step: int) -> None:
        """update_step: how many updates were whole."""
        super().__init__(
            f"update {update_step + 1}: a gradient further down was not finite after weights above it had been "
            "updated; going back to the newest checkpoint to leave that update out"
        )
        self.update_step = update_step


class UpdateOutcomes:
    """Holds the newest update until its values can be read without waiting for the one after it."""

    def __init__(self) -> None:
        """No update yet."""
        self._deferred = DeferredMetrics()

    def put(
        self,
        update_step: int,
        metrics: Mapping[str, float | Tensor],
        optimizer: TrainingOptimizer,
        measured: Mapping[str, float],
    ) -> None:
        """Hand in update number `update_step` after `optimizer.step()`; reads nothing from the device.

        To `metrics`, host floats and 0-dim device tensors, come those of the optimizer, and at the end `measured`. The
        update handed in before has been taken.
        """
        full_rank, low_rank, *_ = optimizer.param_groups
        rates = {"train/lr": low_rank["lr"], "train/full_rank_lr": full_rank["lr"]}
        flags = {_SKIPPED: optimizer.skipped(), _PARTLY_MADE: optimizer.late_overflow()}
        norm = {"train/grad_norm": optimizer.grad_norm()}
        self._deferred.put(
            update_step, {**metrics, **rates, **norm, **flags, **optimizer.subspace_metrics(), **measured}
        )

    def take(self) -> FinishedUpdate | None:
        """The update handed in last; waits until the device has computed it. None if there is none."""
        pending = self._deferred.take()
        if pending is None:
            return None
        update_step, metrics = pending
        outcome = Outcome.MADE
        if metrics.pop(_PARTLY_MADE):
            outcome = Outcome.PARTLY_MADE
        elif metrics[_SKIPPED]:
            outcome = Outcome.SKIPPED
        return FinishedUpdate(update_step, outcome, metrics)


def too_many_skipped(args: RunArgs, in_a_row: int, update_step: int) -> str:
    """The last words of a run that ends because its updates up to number `update_step` were skipped."""
    return (
        f"--max_skipped_updates {args.runtime.max_skipped_updates}: {in_a_row} updates in a row had a loss or gradient "
        f"that is not finite, up to update {update_step}. The newest checkpoint in {args.checkpoint.save_dir} is from "
        "before them: resume from it with a lower --lr, with --grad_clipping 1.0 or with --dtype float32"
    )
