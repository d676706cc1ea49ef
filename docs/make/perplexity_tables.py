"""Tables of perplexity, from quality.csv."""

from __future__ import annotations

import re
import statistics

from benchmarks.quality import SETTINGS
from docs.make.csv_rows import Row, rows_of
from docs.make.markdown import table

Flags = dict[str, str]
Seeds = dict[str, Row]
_TUNED = "--full_rank_lr 4e-2 --weight_decay 2.0 --full_rank_weight_decay 0"
_BEST_FULL_RANK = "--direction normuon --full_rank_second_moment row --full_rank_lr 4e-2"
SHORT = (
    ("AdamW, one learning rate for all weights", "adamw", ""),
    ("AdamW, rates and weight decay tuned for this run", "adamw_tuned", _TUNED),
    ("8-bit AdamW, rates tuned", "adam8bit_tuned", "--full_rank_lr 4e-2"),
    ("Q-GaLore as published (`--recipe paper`), streaming subspace", "q_galore_streaming_20", ""),
    ("a momentum of 7/16 of the rank, `--recipe orthogonal`", "q_galore_recipe_per_layer", ""),
    ("**the default: a momentum of full rank in 8 bits**", "full_rank", _BEST_FULL_RANK),
)
"""Rows of the short table: label, setting of `benchmarks/quality.py`, and flags beside those of the setting."""
_IMPLIED = {("--recipe", "paper"), ("--recipe", "orthogonal"), ("--adam8bit_backend", "own")}
"""Values that were the only ones before there was the flag, or the default when a row was measured."""
BYTES_OF = {
    "adamw": ("adamw_tuned", _TUNED),
    "q_galore_streaming_20": ("q_galore_streaming_20", "--full_rank_lr 2e-2"),
}
"""Old rows have no bytes; those of the same optimizer and model have."""


def flags_of(words: list[str]) -> Flags:
    """The last value of each flag, without what `_IMPLIED` has."""
    pairs = re.findall(r"(--\w+)((?: (?!--)\S+)*)", " ".join(words))
    values = {name: value.strip() for name, value in pairs}
    return {name: value for name, value in values.items() if (name, value) not in _IMPLIED}


def groups(model: str, updates: str) -> list[tuple[str, Flags, Seeds]]:
    """Runs of a model and length by setting and flags: of each seed the newest row."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], Seeds] = {}
    for row in rows_of("quality.csv"):
        if (row["model"], row["updates"]) == (model, updates):
            key = row["setting"], tuple(sorted(flags_of(row["flags"].split()).items()))
            found.setdefault(key, {})[row["seed"]] = row
    return [(setting, dict(flags), seeds) for (setting, flags), seeds in found.items()]


def seeds_of(setting: str, extra: str, model: str = "60m", updates: str = "800") -> Seeds:
    """The rows of a setting with further flags, by seed. Raises LookupError if there are none."""
    wanted = flags_of([*SETTINGS[setting], *extra.split()])
    for name, flags, seeds in groups(model, updates):
        if name == setting and flags == wanted:
            return seeds
    raise LookupError(f"quality.csv has no row of {setting} {extra} for {model} over {updates} updates")


def short() -> str:
    """A few settings of 60M over 800 updates."""
    lines = []
    for label, setting, extra in SHORT:
        seeds = seeds_of(setting, extra)
        size = bytes_of(seeds) or bytes_of(seeds_of(*BYTES_OF[setting]))
        lines.append([label, size, ", ".join(_values(seeds)), f"{mean(seeds):.2f}"])
    return table(["60M, 800 updates", "weights + states, GB", "perplexity by seed", "mean"], lines)


def mean(seeds: Seeds) -> float:
    """The mean perplexity."""
    return statistics.fmean(float(row["perplexity"]) for row in seeds.values())


def bytes_of(seeds: Seeds) -> str:
    """GB of weights, projections and optimizer states; empty where the rows do not have them."""
    for row in seeds.values():
        if row["weights_gb"]:
            return f"{float(row['weights_gb']) + float(row['states_gb']):.3f}"
    return ""


def _values(seeds: Seeds) -> list[str]:
    return [f"{float(row['perplexity']):.2f}" for _, row in sorted(seeds.items())]


def full() -> str:
    """Every setting of every model and length, the best first."""
    parts = []
    for model, updates in sorted({(row["model"], row["updates"]) for row in rows_of("quality.csv")}, key=_size):
        found = sorted(groups(model, updates), key=lambda group: mean(group[2]))
        lines = [
            [setting, " ".join(_beside(setting, flags)), ", ".join(_values(seeds)), bytes_of(seeds),
             ", ".join(sorted({row["commit"] for row in seeds.values()}))]
            for setting, flags, seeds in found
        ]  # fmt: skip
        head = ["setting", "flags beside it", "perplexity by seed", "GB", "commits"]
        parts.append(f"### {model.upper()}, {int(updates):,} updates\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def _size(key: tuple[str, str]) -> tuple[int, int]:
    return int(key[0].rstrip("mb")) * (1000 if key[0].endswith("b") else 1), int(key[1])


def _beside(setting: str, flags: Flags) -> list[str]:
    """The flags that a setting, where it is still there, does not have itself."""
    own = flags_of(SETTINGS.get(setting, []))
    return [f"`{f'{name} {value}'.strip()}`" for name, value in flags.items() if own.get(name) != value]
