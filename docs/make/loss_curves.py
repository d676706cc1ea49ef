"""Loss curves of three methods with several seeds, from loss_curves.csv."""

from __future__ import annotations

from typing import Any

from docs.make.csv_rows import rows_of

_METHODS = {
    "adamw": ("AdamW, rates not tuned for this model", "0.55"),
    "paper": ("Q-GaLore, --recipe paper", "C0"),
    "recipe": ("Q-GaLore, --recipe orthogonal", "C3"),
}


def figures() -> dict[str, Any]:
    """By method, seed and split the pairs of update and loss."""
    found: dict[str, Any] = {}
    for row in rows_of("loss_curves.csv"):
        curve = found.setdefault(row["method"], {}).setdefault(row["seed"], {}).setdefault(row["split"], [])
        curve.append([int(row["update"]), float(row["loss"])])
    return found


def draw(found: dict[str, Any]) -> Any:
    """A line a seed, with a point for each evaluation."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for method, (label, colour) in _METHODS.items():
        label += f": {len(found.get(method, {}))} seeds"
        for number, curves in enumerate(found.get(method, {}).values()):
            axis.plot(*zip(*curves["train"], strict=True), color=colour, linewidth=0.9, label="_" if number else label)
            axis.plot(*zip(*curves["eval"], strict=True), "o", color=colour, markersize=4)
    axis.plot([], [], "ok", markersize=4, label="held-out text")
    axis.set_ylim(4.7, 9)
    axis.set_xlabel("updates of 1,024 tokens")
    axis.set_ylabel("loss, nats a token (mean of 5 updates)")
    axis.set_title("LLaMA-9M on Python's documentation, on a CPU; a line a seed", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
