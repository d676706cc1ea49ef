"""The tables of the papers' runs: their methods, what each script sets, and the paper's figure for it."""

from __future__ import annotations

import re

from benchmarks.paper_figures import PEAK_GB, PRETRAINING
from benchmarks.rows import ROOT
from docs.make.markdown import table

_METHODS = ("q_galore", "galore", "full")
_ON_ONE_GPU = {"llama_7b": "q_galore", "llama_7b_galore": "galore"}


def methods() -> str:
    """What `METHOD` may be, from the comment at the head of `scripts/recipe.sh`."""
    text = (ROOT / "scripts" / "recipe.sh").read_text(encoding="utf-8")
    lines: list[list[str]] = []
    for line in text.split("# METHOD (")[1].split("\n#\n")[0].splitlines()[1:]:
        names, _, meaning = line.removeprefix("#   ").partition("  ")
        if names:
            quoted = ", ".join(f"`{name.strip()}`" for name in names.split(","))
            lines.append([quoted, meaning.strip()])
        else:  # the line before goes on
            lines[-1][1] += f" {meaning.strip()}"
    return table(["METHOD", "what it is"], lines)


def scripts() -> str:
    """A line a script."""
    lines = []
    paths = sorted((ROOT / "scripts" / "pretrain_c4").glob("*.sh"), key=lambda path: _updates(path.read_text()))
    for path in [*paths, *sorted((ROOT / "scripts" / "single_gpu").glob("*.sh"))]:
        text = path.read_text(encoding="utf-8")
        single = path.parent.name == "single_gpu"
        if "MODEL=" not in text:  # it calls the script beside it
            text += (path.parent / "llama_7b.sh").read_text(encoding="utf-8")
        value = {
            name: found[-1] for name in _NAMES if (found := re.findall(rf"^{name}=\(?(.*?)\)?$", text, re.MULTILINE))
        }
        paper = _peak(path.stem) if single else _cells(value["MODEL"])
        lines.append(
            [f"`scripts/{path.parent.name}/{path.name}`", paper, value["RANK"], value["LR"], value["UPDATE_PROJ_GAP"],
             f"{int(value['UPDATES']):,}", f"{value['BATCH_SIZE']} ({value['GPUS']})",
             f"`{value['EXTRA_FLAGS']}`" if "EXTRA_FLAGS" in value else ""]
        )  # fmt: skip
    head = ["script", "paper", "rank", "lr", "interval", "updates", "micro-batch (GPUs)", "further flags"]
    return table(head, lines)


_NAMES = ("MODEL", "RANK", "LR", "UPDATE_PROJ_GAP", "UPDATES", "BATCH_SIZE", "GPUS", "EXTRA_FLAGS")


def _updates(text: str) -> int:
    return int(re.findall(r"^UPDATES=(\d+)$", text, re.MULTILINE)[0])


def _cells(model: str) -> str:
    figures = [PRETRAINING[method, model] for method in _METHODS]
    return " · ".join(f"{each.perplexity:.2f} / {each.gigabytes:g}" for each in figures)


def _peak(stem: str) -> str:
    """Of a script for one GPU; one that the paper does not have has none."""
    if stem not in _ON_ONE_GPU:
        return "none"
    return f"official README: {PEAK_GB[_ON_ONE_GPU[stem], '7b'][0]:.2f} GB at the peak"
