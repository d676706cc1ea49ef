"""Tables of speed and peak memory, from compare.csv."""

from __future__ import annotations

import re

from benchmarks.models import config_path
from docs.make.csv_rows import Row, card, count, is_alone, newest, rows_of
from docs.make.markdown import table
from peft_pretraining.models.registry import read_config
from qgalore.update.newton_schulz import AUTO, method_of

MODELS = ("60m", "130m", "350m", "1b")
METHODS = {
    "adamw_compiled": "AdamW, bfloat16, compiled",
    "q_galore": "Q-GaLore",
    "q_galore_int8_activations": "Q-GaLore, `--int8_activations`",
    "q_galore_int8_activations_checkpointing12": "the same, every twelfth layer recomputed",
    "q_galore_checkpointing": "Q-GaLore, every layer recomputed",
}
_RECIPES = {
    "q_galore_full_rank": "the default, `--recipe full_rank`",
    "q_galore_orthogonal": "`--recipe orthogonal`",
    "q_galore_fp8": "Q-GaLore, `--fp8_products`",
}
_OTHERS = {
    "adamw_compiled": "AdamW, bfloat16, compiled",
    "adam8bit_bitsandbytes": "bitsandbytes 8-bit Adam",
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "q_galore_torch": "q-galore-torch",
    "q_galore_torch_per_layer_checkpointing": "q-galore-torch, per layer, every layer recomputed",
}


def comparison(model: str) -> dict[str, Row]:
    """Of a model the newest rows beside an AdamW of the same commit, by method, of a machine that did nothing else."""
    rows = rows_of("compare.csv")
    line = newest(rows, lambda row: row["method"] == "adamw_compiled" and row["model"] == model and _compared(row))
    if line is None:
        return {}
    found = {"adamw_compiled": line}
    for method in METHODS:
        ours = newest(rows, lambda row, m=method: _is_beside(row, line, m))  # type: ignore[misc]
        found |= {method: ours} if ours else {}
    return found


def _compared(row: Row) -> bool:
    """Whether an AdamW has rows of Q-GaLore beside it."""
    return is_alone(row) and bool(row["in_a_row_tokens_per_second"]) and any(
        _is_beside(other, row, "q_galore") for other in rows_of("compare.csv")
    )  # fmt: skip


def _is_beside(row: Row, line: Row, method: str) -> bool:
    same = ("model", "commit", "device", "micro_batch", "grad_accum", "length", "cap_gib")
    return row["method"] == method and all(row[name] == line[name] for name in same) and is_alone(row)


def beside_adamw() -> str:
    """Every model and method beside AdamW."""
    lines = []
    for model in MODELS:
        found = comparison(model)
        for method, row in found.items():
            speed, peak = float(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])
            theirs = found["adamw_compiled"]
            ratio = speed / float(theirs["in_a_row_tokens_per_second"])
            waits = float(row["tokens_per_second"]) / float(theirs["tokens_per_second"])
            share = peak / float(theirs["run_peak_gb"])
            lines.append(
                [f"{model.upper()}, {row['micro_batch']}", METHODS[method], count(str(speed)), f"{ratio:.2f}",
                 f"{waits:.2f}", f"{peak:.2f}", f"{share:.2f}", f"{float(row['run_reserved_gb']):.1f}", row["commit"]]
            )  # fmt: skip
    head = [
        "model, micro-batch",
        "method",
        "tokens/s",
        "x AdamW",
        "x with waits",
        "peak GB",
        "x AdamW",
        "reserved GB",
        "commit",
    ]
    return table(head, lines)


def newest_pair(method: str, model: str) -> tuple[Row, Row] | None:
    """The newest row of a method with updates in a row, and AdamW's of that commit and machine; None without one."""
    rows = [row for row in rows_of("compare.csv") if row["model"] == model and not row["error"]]
    for row in reversed(rows):
        if row["method"] == method and row["in_a_row_tokens_per_second"] and _has_steps_of_the_recipe(row):
            same = {name: row[name] for name in ("commit", "device", "micro_batch", "note")} | {
                "method": "adamw_compiled"
            }
            for other in rows:
                if same.items() <= other.items():
                    return row, other
    return None


_BEFORE_FLAG = "muon"
"""The steps of rows without the flag."""


