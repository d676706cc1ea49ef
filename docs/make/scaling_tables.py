"""Tables of several GPUs beside one, from scaling.csv."""

from __future__ import annotations

from docs.make.csv_rows import Row, card, count, rows_of
from docs.make.markdown import table

_SETTING = ("model", "method", "micro_batch", "grad_accum", "gpus", "shard", "extra")
SHARDS = ("none", "optimizer", "full")


def newest_of_each() -> list[Row]:
    """The newest row of each setting, by model and then by GPUs, micro-batches an update and mode."""
    found = {tuple(row[name] for name in _SETTING): row for row in rows_of("scaling.csv")}

    def order(row: Row) -> tuple[object, ...]:
        size = float(row["gradient_mb"])
        return size, row["method"], int(row["grad_accum"]) > 1, int(row["gpus"]), SHARDS.index(row["shard"])

    return sorted(found.values(), key=order)


def several_gpus() -> str:
    """Speed and peak memory of every setting beside one GPU."""
    lines = []
    for row in newest_of_each():
        sequences = int(row["micro_batch"]) * int(row["grad_accum"]) * int(row["gpus"])
        mode = f"{row['shard']} {row['extra']}".strip()
        recomputed = ", layers recomputed" if "checkpointing" in row["method"] else ""
        lines.append(
            [f"{row['model'].upper()}{recomputed}", f"{row['micro_batch']} x {row['grad_accum']}, {sequences}",
             f"{row['gpus']} {card(row)}", f"`{mode}`", count(row["tokens_per_second"]),
             f"{float(row['ratio']):.2f}", f"{float(row['ratio_to_slowest']):.2f}", f"{float(row['peak_gb']):.1f}",
             f"{float(row['alone_peak_gb']):.1f}", row["wire_ratio"], row["commit"]]
        )  # fmt: skip
    head = [
        "model",
        "sequences: micro-batch x number, in all",
        "GPUs",
        "`--shard`",
        "tokens/s",
        "x one",
        "x the slowest",
    ]
    return table([*head, "peak GB a GPU", "one GPU", "sent", "commit"], lines)
