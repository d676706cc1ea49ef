"""Tables of planned and measured memory, from memory.csv and from the plan."""

from __future__ import annotations

from functools import cache

from docs.make.csv_rows import Row, card, newest, rows_of
from docs.make.markdown import table
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import MemoryPlan, plan
from peft_pretraining.models.registry import read_config

FLAGS_OF_7B = (
    "--model_config configs/llama_7b.json --device cuda --optimizer q_galore_adamw8bit_per_layer --recipe paper "
    "--subspace streaming --update_proj_gap 200 --rank 1024 --galore_scale 0.25 --batch_size 16 --total_batch_size 512 "
    "--max_length 256 --grad_accum_dtype int8 --activation_checkpointing"
)
"""The setting of 7B that was measured with its memory capped."""


@cache
def plan_of_7b() -> MemoryPlan:
    """The plan of 7B on a GPU."""
    args = parse_args(FLAGS_OF_7B.split())
    return plan(args, read_config(args.model.model_config))


def measured_7b() -> Row | None:
    """The newest row of that setting, with its memory capped."""
    wanted = {"model": "7b", "method": "q_galore_checkpointing", "micro_batch": "16", "grad_accum": "32"}
    return newest(
        rows_of("compare.csv"),
        lambda row: (
            all(row[name] == value for name, value in wanted.items()) and bool(row["cap_gib"]) and not row["error"]
        ),
    )


def components_of_7b() -> dict[str, float]:
    """What the peak of 7B is made of, in GB, by component."""
    made = plan_of_7b()
    largest = max(made.passing, key=lambda name: made.passing[name])
    parts = {**made.lasting, **made.overhead, f"{largest} (the largest phase)": made.passing[largest]}
    return {name: size / 1e9 for name, size in parts.items() if size}


def parts_of_7b() -> str:
    """The components of the peak as a table."""
    parts = components_of_7b()
    lines = [[name, f"{size:.3f}"] for name, size in parts.items()]
    lines.append(["**planned peak**", f"**{sum(parts.values()):.3f}**"])
    row = measured_7b()
    if row:
        capped = f"measured on an {card(row)} capped to {row['cap_gib']} GiB, commit {row['commit']}"
        lines.append([capped, f"{float(row['run_peak_gb']):.3f}"])
    return table(["component", "GB"], lines)


def planned_and_measured() -> str:
    """Every row of memory.csv, the newest of each setting."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows_of("memory.csv"):
        if not row["error"]:
            found[tuple(row[name] for name in ("model", "micro_batch", "grad_accum", "checkpointing", "flags"))] = row
    lines = [
        [row["model"].upper(), f"{row['grad_accum']} x {row['micro_batch']}", row["rank"],
         "every layer" if row["checkpointing"] == "True" else "none", row["planned_peak_gb"], row["run_peak_gb"],
         f"{100 * (float(row['run_peak_gb']) / float(row['planned_peak_gb']) - 1):+.1f} %", card(row), row["commit"]]
        for row in found.values()
    ]  # fmt: skip
    head = ["model", "an update", "rank", "recomputed", "planned GB", "measured GB", "difference", "card", "commit"]
    return table(head, lines)
