"""One update of one matrix of 7B, as a flow with the bytes of what is stored and of what passes."""

from __future__ import annotations

from typing import Any

from benchmarks.models import LENGTH, MICRO_BATCHES, RANKS, config
from qgalore.config import SubspaceConfig, WeightFormat
from qgalore.update.moments import BLOCK_SIZE

MODEL, MATRIX = "7b", "q_proj"


def _parameters() -> int:
    """Of LLaMA-7B, by its shape: embeddings, head, norms, and of each layer attention, MLP and two norms."""
    shape = config(MODEL)
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = 4 * width * width + 3 * width * inner + 2 * width
    return 2 * shape.vocab_size * width + width + shape.num_hidden_layers * layer


PARAMETERS_OF_7B = _parameters()


def figures() -> dict[str, float]:
    """Megabytes by what they are of."""
    width, rank = config(MODEL).hidden_size, RANKS[MODEL]
    tokens = MICRO_BATCHES[MODEL] * LENGTH
    groups = 4  # bytes a group: scale and zero point in bfloat16
    weight_group, basis_group = WeightFormat().group_size, SubspaceConfig(rank).proj_group_size
    values, projected, basis = width * width, width * rank, rank * width
    sizes = {
        "codes": values + groups * values / weight_group,
        "weight": 2 * values,
        "input": 2 * tokens * width,
        "projected input": 2 * tokens * rank,
        "gradient of the output": 2 * tokens * width,
        "low-rank gradient": 2 * projected,
        "sum": projected + groups * projected / weight_group,
        "moments": 2 * (projected + 4 * projected / BLOCK_SIZE),
        "basis": basis / 2 + groups * basis / basis_group,
        "full gradient": 2 * values,
        "full moments": 8 * values,
    }
    return {name: round(size / 1e6, 2) for name, size in sizes.items()}


_STORED, _PASSING = "#d6e6f5", "white"
_LEFT, _MIDDLE, _RIGHT, _END = 1.4, 5.4, 9.6, 13.6
_BOXES = {
    # name: (x, y, text, stored)
    "codes": (_LEFT, 5.2, "INT8 codes of W\nscale, zero point a group", True),
    "weight": (_MIDDLE, 5.2, "W in bfloat16", False),
    "input": (_MIDDLE, 3.7, "input X\n4,096 tokens x 4,096", False),
    "output": (_RIGHT, 5.2, "output X Wᵀ", False),
    "projected input": (_MIDDLE, 2.2, "X Bᵀ\n4,096 tokens x 1,024", False),
    "gradient of the output": (_RIGHT, 3.7, "gradient of the output, D", False),
    "low-rank gradient": (_RIGHT, 2.2, "low-rank gradient R\nDᵀ X Bᵀ, 4,096 x 1,024", False),
    "sum": (_END, 2.2, "sum in INT8\nover 32 micro-batches", True),
    "moments": (_END, 0.6, "Adam's two moments\nin 8 bits", True),
    "direction": (_RIGHT, 0.6, "direction N\n4,096 x 1,024", False),
    "basis": (_LEFT, 2.2, "basis B in INT4\n1,024 x 4,096", True),
}
_ARROWS = (
    ("codes", "weight", "dequantize"),
    ("weight", "output", "forward"),
    ("input", "output", ""),
    ("input", "projected input", ""),
    ("basis", "projected input", "project"),
    ("gradient of the output", "low-rank gradient", ""),
    ("projected input", "low-rank gradient", "backward"),
    ("low-rank gradient", "sum", "add"),
    ("sum", "moments", ""),
    ("moments", "direction", "Adam"),
)


def draw(sizes: dict[str, float]) -> Any:
    """Boxes with their megabytes; what is stored between updates is filled."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11.5, 5.6))
    for begin, end, text in _ARROWS:
        (x0, y0, *_), (x1, y1, *_) = _BOXES[begin], _BOXES[end]
        level = y0 == y1
        arrow = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 62 if level else 26, "shrinkB": 64 if level else 26}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        if text:
            middle = ((x0 + x1) / 2, (y0 + y1) / 2 + 0.1)
            axis.annotate(text, middle, ha="center", va="bottom", fontsize=7.5, style="italic", color="0.25")
    back = {"arrowstyle": "-|>", "color": "C3", "connectionstyle": "angle,angleA=0,angleB=90,rad=8", "shrinkB": 4}
    axis.annotate("", (0.35, 4.75), (_RIGHT - 1.0, 0.6), arrowprops=back)
    text = "once an update, in place: new codes of W - rate x N B, rounded at random"
    axis.annotate(text, (0.6, 0.68), fontsize=8, style="italic", color="C3", va="bottom")
    for name, (x, y, text, stored) in _BOXES.items():
        size = f"\n{sizes[name]:.1f} MB" if name in sizes else ""
        axis.annotate(
            text + size, (x, y), ha="center", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.4", "facecolor": _STORED if stored else _PASSING, "edgecolor": "0.35",
                  "linestyle": "-" if stored else "--"},
        )  # fmt: skip
    axis.annotate(
        f"never there: the full gradient Dᵀ X ({sizes['full gradient']:.1f} MB in bfloat16)\n"
        f"and its moments ({sizes['full moments']:.0f} MB in float32)", (_END - 2.0, 4.75), fontsize=8, color="C3",
    )  # fmt: skip
    axis.annotate(
        "filled: kept from one update to the next; dashed: passes, its memory is used again", (0, 6.0), fontsize=8
    )
    axis.set_xlim(-0.2, 15.2)
    axis.set_ylim(0, 6.2)
    axis.axis("off")
    return figure
