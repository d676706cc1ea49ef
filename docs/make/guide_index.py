"""The table of the guide's pages, by what a reader wants to do."""

from __future__ import annotations

from benchmarks.rows import ROOT
from docs.make.markdown import table

WISHES = {
    "my_own_data.md": "train on text of my own",
    "other_sources.md": "train on a data set of the hub, or on a mixture",
    "tokenizers.md": "choose or train a tokenizer, tokenize once for many runs",
    "seven_b.md": "train 7B on one card of 16 GB",
    "which_recipe.md": "choose a method and its settings",
    "continued_pretraining.md": "go on from a model that is there",
    "many_gpus.md": "train on several GPUs, or as a job of SLURM",
    "sharded_sums.md": "train 13B on two GPUs of 14 GB, or choose what is sharded",
    "offload.md": "train what one card does not hold, with host memory",
    "when_it_stops.md": "know what a stop, a crash or a warning means",
    "after_training.md": "see text, measure, compare and export a model",
    "trainers.md": "train in accelerate, another trainer or my own loop",
    "trainers_hugging_face.md": "train in Trainer, TRL or unsloth",
    "trainers_more.md": "train in Lightning or axolotl",
    "trainers_saving.md": "save what another trainer trained, or run a script for galore-torch",
    "finetuning.md": "fine-tune for GLUE and MMLU",
    "baselines.md": "compare with LoRA, ReLoRA, QLoRA and low rank",
    "reproduce.md": "make the papers' tables",
}
"""By page, in their order; a page that is not here comes last, and one that is not there is left out."""


def pages() -> str:
    """A line a page, with the page's own title."""
    folder = ROOT / "docs" / "guide"
    there = [path.name for path in sorted(folder.glob("*.md")) if path.name != "index.md"]
    ordered = [name for name in WISHES if name in there] + [name for name in there if name not in WISHES]
    lines = []
    for name in ordered:
        title = (folder / name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append([WISHES.get(name, title), f"[{title}]({name})"])
    return table(["I want to", "page"], lines)
