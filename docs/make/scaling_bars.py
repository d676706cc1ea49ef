"""Bars of 7B on several GPUs beside one: speed, and peak memory of each."""

from __future__ import annotations

from typing import Any

from docs.make.csv_rows import Row, rows_of
from docs.make.scaling_tables import SHARDS

_COLOURS = {"none": "C0", "optimizer": "C2", "full": "C1"}
_LABELS = {
    "none": "--shard none: replicas",
    "optimizer": "--shard optimizer",
    "full": "--shard full",
}


def figures() -> dict[str, Any]:
    """By number of GPUs and mode [speed over one GPU's, GB a GPU], of an update of one micro-batch; and GB of one."""
    found: dict[str, dict[str, list[float]]] = {}
    alone = 0.0
    for row in rows_of("scaling.csv"):
        if _is_drawn(row):
            values = [float(row["ratio"]), float(row["peak_gb"])]
            found.setdefault(row["gpus"], {})[row["shard"]] = values
            alone = float(row["alone_peak_gb"])
    return {"gpus": {gpus: found[gpus] for gpus in sorted(found, key=int)}, "alone": alone}


def _is_drawn(row: Row) -> bool:
    of_7b = (row["model"], row["method"], row["micro_batch"], row["grad_accum"], row["extra"])
    return of_7b == ("7b", "q_galore_checkpointing", "16", "1", "") and "H200" in row["device"]


def draw(found: dict[str, Any]) -> Any:
    """Two panels side by side: speed as a multiple of one GPU's, and peak memory of a GPU."""
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(8.5, 3.0), layout="constrained")
    width, numbers = 0.25, list(found["gpus"])
    for group, gpus in enumerate(numbers):
        for number, shard in enumerate(SHARDS):
            if shard not in found["gpus"][gpus]:
                continue
            for axis, value, text in zip(
                (speed, memory), found["gpus"][gpus][shard], ("{:.2f}", "{:.1f}"), strict=True
            ):
                where = group + (number - 1) * width
                axis.bar(where, value, width * 0.94, color=_COLOURS[shard], label="_" if group else _LABELS[shard])
                style = {"ha": "center", "fontsize": 8, "color": "white"}
                axis.annotate(text.format(value), (where, value), (0, -11), textcoords="offset points", **style)
        speed.plot([group - 0.45, group + 0.45], [int(gpus)] * 2, color="0.3", linewidth=0.8, linestyle=":")
    memory.axhline(found["alone"], color="0.3", linewidth=0.8, linestyle=":")
    memory.annotate("one GPU", (len(numbers) - 0.55, found["alone"]), (0, -9), textcoords="offset points", fontsize=8)
    for axis in (speed, memory):
        axis.set_xticks(range(len(numbers)), [f"{gpus} GPUs" for gpus in numbers])
        axis.spines[["top", "right"]].set_visible(False)
    speed.set_ylabel("speed, one GPU = 1")
    speed.set_ylim(0, 1.25 * max(map(int, numbers)))
    speed.legend(fontsize=8, frameon=False, loc="upper left")
    memory.set_ylabel("peak memory of a GPU, GB")
    memory.set_ylim(0, 1.25 * found["alone"])
    return figure
