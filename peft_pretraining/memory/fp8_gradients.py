"""Where `--fp8_weight_gradients` finds no gradient that is formed as a whole: a warning."""

from __future__ import annotations

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.planned_run import Matrix, PlannedRun
from peft_pretraining.models.config import ModelConfig
from qgalore.subspace.fit import projects_directly


def warning_of_fp8_gradients(args: RunArgs, config: ModelConfig | None) -> str | None:
    """A sentence for a run whose weight gradients are all projected from their factors; None for others.

    config: None for a model that is not planned.
    """
    quantization = args.quantization
    if config is None or not quantization.fp8_weight_gradients:
        return None
    run = PlannedRun(args, config)
    if any(forms_gradient(args, run.tokens, matrix) for matrix in run.matrices):
        return None
    changed = "the head's gradient alone" if quantization.fp8_head else "nothing"
    return (
        f"--fp8_weight_gradients changes {changed}: with --rank {args.subspace.rank} gradients are projected from "
        "their factors in the data type of --dtype, and none is formed as a whole; give --rank full, or leave it out"
    )


def forms_gradient(args: RunArgs, tokens: int, matrix: Matrix) -> bool:
    """Whether the gradient of a matrix is formed as a whole for a micro-batch of so many tokens."""
    if not matrix.sides or matrix.residual or args.subspace.subspace == "svd":
        return True
    side = "right" if matrix.sides[-1] == matrix.shape[1] else "left"
    return not projects_directly(tokens, *matrix.shape, matrix.rank, side)
