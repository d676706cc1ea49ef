"""Bars of tokens a second and peak memory beside AdamW, 60M to 7B."""

from __future__ import annotations

from typing import Any

from docs.make.csv_rows import newest, rows_of
from docs.make.speed_tables import MODELS, comparison
from docs.make.update_flow import PARAMETERS_OF_7B

_METHODS = {
    "adamw_compiled": ("AdamW, bfloat16, compiled", "0.6"),
    "q_galore": ("Q-GaLore", "C0"),
    "q_galore_int8_activations": ("Q-GaLore, INT8 activations", "C9"),
    "q_galore_checkpointing": ("Q-GaLore, layers recomputed", "C2"),
}
_BYTES_OF_ADAMW = 8
"""A parameter: weight, gradient and two moments in bfloat16."""


def figures() -> dict[str, Any]:
    """By model and method tokens/s and GB; of AdamW at 7B, which no row of an H100 has, bytes of weights and states."""
    found: dict[str, Any] = {
        model: {
            method: [float(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])]
            for method, row in comparison(model).items()
            if method in _METHODS
        }
        for model in MODELS
    }
    counted = _BYTES_OF_ADAMW * PARAMETERS_OF_7B / 1e9
    row = newest(
        rows_of("compare.csv"),
        lambda row: (
            (row["model"], row["method"], row["grad_accum"]) == ("7b", "q_galore_checkpointing", "1")
            and bool(row["in_a_row_tokens_per_second"])
            and not row["error"]
        ),
    )
    assert row is not None
    of_row = [float(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])]
    found["7b"] = {"adamw_compiled": [0.0, round(counted, 2)], "q_galore_checkpointing": of_row}
    return found


def draw(found: dict[str, Any]) -> Any:
    """Two panels: speed as a multiple of AdamW's, and peak memory."""
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(2, 1, figsize=(8.5, 5.2), sharex=True, layout="constrained")
    width = 0.2
    for number, (method, (label, colour)) in enumerate(_METHODS.items()):
        for group, (model, values) in enumerate(found.items()):
            if method not in values:
                continue
            rate, peak = values[method]
            where = group + (number - 1.5) * width if model != "7b" else group + (0.5 if number else -0.5) * width
            base = values["adamw_compiled"][0]
            if base:
                speed.bar(where, rate / base, width * 0.94, color=colour)
                text = f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:,.0f}k"
                # No wider than its bar: the bars beside it have such a text at about the same height.
                size = 7 if len(text) < 5 else 6
                speed.annotate(
                    text, (where, rate / base), (0, 2), textcoords="offset points", ha="center", fontsize=size
                )
            elif rate:
                note = f"{rate:,.0f} tokens/s;\nAdamW not on\nthis card"
                speed.annotate(note, (where, 0.05), ha="center", va="bottom", fontsize=7, color=colour)
            style = {"color": colour} if rate else {"fill": False, "edgecolor": "0.4", "hatch": "///"}
            memory.bar(where, peak, width * 0.94, label="_" if group else label, **style)
            text = f"{peak:.1f}" if rate else f"{peak:.0f} counted,\nwithout activations"
            memory.annotate(text, (where, peak), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    for axis in (speed, memory):
        axis.set_xticks(range(len(found)), [model.upper() for model in found])
        axis.spines[["top", "right"]].set_visible(False)
    speed.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    speed.set_ylabel("speed, AdamW = 1\n(tokens/s above the bars)")
    speed.set_ylim(0, 1.4)
    memory.set_ylabel("peak memory, GB")
    memory.set_ylim(0, max(peak for values in found.values() for _, peak in values.values()) * 1.25)
    memory.legend(fontsize=8, frameon=False, loc="upper left")
    return figure
