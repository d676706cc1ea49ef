"""Draw the metrics of runs as a picture: one run with its learning rate and subspaces, or several in one comparison.

    qgalore plot RUN                       curves.png in the run's folder
    qgalore plot RUN RUN ... --by tokens   comparison.png here

A table of what each run has come to is printed, too. Similarities are shown where the run refreshed subspaces: 1 means
that a refresh found the same subspace again.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.commands.corrected_flags import CommandParser
from peft_pretraining.config.flags import parse_path
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.curves import (
    X_AXES,
    LastValues,
    RunCurves,
    Series,
    distinct_labels,
    read_curves,
    running_mean,
    thinned,
)
from peft_pretraining.reporting.similarity import rows_of_kinds, similarity_layers, similarity_map

METRICS = ("loss", "perplexity", "train_loss", "train_perplexity", "eval_loss", "eval_perplexity")
_POINTS = 4000
"""Of a curve, at most; more than a picture has columns."""
_SETTLED = 0.1
"""The y-axis fits what comes after this part of the x-axis: a loss falls from 10 at first."""
_INSIDE = 5
"""A legend of more runs is beside the picture."""


@dataclass(frozen=True)
class Style:
    """What is drawn of each run, and how."""

    metric: str = "loss"
    by: str = "updates"
    smooth: int = 0
    """Updates of the running mean; 0: a part of the run."""
    log: bool = False
    log_x: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of train and eval, what is drawn."""
        first, _, rest = self.metric.partition("_")
        return (first,) if rest else ("train", "eval")

    @property
    def is_perplexity(self) -> bool:
        """Whether losses are drawn as exp(loss)."""
        return self.metric.endswith("perplexity")

    def scaled(self, losses: Sequence[float]) -> list[float]:
        """Losses in what is drawn."""
        return [math.exp(min(loss, 700.0)) for loss in losses] if self.is_perplexity else list(losses)

    def window(self, curves: RunCurves) -> int:
        """Updates of the running mean of a run."""
        return self.smooth or curves.default_window()

    def train(self, curves: RunCurves) -> Series:
        """The running mean of the training loss; of perplexities the geometric one."""
        losses = curves.series("train/loss")
        steps, means = thinned(losses.x, running_mean(losses.x, losses.y, self.window(curves)), _POINTS)
        return Series([curves.position(step, self.by) for step in steps], self.scaled(means))

    def eval(self, curves: RunCurves) -> Series:
        """The loss of each evaluation."""
        losses = curves.series("eval/loss", self.by)
        return thinned(losses.x, self.scaled(losses.y), _POINTS)


# ---- what is drawn


def draw_curves(axes: Any, runs: dict[str, RunCurves], style: Style) -> None:
    """Draw the training curve of each run as a line, and its evaluations as points, in a colour of its own."""
    alone, drawn = len(runs) == 1, list[Series]()
    for number, (name, curves) in enumerate(runs.items()):
        label = _literal(name)
        look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
        if "train" in style.kinds:
            if alone:
                raw = curves.series("train/loss", style.by)
                axes.plot(*thinned(raw.x, style.scaled(raw.y), _POINTS), color="C0", alpha=0.25, linewidth=0.8)
            width = style.window(curves)
            text = f"train (mean of {width} update{'s' if width > 1 else ''})" if alone else label
            drawn.append(style.train(curves))
            axes.plot(*drawn[-1], **look, linewidth=1.5, label=text)
        if "eval" in style.kinds:
            drawn.append(points := style.eval(curves))
            color = "C3" if alone else look["color"]
            text, only = "evaluation" if alone else label, style.kinds == ("eval",)
            form: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": "white"}
            line = look["linestyle"] if alone or only else "none"
            if points.x:
                axes.plot(*points, **form, linestyle=line, color=color, label=text if alone or only else None)
            if points.x and alone:
                _annotate(axes, points, curves.last_values())
    if not any(points.x for points in drawn):
        kinds = " or ".join({"train": "a finite training loss", "eval": "an evaluation"}[kind] for kind in style.kinds)
        other = "another --metric" if len(style.kinds) == 1 else "runs that have"
        raise UserError(f"--metric {style.metric}: no run has {kinds} yet; give {other}")
    _scale(axes, style, [points for points in drawn if points.x])


