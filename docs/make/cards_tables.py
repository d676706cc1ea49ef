"""Tables of cards: what trains in which memory, by the plan and by rows that were measured."""

from __future__ import annotations

import re
from typing import NamedTuple

from benchmarks.models import LENGTH
from docs.make.csv_rows import Row, card, rows_of
from docs.make.markdown import table
from peft_pretraining.commands import plan
from peft_pretraining.memory.fit_tables import days_in_words
from peft_pretraining.memory.shipped_runs import ShippedRun
from peft_pretraining.speed.cards import card_of_size

_LEFT = 1
"""GiB that context and display are left: a card of 16 GB has 16 GiB, and stands for a process that is capped to 15."""
_PAPER = re.compile(r"q_galore(_int8_activations)?(_checkpointing\d*)?")
_DEFAULT = re.compile(r"q_galore_full_rank(_checkpointing\d*)?")
MODELS = ((8, "1b"), (12, "3b"), (16, "7b"), (24, "7b"), (24, "13b"), (48, "13b"), (80, "13b"))
"""By GB (10^9 bytes), a model that trains there at the rank of the paper and a speed that is of use."""
FULL = "--memory 8GB,12GB,16GB,24GB,48GB,80GB --model 60m,130m,350m,1b,3b,7b,13b"
"""Flags of `qgalore plan` for the table in full."""


class Measured(NamedTuple):
    """The best measured row of a model within a memory."""

    row: Row

    @property
    def cap_gib(self) -> float:
        """What the process could not have taken more than; 0 where it was not capped."""
        return float(self.row["cap_gib"] or 0)

    @property
    def text(self) -> str:
        """In words, with tokens a second and peak."""
        how = f"capped to {self.row['cap_gib']} GiB" if self.cap_gib else "not capped"
        sums = ", one micro-batch an update" if self.row["grad_accum"] == "1" else ""
        recipe = "`paper`" if _PAPER.fullmatch(self.row["method"]) else "the default"
        gigabytes = float(self.row["run_peak_gb"])
        return f"{recipe}: {self.speed:,.0f} tokens/s, {gigabytes:.1f} GB, {card(self.row)} {how}{sums}"

    @property
    def speed(self) -> float:
        """Tokens a second, of updates in a row where there are such."""
        return float(self.row["in_a_row_tokens_per_second"] or self.row["tokens_per_second"])


def measured(model: str, gigabytes: int) -> Measured | None:
    """The row of Q-GaLore that stayed within a memory: of those that were capped the one of the highest cap, else by
    what was reserved; of several an H100's, then the fastest."""
    found = []
    for row in rows_of("compare.csv"):
        if row["model"] != model or not _is_plain(row):
            continue
        capped = row["cap_gib"]
        fits = float(capped) <= gigabytes - _LEFT if capped else float(row["run_reserved_gb"]) <= gigabytes
        if fits:
            found.append(Measured(row))
    return max(found, key=lambda each: (each.cap_gib, card(each.row) == "H100", each.speed), default=None)


def _is_plain(row: Row) -> bool:
    """Whether a row is a finished measurement of `paper` or of the default, in bfloat16 and on the card alone."""
    finished = row["tokens_per_second"] and row["run_reserved_gb"] and not row["error"]
    known = _PAPER.fullmatch(row["method"]) or _DEFAULT.fullmatch(row["method"])
    others = any(flag in row["flags"] for flag in ("--int8_products", "--fp8_", "--offload", "--accumulate_by"))
    return bool(finished and known and not others and row["length"] == str(LENGTH))


def short() -> str:
    """A row a memory: a model that trains there at the paper's rank, planned and measured."""
    lines = []
    for gigabytes, model in MODELS:
        fit = ShippedRun(model).fit(gigabytes * 10**9, card_of_size(gigabytes * 10**9))
        assert fit.chosen is not None, f"{model} does not fit {gigabytes} GB"
        row, counted = measured(model, gigabytes), fit.chosen.tokens_per_second(fit.card)
        lines.append(
            [f"{gigabytes} GB", f"**{model.upper()}**", str(LENGTH), row.text if row else "not measured",
             _days(row.speed) if row else "-",
             f"{fit.card.name}: {counted:,.0f} tokens/s, {_days(counted)} days, {fit.chosen.peak / 1e9:.1f} GB"]
        )  # fmt: skip
    head = [
        "memory",
        "model",
        "length",
        "measured",
        "days for 10 B tokens",
        "estimate for a card, with a batch that fills it",
    ]
    return table(head, lines)


def _days(tokens_per_second: float) -> str:
    return days_in_words(10e9 / tokens_per_second / 86_400)


def full() -> str:
    """What `qgalore plan` prints of all memories and models."""
    return plan.text_of(*plan.parse_args(FULL.split()))
