"""Figures that the papers publish, each with its source, for `benchmarks/tables.py` to stand beside ours.

Gigabytes and megabytes are of weights and optimizer states by the papers' count, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Q_GALORE = "arXiv 2407.08296"
"""Q-GaLore, version 1. Its rows of AdamW, low rank, LoRA, ReLoRA and GaLore are those of GaLore's paper."""
GALORE = "arXiv 2403.03507"
OFFICIAL = "README of the official code of arXiv 2407.08296"


class Figure(NamedTuple):
    """A cell of the pretraining table."""

    perplexity: float
    gigabytes: float
    source: str


def _pretraining() -> dict[tuple[str, str], Figure]:
    by_method = {
        "full": ((34.06, 0.36), (25.08, 0.76), (18.80, 2.06), (15.56, 7.80)),
        "low_rank": ((78.18, 0.26), (45.51, 0.54), (37.41, 1.08), (142.53, 3.57)),
        "lora": ((34.99, 0.36), (33.92, 0.80), (25.58, 1.76), (19.21, 6.17)),
        "relora": ((37.04, 0.36), (29.37, 0.80), (29.08, 1.76), (18.33, 6.17)),
        "galore": ((34.88, 0.24), (25.36, 0.52), (18.95, 1.22), (15.64, 4.38)),
        "q_galore": ((34.88, 0.18), (25.53, 0.39), (19.79, 0.88), (16.25, 3.08)),
    }
    sizes = ("60m", "130m", "350m", "1b")
    found = {
        (method, size): Figure(*cell, f"{Q_GALORE}, pretraining of 60M to 1B on C4")
        for method, cells in by_method.items()
        for size, cell in zip(sizes, cells, strict=True)
    }
    of_7b = {"full": (18.09, 26.0), "galore": (17.94, 18.0), "q_galore": (18.83, 15.0)}
    source = f"{Q_GALORE}, pretraining of 7B after 40,000 of 150,000 updates; full is 8-bit Adam, GaLore in 8 bits"
    return found | {(method, "7b"): Figure(*cell, source) for method, cell in of_7b.items()}


PRETRAINING: Mapping[tuple[str, str], Figure] = _pretraining()
"""By (method, model)."""

PEAK_GB: Mapping[tuple[str, str], tuple[float, str]] = {
    ("q_galore", "7b"): (15.26, f"{OFFICIAL}: one GPU, micro-batch 16, activation checkpointing"),
    ("galore", "7b"): (22.02, f"{OFFICIAL}: one GPU, micro-batch 16, activation checkpointing, 8-bit GaLore"),
}
"""Measured peaks by (method, model); without optimizer states of embeddings, head and norms, which that code does not
train where it updates inside the backward pass."""

SPEED_AGAINST_GALORE: Mapping[str, tuple[float, str]] = {"q_galore": (1 - 0.1464, f"{Q_GALORE}: throughput")}
"""Tokens a second as a share of GaLore's."""

NEAREST_ROUNDING: Mapping[str, tuple[float, str]] = {
    "60m": (7.86, f"{Q_GALORE}: without stochastic rounding"),
    "130m": (1.98, f"{Q_GALORE}: without stochastic rounding"),
    "350m": (2.27, f"{Q_GALORE}: without stochastic rounding"),
}
"""By how much perplexity grows where updated weights are rounded to the nearest, by model."""

SVDS_KEPT = (0.362, f"{Q_GALORE}: SVD calls that the lazy schedule keeps of those at a fixed interval")

GLUE_TASKS = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")
GLUE: Mapping[str, tuple[float, ...]] = {
    "full": (62.24, 90.92, 91.30, 79.42, 94.57, 87.18, 92.33, 92.28, 86.28),
    "lora": (60.06, 90.82, 92.01, 79.78, 94.38, 87.17, 92.20, 91.11, 85.94),
    "galore": (61.83, 90.80, 91.90, 79.06, 93.46, 86.94, 92.25, 91.22, 85.93),
    "qlora": (60.16, 89.93, 91.87, 71.84, 93.92, 86.57, 92.29, 91.17, 84.72),
    "q_galore": (61.60, 90.23, 91.96, 79.06, 94.38, 86.73, 92.44, 90.91, 85.91),
}
"""RoBERTa-base: the scores of `GLUE_TASKS` in per cent, then their average, by method."""
GLUE_MB: Mapping[str, float] = {"full": 747, "lora": 264, "galore": 257, "qlora": 183, "q_galore": 176}
GLUE_SOURCE = (
    f"{Q_GALORE}, fine-tuning RoBERTa-base on GLUE (the rows of LoRA and GaLore stand the other way round in {GALORE})"
)

MMLU_PARTS = ("stem", "social", "humanities", "other")
MMLU: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("full", "llama-3-8b"): (54.27, 75.66, 59.08, 72.80, 64.85),
    ("lora", "llama-3-8b"): (53.00, 74.85, 58.97, 72.34, 64.25),
    ("galore", "llama-3-8b"): (54.40, 75.56, 58.35, 71.19, 64.24),
    ("qlora", "llama-3-8b"): (53.63, 73.44, 58.59, 71.62, 63.79),
    ("q_galore", "llama-3-8b"): (53.27, 75.37, 58.57, 71.96, 64.20),
    ("full", "gemma-7b"): (30.03, 37.16, 34.08, 35.47, 34.21),
    ("lora", "gemma-7b"): (26.23, 34.94, 30.88, 36.96, 32.18),
    ("galore", "gemma-7b"): (27.33, 36.74, 30.82, 37.90, 33.20),
    ("qlora", "gemma-7b"): (24.83, 27.54, 28.09, 33.40, 28.49),
    ("q_galore", "gemma-7b"): (27.73, 36.80, 32.54, 37.89, 33.68),
    ("full", "mistral-7b"): (52.40, 72.95, 55.16, 69.05, 61.67),
    ("lora", "mistral-7b"): (52.13, 72.46, 55.05, 68.77, 61.41),
    ("galore", "mistral-7b"): (51.50, 73.02, 55.03, 69.49, 61.55),
    ("qlora", "mistral-7b"): (50.00, 71.29, 55.84, 67.66, 60.70),
    ("q_galore", "mistral-7b"): (52.23, 72.82, 55.01, 69.30, 61.62),
}
"""The accuracies of `MMLU_PARTS` in per cent, then the average, by (method, model)."""
MMLU_GB: Mapping[str, float] = {"full": 48, "lora": 16, "galore": 16, "qlora": 8, "q_galore": 8}
"""Of LLaMA-3-8B."""
MMLU_SOURCE = f"{Q_GALORE}, fine-tuning LLaMA-3-8B, Gemma-7B and Mistral-7B for MMLU, 5 shots"