def _literal(name: str) -> str:
    """A name as matplotlib shows it: $ would begin a formula, and a label that begins with _ has no legend."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def _annotate(axes: Any, points: Series, last: LastValues) -> None:
    text = f"perplexity {last.perplexity:.2f}" if last.perplexity is not None else ""
    axes.annotate(
        text, (points.x[-1], points.y[-1]), xytext=(-6, 10), textcoords="offset points", ha="right", color="C3"
    )


def _scale(axes: Any, style: Style, drawn: list[Series]) -> None:
    """Set scales, the labels of the axes and the grid."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    what = " and ".join({"train": "training", "eval": "evaluation"}[kind] for kind in style.kinds)
    unit = "perplexity" if style.is_perplexity else "loss (nats a token)"
    axes.set(ylabel=f"{what} {unit}", xlabel=X_AXES[style.by])
    if style.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        settled = [y for x, ys in drawn for at, y in zip(x, ys, strict=True) if at >= _SETTLED * x[-1]]
        low, high = min(settled), max(settled)
        margin = 0.15 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    end = max(points.x[-1] for points in drawn)
    if style.log_x:
        axes.set_xscale("log")
    elif end:
        axes.set_xlim(0, 1.01 * end)
    if style.by == "tokens" or style.log_x:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def add_legend(axes: Any, runs: dict[str, RunCurves], style: Style) -> None:
    """Name the runs, beside the picture if they are many, and say what a line and what a point is."""
    if len(runs) == 1:
        axes.legend()
        return
    handles, labels = axes.get_legend_handles_labels()
    if len(style.kinds) == 2:
        (line,) = axes.plot([], [], color="0.4", linewidth=1.5)
        (point,) = axes.plot([], [], "o", color="0.4", markersize=5)
        handles, labels = [*handles, line, point], [*labels, "training, running mean", "evaluation"]
    if len(runs) > _INSIDE:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        axes.legend(handles, labels, **beside)
    else:
        axes.legend(handles, labels, loc="upper right")


def draw_learning_rate(axes: Any, curves: RunCurves, style: Style) -> None:
    """Draw the learning rate."""
    axes.plot(*curves.series("train/lr", style.by), color="C2")
    axes.set(ylabel="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.grid(alpha=0.3)


def draw_similarity(figure: Any, axes: Any, curves: RunCurves, style: Style) -> None:
    """Draw a row for each matrix, grouped by kind and ordered by depth; time is the x-axis."""
    import numpy as np

    layers = similarity_layers(curves)
    table = np.array(similarity_map(curves, layers, style.by), dtype=float)  # None becomes nan
    extent = (0, curves.position(curves.updates, style.by), len(layers), 0)
    image = axes.imshow(
        table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1, extent=extent
    )  # fmt: skip
    axes.set_facecolor("0.9")
    kinds = rows_of_kinds(layers)
    axes.set_yticks([(start + end) / 2 for _, start, end in kinds], [kind for kind, _, _ in kinds])
    for _, start, _ in kinds[1:]:
        axes.axhline(start, color="white", linewidth=1)
    axes.set(title="Similarity of successive subspaces (rows: matrices by kind and depth; grey: no refresh)")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)


def draw(runs: dict[str, RunCurves], style: Style, output: Path) -> None:
    """Draw runs, by their labels, into a picture. Raises UserError for what cannot be drawn or written."""
    plt = _pyplot()
    panels = [3.0]
    (alone,) = runs.values() if len(runs) == 1 else (None,)
    if alone is not None:
        layers = similarity_layers(alone)
        panels += [1.2] + ([max(2.0, min(5.0, 0.12 * len(layers)))] if layers else [])
    width = 10 if len(runs) <= _INSIDE else 12.5
    size = (width, 1.8 * sum(panels) + 0.4)
    figure, grid = plt.subplots(
        len(panels), 1, figsize=size, height_ratios=panels, layout="constrained", squeeze=False
    )  # fmt: skip
    axes = grid[:, 0]
    try:
        draw_curves(axes[0], runs, style)
        add_legend(axes[0], runs, style)
        if alone is not None:
            draw_learning_rate(axes[1], alone, style)
            axes[1].sharex(axes[0])
            if len(panels) == 3:
                draw_similarity(figure, axes[2], alone, style)
            axes[0].set_xlabel("")
            axes[-1].set_xlabel(X_AXES[style.by])
        figure.suptitle(_literal(next(iter(runs))) if alone is not None else f"{len(runs)} runs")
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--output {output} cannot be written ({reason}): give a file.png in a folder") from error
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install 'qgalore[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---- the table


