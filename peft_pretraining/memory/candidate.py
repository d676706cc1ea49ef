"""A setting of the flags that a command line leaves open, with the planned memory and time of its run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.lasting import lasting_bytes
from peft_pretraining.memory.plan import plan_of_run
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import Card
from peft_pretraining.speed.run_speed import counted_seconds

UNPLANNED_SHARE, OF_COMPILER = 0.01, 64 << 20
"""What is kept free of a budget, as measured peaks are up to a per cent above the plan, and where layers are computed
again up to 53 MB more, while the compiler times its kernels (`docs/performance.md`)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting of the flags that a command line leaves open."""

    flags: tuple[str, ...]
    """Those that are added to the command line."""
    args: RunArgs
    config: ModelConfig
    lasting: dict[Any, dict[str, int]]
    """What other candidates have counted already."""

    @cached_property
    def run(self) -> PlannedRun:
        """The run with this setting, as it is planned."""
        return PlannedRun(self.args, self.config)

    @cached_property
    def peak(self) -> int:
        """The planned peak in bytes."""
        run = self.run
        key = (
            run.args.updates_immediately,
            run.sum_dtype,
            self.args.subspace,
        )  # all else that lasts is the same everywhere
        if key not in self.lasting:
            self.lasting[key] = lasting_bytes(run)
        return plan_of_run(run, self.lasting[key]).peak_bytes

    @property
    def needs(self) -> int:
        """The planned peak and what is kept free beside it."""
        recomputes = self.args.kept_activations.recomputed_in_words != "none"
        of_compiler = OF_COMPILER if recomputes and self.run.compiled else 0
        return self.peak + int(self.peak * UNPLANNED_SHARE) + of_compiler

    def seconds(self, card: Card) -> float:
        """The counted time of an update."""
        return counted_seconds(self.args, self.config, card)

    def tokens_per_second(self, card: Card) -> float:
        """Counted, of all ranks."""
        return self.args.tokens_per_update / self.seconds(card)


def least_of(chain: list[Candidate]) -> list[Candidate]:
    """Those of a chain among which is the one of the least memory: steps of eighths and the last."""
    return [*chain[:: max(1, len(chain) // 8)], chain[-1]]
