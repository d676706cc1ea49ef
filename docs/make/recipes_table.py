"""The recipes beside AdamW, 8-bit AdamW and Muon: perplexity, bytes, speed, memory, by quality.csv and compare.csv."""

from __future__ import annotations

from typing import NamedTuple

from docs.make.markdown import table
from docs.make.perplexity_tables import bytes_of, mean, seeds_of
from docs.make.speed_tables import comparison, newest_pair

_TUNED = "--full_rank_lr 4e-2 --weight_decay 2.0 --full_rank_weight_decay 0"
_MUON = "--lr 4e-3 --weight_decay 1.0 --full_rank_lr 4e-2 --full_rank_weight_decay 0"
_AVERAGED = "--average_last 0.1"
_SPEEDS = ("60m", "350m")


class _Line(NamedTuple):
    label: str
    small: tuple[str, str]
    """Setting and flags at 60M."""
    large: tuple[str, str] | None
    """At 350M."""
    method: str = ""
    """Of compare.csv."""


LINES = (
    _Line(
        "**the default**, `--recipe full_rank`",
        ("full_rank", "--direction normuon --full_rank_second_moment row --full_rank_lr 4e-2"),
        ("full_rank_recipe", _AVERAGED),
        "q_galore_full_rank",
    ),
    _Line(
        "`--recipe orthogonal`",
        ("q_galore_recipe_per_layer", ""),
        ("q_galore_recipe_per_layer", _AVERAGED),
        "q_galore_orthogonal",
    ),
    _Line("`--recipe paper --subspace streaming`", ("q_galore_streaming_20", ""), None, "q_galore"),
    _Line("8-bit AdamW, tuned", ("adam8bit_tuned", "--full_rank_lr 4e-2"), None, "adam8bit_bitsandbytes"),
    _Line("AdamW, tuned", ("adamw_tuned", _TUNED), ("adamw_tuned", f"{_TUNED} {_AVERAGED}"), "adamw_compiled"),
    _Line("Muon, tuned", ("muon", _MUON), ("muon", f"{_MUON} {_AVERAGED}")),
)


def recipes() -> str:
    """A line a recipe; figures that nobody has measured are dashes."""
    lines = []
    for line in LINES:
        small = seeds_of(*line.small)
        large = f"{mean(seeds_of(*line.large, model='350m')):.1f}" if line.large else "-"
        beside = [_beside_adamw(line.method, model) if line.method else None for model in _SPEEDS]
        speeds, peaks = ([pair[index] if pair else "-" for pair in beside] for index in (0, 1))
        size = bytes_of(small) or bytes_of(seeds_of("q_galore_streaming_20", "--full_rank_lr 2e-2"))
        lines.append([line.label, f"{mean(small):.1f}", large, f"{size} GB", ", ".join(speeds), ", ".join(peaks)])
    head = ["", "perplexity, 60M", "350M", "weights and states, 60M"]
    head += ["speed ÷ AdamW's: 60M, 350M", "peak memory ÷ AdamW's: 60M, 350M"]
    return table(head, lines)


def _beside_adamw(method: str, model: str) -> tuple[str, str] | None:
    """(speed, peak memory) as multiples of compiled AdamW's; None where that was not measured."""
    if method in ("q_galore", "adamw_compiled"):
        found = comparison(model)
        row, theirs = found[method], found["adamw_compiled"]
    elif pair := newest_pair(method, model):
        row, theirs = pair
    else:
        return None
    columns = ("in_a_row_tokens_per_second", "run_peak_gb")
    speed, peak = (float(row[name]) / float(theirs[name]) for name in columns)
    return f"{speed:.2f}", f"{peak:.2f}"
