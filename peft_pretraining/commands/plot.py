"""Draw a run's metrics.jsonl as a PNG: loss, learning rate, and the similarity of successive subspaces.

    qgalore plot SAVE_DIR [--output FILE.png]

Similarities are shown where the run refreshed subspaces: 1 means that a refresh found the same subspace again.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.config.flags import parse_path
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.jsonl import read_metrics

SIMILARITY = "subspace/similarity/"
COLUMNS = 60  # time bins of the similarity map

Lines = list[dict[str, Any]]
Series = tuple[list[int], list[float]]


def series(lines: Lines, name: str) -> Series:
    """(update steps, values) of one metric."""
    points = [(line["update_step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], width: int) -> np.ndarray:
    """The running mean over up to `width` values before each one."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def layer_order(layer: str) -> tuple[str, int]:
    """A sort key that groups matrices by kind, then by depth."""
    number = re.search(r"\d+", layer)
    return layer.rsplit(".", 1)[-1], int(number[0]) if number else -1


def draw_loss(axes: Any, lines: Lines) -> None:
    """Draw the training loss with its running mean, and evaluations with their perplexity."""
    steps, losses = series(lines, "train/loss")
    if steps:
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        width = max(1, len(losses) // 50)
        axes.plot(steps, smooth(losses, width), color="tab:blue", label=f"train (mean of {width} lines)")
    steps, losses = series(lines, "eval/loss")
    axes.plot(steps, losses, "o-", color="tab:red", markersize=5, label="eval")
    for step, loss in list(zip(steps, losses, strict=True))[-1:]:
        text = f"perplexity {np.exp(loss):.2f}"
        axes.annotate(text, (step, loss), xytext=(-6, 10), textcoords="offset points", ha="right", color="tab:red")
    axes.set(ylabel="loss (nats a token)", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_learning_rate(axes: Any, lines: Lines) -> None:
    """Draw the learning rate."""
    axes.plot(*series(lines, "train/lr"), color="tab:green")
    axes.set(ylabel="learning rate", title="Learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.grid(alpha=0.3)


def similarity_map(lines: Lines, layers: list[str]) -> np.ndarray:
    """Mean similarity by (layer, time bin), nan where no subspace was refreshed."""
    last = max(line["update_step"] for line in lines) + 1
    sums, counts = np.zeros((len(layers), COLUMNS)), np.zeros((len(layers), COLUMNS))
    for row, layer in enumerate(layers):
        for step, value in zip(*series(lines, SIMILARITY + layer), strict=True):
            column = step * COLUMNS // last
            sums[row, column] += value
            counts[row, column] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def draw_similarity(figure: Any, axes: Any, lines: Lines, layers: list[str]) -> None:
    """Draw a row for each matrix, grouped by kind and ordered by depth; time is the x-axis."""
    last = max(line["update_step"] for line in lines)
    image = axes.imshow(
        similarity_map(lines, layers),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=1,
        extent=(0, last, len(layers), 0),
    )
    axes.set_facecolor("0.9")
    kinds = [layer_order(layer)[0] for layer in layers]
    starts = [row for row in range(len(kinds)) if row == 0 or kinds[row] != kinds[row - 1]]
    ends = [*starts[1:], len(kinds)]
    axes.set_yticks(
        [(start + end) / 2 for start, end in zip(starts, ends, strict=True)], [kinds[row] for row in starts]
    )
    for start in starts[1:]:
        axes.axhline(start, color="white", linewidth=1)
    axes.set(title="Similarity of successive subspaces (rows: matrices by kind and depth; grey: no refresh)")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)


def plot_run(save_dir: Path, output: Path) -> None:
    """Draw the run in `save_dir` into `output`. Raises UserError if it has no metrics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(save_dir)
    if not lines:
        raise UserError(f"{save_dir}/metrics.jsonl has no lines yet: let the run finish an update first")
    names = {name.removeprefix(SIMILARITY) for line in lines for name in line if name.startswith(SIMILARITY)}
    layers = sorted(names, key=layer_order)
    heights = [3, 1.2] + ([max(2.0, min(5.0, 0.12 * len(layers)))] if layers else [])
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(10, 1.8 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    draw_loss(axes[0], lines)
    draw_learning_rate(axes[1], lines)
    if layers:
        draw_similarity(figure, axes[2], lines, layers)
    axes[-1].set_xlabel("update step")
    figure.suptitle(save_dir.resolve().name)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="qgalore plot", description="Draw a run's metrics.jsonl as a PNG.")
    parser.add_argument("save_dir", type=parse_path, help="folder of the run (--save_dir of run_pretrain.py)")
    parser.add_argument("--output", type=parse_path, help="the PNG (default: curves.png in that folder)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_args(argv)
    output = options.output or options.save_dir / "curves.png"
    try:
        plot_run(options.save_dir, output)
    except UserError as error:
        print(f"qgalore plot: {error}", file=sys.stderr)
        return 2
    print(f"drew {output}")
    return 0
