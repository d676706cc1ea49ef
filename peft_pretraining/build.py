"""Options into what is trained: the one place where flags become a model and its optimizer."""

from __future__ import annotations

import torch

from peft_pretraining.args import RunArgs
from peft_pretraining.model import CausalLM, build_model
from peft_pretraining.optimizers import (
    TrainingOptimizer,
    allows_graphs,
    build_optimizer,
    low_rank_converter,
    replay_layers,
)
from qgalore.rank_sum import AllReduce


def build_training(
    args: RunArgs, device: torch.device, all_reduce: AllReduce | None = None
) -> tuple[CausalLM, TrainingOptimizer]:
    """The model on `device`, its decoder matrices stored as asked, and the optimizer that is attached to it.

    Compiled layers and CUDA graphs are set up where the options allow them. all_reduce sums a tensor over the ranks in
    place; None for one rank. Raises UserError for a configuration that does not work.
    """
    seed, convert = args.runtime.seed, low_rank_converter(args.optimizer, args.quantization)
    model = build_model(args.model, device, seed, on_module=convert)
    optimizer = build_optimizer(model, args.optimizer, args.quantization, args.subspace, seed, all_reduce)
    if allows_graphs(args):
        replay_layers(model, optimizer)
    return model, optimizer
