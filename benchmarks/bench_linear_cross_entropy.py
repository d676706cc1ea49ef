"""Time and memory of the loss at the head, forward and backward: ours in chunks, Liger's, and all logits at once.

    python -m benchmarks.bench_linear_cross_entropy [--models 60m,1b] [--results FILE]

Shapes are those of `benchmarks/compare.py`: tokens of a micro-batch, hidden size, vocabulary. Liger (liger-kernel) is
measured where it is installed. `floor_ms` is the time of three such products at 790 TFLOP/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import models
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.models.ops.linear_cross_entropy import linear_cross_entropy

MODELS = ("60m", "130m", "350m", "1b", "7b")
TFLOPS = 790e12

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute all logits at once, as PyTorch users do."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def methods() -> dict[str, Loss]:
    """The losses by name; Liger only if it is installed."""
    found: dict[str, Loss] = {"ours": linear_cross_entropy, "whole logits": whole}
    found["whole logits, compiled"] = torch.compile(whole)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return found
    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return found


def measure(loss: Loss, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """The median milliseconds of forward and backward, and the peak beyond the operands in GB."""
    tokens, width, vocabulary = shape
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device="cuda", generator=generator) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda", generator=generator)
    seconds = []
    for repeat in range(repeats + 3):
        hidden.grad = weight.grad = None
        if repeat == 3:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        (loss(hidden, weight, targets) / tokens).backward()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {"ms": round(statistics.median(seconds[3:]), 3), "peak_gb": round(peak, 3)}


def main() -> int:
    """Measure every method at the shapes of the models, one row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/linear_cross_entropy.csv"))
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: {unknown[0]} is none of {', '.join(MODELS)}")
    if not torch.cuda.is_available():
        print("bench_linear_cross_entropy needs a CUDA GPU", file=sys.stderr)
        return 2
    for name in args.models.split(","):
        shape = models.tokens(name), models.config(name).hidden_size, models.config(name).vocab_size
        tokens, width, vocabulary = shape
        floor = 3 * 2 * tokens * width * vocabulary / TFLOPS * 1e3
        for method, loss in methods().items():
            row = {"model": name, "tokens": tokens, "hidden_size": width, "vocabulary": vocabulary, "method": method}
            row |= measure(loss, shape, args.repeats)
            row |= {"floor_ms": round(floor, 3), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
            row |= {"commit": commit()}
            print(row, flush=True)
            append_row(Path(args.results), row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
