"""What a run has come to and how it stands, in the words and figures at the beginning of its report."""

from __future__ import annotations

from peft_pretraining.commands.report_page.recorded_run import RecordedRun
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.curves import RunCurves
from peft_pretraining.reporting.markup import table
from peft_pretraining.reporting.page import Section, paragraph, tiles
from peft_pretraining.reporting.svg import short


def summary_section(run: RecordedRun, curves: RunCurves) -> Section:
    """What the run has come to, and how it stands."""
    last = curves.last_values()
    speeds = sorted(curves.series("throughput/tokens_per_second").y)
    found = {
        "Updates": f"{last.updates:,}" + (f" of {run.total_updates:,}" if run.total_updates else ""),
        "Tokens": None if last.tokens is None else short(last.tokens),
        "Training loss": None if last.train_loss is None else f"{last.train_loss:.4f}",
        "Perplexity": None if last.perplexity is None else f"{last.perplexity:.3f}",
        "Perplexity, official formula": None if last.perplexity_official is None else f"{last.perplexity_official:.3f}",
        "Tokens/s, median": short(speeds[len(speeds) // 2]) if speeds else None,
        "Peak memory": None if last.peak_gb is None else f"{last.peak_gb:.2f} GB",
        "Hours of updates": None if last.hours is None else f"{last.hours:.3g}",
    }
    text = [paragraph(status(run, curves))]
    if curves.damaged:
        text.append(paragraph(f"{curves.damaged} damaged line(s) of metrics.jsonl are left out of this page."))
    if last.perplexity is None:
        text.append(paragraph("The run has not been evaluated yet: --eval_every, or its end, does that."))
    forms = sorted({name.split("/")[0] for name in curves.by_updates if name.startswith("eval_")})
    rows = [
        (form.removeprefix("eval_").replace("_", " "), f"{values[-1]:.3f}")
        for form in forms
        if (values := curves.series(f"{form}/perplexity").y)
    ]
    others = [table(("Other forms of the last weights", "perplexity"), rows, "Averaged weights")] if rows else []
    note = paragraph(
        "The training loss is a running mean at the last update. Perplexity is exp(mean nats a token) of the last "
        "evaluation; the official code's formula averages over batches and divides by one more, as published tables do."
    )
    return Section("summary", "Summary", [*text, tiles([(k, v) for k, v in found.items() if v]), note, *others])


def subtitle(run: RecordedRun) -> str:
    """Model, optimizer, data and length of the run in one line, as far as they are recorded."""
    state = run.state
    if not state:
        return "No checkpoint has recorded the flags of this run."
    parts = []
    try:
        shape = run.shape()
        parts.append(f"{shape.model_type} with {shape.parameter_count() / 1e6:,.1f} M parameters")
    except UserError:
        parts.append(str(run.model_config.get("model_type", "model")))
    parts.append(str(state.get("optimizer", "")))
    if run.flags.get("subspace") and "galore" in str(state.get("optimizer")):
        parts.append(f"rank {state.get('rank')}")
    if state.get("dataset"):
        parts.append(f"on {state['dataset']}")
    parts.append(f"{state.get('total_batch_size')} sequences of {state.get('max_length')} tokens an update")
    return ", ".join(part for part in parts if part)


def status(run: RecordedRun, curves: RunCurves) -> str:
    """A sentence about how the run stands."""
    total, last = run.total_updates, curves.updates
    if total is not None and last >= total:
        return f"The run has made all of its {total:,} updates."
    if run.stopped:
        return f"The run was stopped: {run.stopped}. --continue_from auto goes on from there."
    kept = (
        f"its newest checkpoint is after {max(run.checkpoints):,} updates"
        if run.checkpoints
        else "it has no checkpoint"
    )
    of = f" of {total:,}" if total else ""
    return f"The run has logged {last:,}{of} updates; {kept}. Whether it is still running is not recorded."
