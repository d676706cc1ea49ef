"""The curves of a report: loss, perplexity, learning rates, speed, gradient norm, skipped updates."""

from __future__ import annotations

import bisect
import math

from peft_pretraining.commands.report_page.curve_figures import curve_figure, running
from peft_pretraining.reporting.curves import RunCurves, Series, running_mean
from peft_pretraining.reporting.markup import Markup
from peft_pretraining.reporting.page import Section, paragraph
from peft_pretraining.reporting.svg import Line

_SETTLED = 0.1
"""The axis of the perplexity fits what comes after this part of the run."""
_LISTED = 20
"""Of skipped updates, at most."""


def curves_section(curves: RunCurves) -> Section:
    """Loss, perplexity, learning rates, speed, gradient norm, skipped updates."""
    figures = [_loss(curves), _perplexity(curves), _rates(curves), _speed(curves), _norm(curves), _skipped(curves)]
    found = [each for each in figures if each is not None]
    return Section("curves", "Curves", found or [paragraph("Nothing has been logged that could be drawn.")])


def _loss(curves: RunCurves) -> Markup | None:
    window = curves.default_window()
    lines = running(curves.series("train/loss"), window, f"training, mean of {window:,} update(s)")
    lines.append(Line("evaluation", curves.series("eval/loss"), "b"))
    return curve_figure(
        "loss", "Loss", lines, "nats a token", "In nats a token; the faint line is the loss of each update."
    )


def _perplexity(curves: RunCurves) -> Markup | None:
    train = curves.series("train/loss")
    means = [math.exp(min(mean, 700.0)) for mean in running_mean(*train, curves.default_window())]
    lines = [
        Line("training", Series(train.x, means), "a"),
        Line("evaluation", curves.series("eval/perplexity"), "b"),
        Line("evaluation, official formula", curves.series("eval/perplexity_official"), "c"),
    ]
    text = "Of training it is exp of the running mean of the loss. The axis fits what comes after a tenth of the run."
    return curve_figure("perplexity", "Perplexity", lines, "perplexity", text, settled=_SETTLED)


def _rates(curves: RunCurves) -> Markup | None:
    decoder, others = curves.series("train/lr"), curves.series("train/full_rank_lr")
    lines = [Line("all parameters", decoder, "a")]
    if others.x and others != decoder:
        lines = [
            Line("decoder matrices (--lr)", decoder, "a"),
            Line("embeddings, head, norms (--full_rank_lr)", others, "b"),
        ]
    return curve_figure("rate", "Learning rate", lines, "learning rate", "As the schedule has set it.")


def _speed(curves: RunCurves) -> Markup | None:
    points = curves.series("throughput/tokens_per_second")
    text = "Over all ranks, padding included; without evaluations and checkpoints."
    if utilisation := sorted(curves.series("throughput/mfu").y):
        text += f" Model FLOPs utilisation: {utilisation[len(utilisation) // 2]:.1%} (median)."
    lines = running(points, curves.default_window(), "tokens/s, running mean")
    return curve_figure("speed", "Tokens per second", lines, "tokens/s", text)


def _norm(curves: RunCurves) -> Markup | None:
    points = curves.series("train/grad_norm")
    lines = running(points, curves.default_window(), "gradient norm, running mean")
    text = "Before clipping, as the optimizer has logged it."
    return curve_figure("norm", "Gradient norm", lines, "norm", text, log=bool(points.y) and min(points.y) > 0)


def _skipped(curves: RunCurves) -> Markup | None:
    points = curves.series("train/skipped")
    steps = [int(step) for step, value in zip(*points, strict=True) if value]
    if not steps:
        text = f"No update of the {len(points.x):,} that were logged was skipped."
        return paragraph(text) if points.x else None
    counts = Series(points.x, [float(bisect.bisect_right(steps, step)) for step in points.x])
    listed = ", ".join(f"{step:,}" for step in steps[:_LISTED]) + (" and more" if len(steps) > _LISTED else "")
    text = f"Their loss or gradient was not finite, and they changed nothing: {listed}."
    return curve_figure("skipped", "Skipped updates", [Line("skipped so far", counts, "b")], "updates", text)
