"""The page of the metrics of a run, from the table in `peft_pretraining.reporting.metric_names`."""

from __future__ import annotations

from docs.make.markdown import sections, table
from peft_pretraining.reporting.metric_names import METRICS

_INTRODUCTION = """# Metrics of a run

`metrics.jsonl` in a run's folder has a JSON object a line, with `update_step` (updates made, from 1) and the
metrics of an update or of an evaluation. Values that are not finite are `null`. wandb and `--tensorboard` get
the same names. `qgalore plot` and `qgalore report` read this file.

Two equal runs have equal lines, but for names that begin with `throughput/`, `memory/`, `data/` and `time/`,
which are measured. `--log_every N` writes one update in N."""


def page() -> str:
    """The text of the page."""
    rows = [[f"`{name}`", each.unit, each.meaning, each.when] for name, each in METRICS.items()]
    return sections(_INTRODUCTION, table(["metric", "unit", "meaning", "lines"], rows))
