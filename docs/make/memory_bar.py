"""The peak memory of 7B as a stacked bar, beside that of AdamW by the plan."""

from __future__ import annotations

from typing import Any

from docs.make.memory_tables import components_of_7b, measured_7b
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.registry import read_config

_ADAMW = (
    "--model_config configs/llama_7b.json --device cuda --optimizer adamw --batch_size 16 --total_batch_size 512 "
    "--max_length 256 --activation_checkpointing --grad_accum_dtype float32"
)
_COLOURS = {
    "decoder weights": "C0",
    "embeddings, head, norms": "C9",
    "projections": "C4",
    "optimizer states, decoder": "C1",
    "optimizer states, embeddings, head, norms": "#ffbb78",
    "gradients": "C3",
    "for refreshes of subspaces (at most)": "C6",
    "workspaces of cuBLAS": "0.5",
    "passing": "C2",
}


def figures() -> dict[str, Any]:
    """GB by component of both, and what was measured."""
    row = measured_7b()
    args = parse_args(_ADAMW.split())
    made = plan(args, read_config(args.model.model_config))
    theirs = {name: size / 1e9 for name, size in (made.lasting | made.overhead).items() if size}
    largest = max(made.passing, key=lambda name: made.passing[name])
    theirs[f"{largest} (the largest phase)"] = made.passing[largest] / 1e9
    bars = {"--optimizer adamw": theirs, "Q-GaLore": components_of_7b()}
    rounded = {label: {name: round(size, 4) for name, size in parts.items()} for label, parts in bars.items()}
    return {"bars": rounded, "measured": float(row["run_peak_gb"]) if row else None}


def draw(found: dict[str, Any]) -> Any:
    """Two horizontal bars, and below them that of Q-GaLore drawn larger, with its parts in a legend."""
    from matplotlib import pyplot

    figure, (both, ours) = pyplot.subplots(2, 1, figsize=(8.5, 4), layout="constrained", height_ratios=[1.3, 1])
    for label, parts in found["bars"].items():
        _stack(both, label, parts)
        total = sum(parts.values())
        both.annotate(f"{total:.1f} GB", (total, label), (4, 0), textcoords="offset points", va="center")
    both.set_xlim(0, 1.1 * max(sum(parts.values()) for parts in found["bars"].values()))
    both.set_title("LLaMA-7B, 512 sequences of 256 in 32 micro-batches, layers recomputed: planned peak", fontsize=9)
    parts = found["bars"]["Q-GaLore"]
    _stack(ours, "Q-GaLore", parts)
    if found["measured"]:
        ours.axvline(
            found["measured"], color="black", linewidth=1, linestyle="--", label=f"measured: {found['measured']:.2f}"
        )
    ours.set_xlim(0, 1.1 * sum(parts.values()))
    ours.set_xlabel("GB (10^9 bytes)")
    ours.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.45))
    for axis in (both, ours):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    return figure


def _stack(axis: Any, label: str, parts: dict[str, float]) -> None:
    begin = 0.0
    for name, size in parts.items():
        colour = _COLOURS.get(name, _COLOURS["passing"])
        axis.barh(label, size, 0.8, begin, color=colour, edgecolor="white", linewidth=0.7, label=f"{name}: {size:.2f}")
        begin += size
