"""The least time that one update can take: operations over the rate of the tensor cores, bytes over the bandwidth.

    python -m benchmarks.floor --models 60m,7b --tflops 790 --tbps 3.0

An update is a list of passes, one after another, and each takes the longer of its two times. A pass is either a matrix
product, which reads its operands from memory and writes its result there, or everything between two products, fused:
each input read once, each output written once. A better kernel comes closer to this floor; only a kernel that merges
passes, such as a product that reads INT8 weights, can be faster. Operations are those of matrix products,
two for a multiplication and an addition, all at the rate of bfloat16, even the few in float32 that refresh a subspace.
Not counted: launches, the norms' weights and statistics, random bits, zeros that pad a ragged matrix.

Ours is what `q_galore` of `compare.py` trains: INT8 weights, INT4 bases, 8-bit states, a streaming subspace, the loss
in chunks. AdamW is `adamw_compiled`: bfloat16 weights, gradients and states, all logits at once. The compiler leaves
those in bfloat16 and converts them in registers; `--float32_logits` counts them as float32 in memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks import models
from peft_pretraining.speed.passes import TBPS, TFLOPS, Ceilings, Passes, seconds
from peft_pretraining.speed.update_passes import COMPONENTS, Setting, adamw, all_passes, q_galore

TARGETS: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "60m": ((256, 128, 1),),
    "130m": ((128, 256, 1),),
    "350m": ((64, 256, 1),),
    "1b": ((16, 512, 1),),
    "7b": ((16, 1024, 1), (16, 1024, 32)),
    "13b": ((8, 1024, 64),),
}
"""Micro-batch, rank and micro-batches per update of each model."""


# ---- the tables


def settings(model: str, float32_logits: bool = False) -> list[Setting]:
    """A model's targets, without and with checkpointing."""
    config = models.config(model)
    return [
        Setting(config, *target, checkpointing=checkpointing, float32_logits=float32_logits)
        for target in TARGETS[model]
        for checkpointing in ((True,) if model in ("7b", "13b") else (False, True))
    ]


def summary(models: Sequence[str], ceilings: Ceilings, float32_logits: bool = False) -> str:
    """The floors of all settings as a Markdown table."""
    head = ["model", "rank", "micro-batch", "micro-batches an update", "checkpointing"]
    rows = [[*head, "Q-GaLore ms", "tokens/s", "AdamW ms", "tokens/s"]]
    for model in models:
        for s in settings(model, float32_logits):
            sizes = (s.rank, s.micro_batch, s.grad_accum)
            cells = [model.upper(), *map(str, sizes), "yes" if s.checkpointing else "no"]
            for update in (q_galore(s), adamw(s)):
                time = seconds(all_passes(update), ceilings)
                cells += [f"{time * 1e3:,.1f}", f"{s.tokens * s.grad_accum / time:,.0f}"]
            rows.append(cells)
    return _markdown(rows)


def component_table(s: Setting, ceilings: Ceilings) -> str:
    """The components of a setting with checkpointing as a Markdown table, both methods side by side."""
    updates = (q_galore(s), adamw(s))
    methods = {name: [update.get(name, []) for update in updates] for name in COMPONENTS}
    methods["**floor**"] = [all_passes(update) for update in updates]
    bare = replace(s, checkpointing=False)
    methods["floor without checkpointing"] = [all_passes(update) for update in (q_galore(bare), adamw(bare))]
    rows = [["component", "Q-GaLore 10¹² operations", "GB", "ms", "AdamW 10¹² operations", "GB", "ms"]]
    for name, both in methods.items():
        if any(both):
            rows.append([name, *(cell for passes in both for cell in _cells(passes, ceilings))])
    return _markdown(rows)


def _cells(passes: Passes, ceilings: Ceilings) -> list[str]:
    if not passes:
        return ["-"] * 3
    operations, nbytes = sum(p.operations for p in passes), sum(p.nbytes for p in passes)
    return [f"{operations / 1e12:,.3f}", f"{nbytes / 1e9:,.2f}", f"{seconds(passes, ceilings) * 1e3:,.2f}"]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="floor", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(TARGETS), help="names, separated by commas")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="10^12 bfloat16 operations a second")
    parser.add_argument("--tbps", type=float, default=TBPS, help="10^12 bytes a second, read plus written")
    parser.add_argument("--float32_logits", action="store_true", help="count AdamW's logits as float32 in memory")
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if unknown := [name for name in models if name not in TARGETS]:
        parser.error(f"--models {','.join(unknown)}: there are targets for {', '.join(TARGETS)}")
    if args.tflops <= 0 or args.tbps <= 0:
        parser.error("--tflops and --tbps must be positive")
    ceilings = Ceilings(args.tflops * 1e12, args.tbps * 1e12)
    print(summary(models, ceilings, args.float32_logits))
    for model in models:
        for s in settings(model, args.float32_logits):
            if s.checkpointing:
                print(f"\n{model.upper()}, rank {s.rank}, {s.grad_accum} x {s.micro_batch} sequences, checkpointing:\n")
                print(component_table(s, ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