def table(runs: dict[str, RunCurves], smooth: int = 0) -> str:
    """What each run has come to, as aligned text; - where it has no such metric."""
    rows = [["run", "updates", "tokens", "train loss", "eval perplexity", "official formula", "peak memory", "hours"]]
    for label, curves in runs.items():
        last = curves.last_values(smooth)
        values = {
            "{:,.0f}": last.tokens, "{:.4f}": last.train_loss, "{:.3f}": last.perplexity,
            "{:.3f} ": last.perplexity_official, "{:.2f} GB": last.peak_gb, "{:.3g}": last.hours,
        }  # fmt: skip
        cells = ["-" if value is None else form.format(value).strip() for form, value in values.items()]
        rows.append([label, f"{last.updates:,}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def remarks(runs: dict[str, RunCurves]) -> list[str]:
    """Sentences about what a table or picture does not show of these runs."""
    found = _of_tokenizers(runs)
    for label, curves in runs.items():
        if curves.damaged:
            number = f"{curves.damaged} lines of its metrics.jsonl are" if curves.damaged > 1 else "a line is"
            found.append(f"{label}: {number} damaged and left out")
        if not any("eval/loss" in line for line in curves.lines):
            found.append(f"{label}: no evaluation yet (--eval_every of run_pretrain.py, or its end)")
    return found


def _of_tokenizers(runs: dict[str, RunCurves]) -> list[str]:
    """A sentence if runs are known to have different tokenizers."""
    from peft_pretraining.models.source_tokenizer import fingerprint, tokenizer_of_run

    names = {label: name for label, curves in runs.items() if (name := tokenizer_of_run(curves.save_dir))}
    first: dict[str, str] = {}
    for label, name in names.items():
        first.setdefault(fingerprint(name), f"{label} has {name}")
    if len(first) < 2:
        return []
    return [
        f"tokenizers differ: {', '.join(first.values())}. Losses and perplexities are of a token, so that those of one "
        "tokenizer cannot be compared with another's; bits a byte can, which qgalore evaluate RUN prints"
    ]


# ---- the command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
        prog="qgalore plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=parse_path, help="folder of a run (its --save_dir)")
    parser.add_argument("--metric", choices=METRICS, default="loss", help="of training and evaluation, or one alone")
    parser.add_argument("--by", choices=tuple(X_AXES), default="updates", help="the x-axis; hours: those of updates")
    parser.add_argument("--log", action="store_true", help="logarithmic y-axis, with the whole beginning of the curves")
    parser.add_argument("--log_x", action="store_true", help="logarithmic x-axis")
    parser.add_argument(
        "--smooth", type=_updates, default=0, metavar="UPDATES",
        help="running mean of the training loss over so many updates (default: a fiftieth of the run; 1: none)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=parse_path, help="the picture: .png, .svg or .pdf (default: curves.png in the folder of one "
        "run, comparison.png here for several)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _updates(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of updates: give a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a UserError."""
    options = parse_args(argv)
    folders: list[Path] = options.runs
    style = Style(options.metric, options.by, options.smooth, options.log, options.log_x)
    try:
        runs = dict(zip(distinct_labels(folders), map(read_curves, folders), strict=True))
        print(table(runs, options.smooth))
        for remark in remarks(runs):
            print(f"qgalore plot: {remark}", file=sys.stderr)
        output = options.output or (folders[0] / "curves.png" if len(folders) == 1 else Path("comparison.png"))
        draw(runs, style, output)
    except UserError as error:
        print(f"qgalore plot: {error}", file=sys.stderr)
        return 2
    print(f"drew {output}")
    return 0
