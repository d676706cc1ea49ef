"""Perplexity against bytes at 60M, for the settings of the short table and a few more."""

from __future__ import annotations

from typing import Any

from docs.make.perplexity_tables import BYTES_OF, SHORT, bytes_of, mean, seeds_of

_LABELS = {
    "adamw_tuned": ("AdamW, tuned", "0.45"),
    "adam8bit_tuned": ("8-bit AdamW, tuned", "0.45"),
    "muon": ("Muon, tuned", "0.45"),
    "q_galore_streaming_20": ("the published Q-GaLore, streaming subspace", "C0"),
    "q_galore_recipe_per_layer": ("--recipe orthogonal", "C0"),
    "full_rank": ("the default", "C3"),
}
_MUON = ("muon", "--lr 4e-3 --weight_decay 1.0 --full_rank_lr 4e-2 --full_rank_weight_decay 0")
_ABOVE = 56.0
"""What has a higher perplexity stands at the top, with its figure."""


def figures() -> dict[str, Any]:
    """By setting GB, and the perplexity of each seed."""
    found = {}
    for setting, extra in [*((setting, extra) for _, setting, extra in SHORT), _MUON]:
        seeds = seeds_of(setting, extra)
        size = bytes_of(seeds) or bytes_of(seeds_of(*BYTES_OF[setting]))
        perplexities = [float(row["perplexity"]) for _, row in sorted(seeds.items())]
        found[setting] = {"gb": float(size), "mean": round(mean(seeds), 3), "seeds": perplexities}
    return found


def draw(found: dict[str, Any]) -> Any:
    """A point a setting, with the range of its seeds."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 3.8), layout="constrained")
    for setting, (label, colour) in _LABELS.items():
        size, middle, seeds = (found[setting][name] for name in ("gb", "mean", "seeds"))
        height = min(middle, _ABOVE)
        spread = [[height - min(seeds)], [max(seeds) - height]] if middle <= _ABOVE else None
        axis.errorbar([size], [height], yerr=spread, fmt="o" if spread else "^", color=colour, capsize=3)
        text = f"{label}: {middle:.1f}" + (f", {len(seeds)} seeds" if len(seeds) > 1 else ", one seed")
        left = size > 0.4
        axis.annotate(
            text, (size, height), (-8 if left else 8, 0), textcoords="offset points", fontsize=8.5, color=colour,
            ha="right" if left else "left", va="center",
        )  # fmt: skip
    axis.set_xlim(0, 0.62)
    axis.set_ylim(39, 57)
    axis.set_xlabel("weights, projections and optimizer states, GB")
    axis.set_ylabel("perplexity (lower is better)")
    axis.set_title("LLaMA-60M, 800 updates of 65,536 tokens, held-out text", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