def _has_steps_of_the_recipe(row: Row) -> bool:
    """Whether momenta were orthogonalised as the recipe full_rank does it, which had Muon's steps before `auto`."""
    if row["method"] != "q_galore_full_rank":
        return True
    rows = min(map(min, read_config(config_path(row["model"])).matrix_shapes().values()))
    steps = [_BEFORE_FLAG, *re.findall(r"--newton_schulz (\w+)", row["flags"])][-1]
    return steps == AUTO or method_of(steps, rows, lambda _: True) == method_of(AUTO, rows, lambda _: True)


def beside_adamw_of_its_call() -> str:
    """The recipes with orthogonalised momenta, and products in FP8, beside AdamW: the newest rows of any card."""
    lines = []
    for model in MODELS:
        for method, label in _RECIPES.items():
            if pair := newest_pair(method, model):
                row, theirs = pair
                speed, peak = float(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])
                adamw = float(theirs["in_a_row_tokens_per_second"])
                lines.append(
                    [f"{model.upper()}, {row['micro_batch']}", label, count(str(speed)), f"{speed / adamw:.2f}",
                     f"{peak:.2f}", f"{peak / float(theirs['run_peak_gb']):.2f}", card(row), row["commit"]]
                )  # fmt: skip
    head = ["model, micro-batch", "method", "tokens/s", "x AdamW", "peak GB", "x AdamW", "card", "commit"]
    return table(head, lines)


def other_projects() -> str:
    """Optimizers of other projects at 60M, and Q-GaLore beside its own AdamW."""
    rows = rows_of("compare.csv")
    theirs = newest(rows, lambda row: row["method"] == "galore_torch" and bool(row["in_a_row_tokens_per_second"]))
    if theirs is None:
        return "Not measured."
    lines = []
    for method, label in _OTHERS.items():
        row = newest(rows, lambda row, m=method: _is_beside(row, theirs, m))  # type: ignore[misc]
        if row:
            lines.append(_line(label, row, float(rows_named(theirs, "adamw_compiled")["in_a_row_tokens_per_second"])))
    found = comparison(theirs["model"])
    lines.append(
        _line("Q-GaLore, here", found["q_galore"], float(found["adamw_compiled"]["in_a_row_tokens_per_second"]))
    )
    return table(["optimizer", "tokens/s", "x AdamW of its commit", "peak GB", "commit"], lines)


def rows_named(beside: Row, method: str) -> Row:
    """The row of a method beside another row. Raises ValueError if there is none."""
    row = newest(rows_of("compare.csv"), lambda row: _is_beside(row, beside, method))
    if row is None:
        raise ValueError(f"no row of {method} beside {beside['method']} of {beside['commit']}")
    return row


def _line(label: str, row: Row, adamw: float) -> list[str]:
    speed = float(row["in_a_row_tokens_per_second"])
    return [label, count(str(speed)), f"{speed / adamw:.2f}", f"{float(row['run_peak_gb']):.1f}", row["commit"]]


def large_models() -> str:
    """7B and 13B: of each setting the newest row with updates in a row."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows_of("compare.csv"):
        if row["model"] in ("7b", "13b") and row["tokens_per_second"] and not row["error"]:
            found[
                tuple(row[name] for name in ("model", "method", "micro_batch", "grad_accum", "cap_gib"))
                + _products(row)
            ] = row
    lines = [
        [row["model"].upper(), row["method"].replace("_", " "),
         f"{row['grad_accum']} x {row['micro_batch']} x {row['length']}",
         "".join(_products(row)).upper(), count(row["in_a_row_tokens_per_second"] or row["tokens_per_second"]),
         f"{float(row['run_peak_gb'] or row['peak_gb']):.2f}", f"{row['cap_gib']} GiB" if row["cap_gib"] else "none",
         card(row), row["commit"]]
        for row in found.values()
    ]  # fmt: skip
    head = ["model", "method", "an update", "products", "tokens/s", "peak GB", "memory capped to", "card", "commit"]
    return table(head, sorted(lines, key=lambda line: (len(line[0]), line[:4])))


def _products(row: Row) -> tuple[str, ...]:
    return tuple(name for name in ("int8", "fp8") if f"--{name}_products" in row["flags"])
