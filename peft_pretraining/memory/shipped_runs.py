"""What of the shipped models trains in a given memory, and how: the papers' recipe by the planner of a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from peft_pretraining.config.flag_groups import AUTO
from peft_pretraining.config.flags import is_given
from peft_pretraining.memory.candidate import Candidate
from peft_pretraining.memory.candidates import Candidates
from peft_pretraining.memory.choice import choose
from peft_pretraining.models.config_files import shipped_configs
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS, Card
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS, MeasuredSpeed
from qgalore.config import FULL
from qgalore.recipes import PAPER

TOKENS_PER_UPDATE = 512 * 256
RECIPES = {
    "60m": (128, 10_000),
    "130m": (256, 20_000),
    "350m": (256, 60_000),
    "1b": (512, 100_000),
    "7b": (1024, 150_000),
}
"""Rank and updates of the paper's runs (arXiv 2407.08296, as in scripts/pretrain_c4), by model."""
_RANKS = {"13b": 1024}  # that of 7B, with which 13B was measured
_BATCH = ("--total_batch_size", "512", "--max_length", "256")
_Q_GALORE = ("--optimizer", "q_galore_adamw8bit_per_layer")
_PAPER = ("--recipe", "paper", "--subspace", "streaming", "--update_proj_gap", "200", "--galore_scale", "0.25")


class Fit(NamedTuple):
    """How a model trains in a memory on a card."""

    model: str
    card: Card
    budget: int
    """Bytes."""
    chosen: Candidate | None
    """None: it does not fit."""
    least: Candidate
    """Of all settings the one of the least memory."""

    @property
    def row(self) -> MeasuredSpeed | None:
        """The measured row of the very setting on this card, with any number of micro-batches."""
        if self.chosen is None:
            return None
        args, subspace = self.chosen.args, self.chosen.args.subspace
        every = args.model.checkpoint_every if args.model.activation_checkpointing else 0
        if args.model.checkpoint_layers or args.model.recompute:
            return None
        setting = (args.batch.batch_size, subspace.rank, every, args.model.int8_activations)
        alike = subspace.subspace == "streaming" and subspace.direction == "adam" and not subspace.mlp_rank
        alike = alike and args.optimizer.is_q_galore and args.world_size == 1
        for each in MEASURED_SPEEDS if alike and args.batch.max_length == 256 else ():
            same = (each.batch_size, each.rank, each.checkpoint_every, each.int8_activations) == setting
            if same and CARDS[each.card] == self.card and each.model == self.model:
                return each
        return None

    @property
    def tokens_per_second(self) -> float:
        """Measured where `row` is there, else counted; 0 where it does not fit."""
        if self.chosen is None:
            return 0.0
        return self.row.tokens_per_second if self.row else self.chosen.tokens_per_second(self.card)

    @property
    def days(self) -> float | None:
        """Of as many tokens as the paper's run, padding counted; None where the paper has none."""
        if self.chosen is None or self.model not in RECIPES:
            return None
        return RECIPES[self.model][1] * TOKENS_PER_UPDATE / self.tokens_per_second / 86_400


class ShippedRun:
    """The run of a shipped model with all settings that it can have."""

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        """flags: of `run_pretrain.py`, in place of the recipe's. Raises UserError."""
        self.model = model
        has_rank = is_given(flags, "rank")
        self.argv = ["--model_config", str(shipped_configs()[model]), "--memory_budget", "1TB", "--device", "cuda"]
        self.argv += _BATCH
        if not is_given(flags, "optimizer"):
            # The paper has projections.
            own = is_given(flags, "recipe") or is_given(flags, "rank", FULL)
            self.argv += [*_Q_GALORE, *(() if own else [*_PAPER, "--rank", str(self._papers_rank)])]
            if not own and is_given(flags, "rank", AUTO):
                flags = [*flags, "--rank", f"{AUTO}:{self._papers_rank}"]
        self.candidates = Candidates([*self.argv, *flags], defaults=() if has_rank else ("rank",))

    @property
    def _papers_rank(self) -> int:
        """Half of the hidden size where the paper has no such run, and no more than the shortest side of a matrix."""
        config = read_config(shipped_configs()[self.model])
        if self.model in RECIPES:
            return RECIPES[self.model][0]
        shortest = min(itertools.chain(*config.matrix_shapes().values()))
        return _RANKS.get(self.model, min(int(PAPER.rank(config.hidden_size)), shortest))

    def fit(self, budget: int, card: Card) -> Fit:
        """The fastest setting that fits into so many bytes on a card."""
        return Fit(self.model, card, budget, choose(self.candidates, budget, card), self.candidates.smallest)
