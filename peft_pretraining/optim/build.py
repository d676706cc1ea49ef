"""Optimizers by name: the one place where the names of `--optimizer` are matched.

Every optimizer that comes out of here has the same few methods (`TrainingOptimizer`), so the training loop has no
branch on its kind. The Adam family is one class of `qgalore`, since it rounds bfloat16 weights stochastically:
torch's AdamW on bfloat16 weights loses every update smaller than 1/512 of a weight. On float32 weights the two agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS, OptimizerArgs, QuantizationArgs, SubspaceArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.models.network import CausalLM
from peft_pretraining.optim.other_libraries import LibraryOptimizer, library_optimizer
from peft_pretraining.optim.protocol import TrainingOptimizer
from qgalore import GaLoreAdamW, GaLoreAdamW8bit, LowRankLinear, QGaLoreAdamW8bit, low_rank_param_groups
from qgalore.graphs.runner import LayerGraphs
from qgalore.kernels import reads_rows_on_device
from qgalore.optimizer import LowRankAdamW
from qgalore.update.all_reduce import AllReduce

_ADAM_FAMILY = {
    "adam": GaLoreAdamW,
    "adamw": GaLoreAdamW,
    "adam8bit": GaLoreAdamW8bit,
    "galore_adamw": GaLoreAdamW,
    "galore_adamw8bit": GaLoreAdamW8bit,
    "galore_adamw8bit_per_layer": GaLoreAdamW8bit,
    "q_galore_adamw8bit": QGaLoreAdamW8bit,
    "q_galore_adamw8bit_per_layer": QGaLoreAdamW8bit,
}


def low_rank_converter(optimizer: OptimizerArgs, quantization: QuantizationArgs) -> Callable[[CausalLM, str], None]:
    """For `build_model`: turns each decoder matrix into its stored form as soon as it exists."""
    format = quantization.weight_format

    def convert(model: CausalLM, name: str) -> None:
        linear = model.get_submodule(name)
        if optimizer.is_low_rank and isinstance(linear, nn.Linear) and model.is_decoder_matrix(name):
            parent, _, child = name.rpartition(".")
            # What is computed again for the backward pass can be freed before the gradient of it is made.
            options = {"pads_output": model.pads_output(name), "frees_input": model.recomputes(name)}
            layer = LowRankLinear.from_linear(linear, format, **options)
            setattr(model.get_submodule(parent), child, layer)

    return convert


def build_optimizer(
    model: nn.Module,
    args: OptimizerArgs,
    subspace: SubspaceArgs,
    seed: int,
    all_reduce: AllReduce | None = None,
) -> TrainingOptimizer:
    """The optimizer of `--optimizer`, attached to the model.

    Two param groups: embeddings, head and norms at the full-rank learning rate; the decoder's matrices. Those of the
    MLP are a third where they have another rank. all_reduce sums a tensor over the ranks in place; None for one rank.
    """
    groups = low_rank_param_groups(model, low_rank_names(model), lr=args.lr, initial_lr=args.lr)
    groups[0] |= {"lr": args.peak_full_rank_lr, "initial_lr": args.peak_full_rank_lr}
    groups[0]["weight_decay"] = args.decay_of_full_rank
    if args.optimizer in LIBRARY_OPTIMIZERS:
        return LibraryOptimizer(library_optimizer(args, groups), all_reduce)
    if args.is_low_rank:
        groups[1] |= dataclasses.asdict(subspace.config())
        if subspace.mlp_rank:
            mlp = {param for name, param in model.named_parameters() if ".mlp." in name}
            of_mlp = [param for param in groups[1]["params"] if param in mlp]
            groups[1]["params"] = [param for param in groups[1]["params"] if param not in mlp]
            groups.append(groups[1] | {"params": of_mlp, "rank": subspace.mlp_rank})
    optimizer = _ADAM_FAMILY[args.optimizer](
        groups,
        lr=args.lr,
        betas=(args.adam_beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        decoupled_weight_decay=args.optimizer != "adam",
        accumulator_dtype=args.grad_accum_dtype,
        norm_growth=args.norm_growth,
        seed=seed,
    )
    # Between micro-batches all gradients exist anyway, so a clipped run updates after the last one at no memory.
    in_backward = args.per_layer and not args.grad_clipping
    optimizer.attach(model, update_in_backward=in_backward, all_reduce=all_reduce)
    return optimizer


def allows_graphs(args: RunArgs) -> bool:
    """Whether these flags let compiled decoder layers run from CUDA graphs on a GPU with Triton.

    All that changes from step to step must be read from the device: not so for fake quantization, for groups that
    Triton's kernels cannot take, for a gradient that is packed into 8 bits without a sum, and for a residual that waits
    for its update.
    """
    optimizer, quantization = args.optimizer, args.quantization
    waits = not optimizer.per_layer or optimizer.grad_clipping > 0 or args.batch.gradient_accumulation > 1
    fake = quantization.weight_quant and quantization.simulation
    packs = optimizer.per_layer and args.batch.gradient_accumulation == 1 and optimizer.grad_accum_dtype == "int8"
    fits = quantization.weight_group_size % 8 == 0 and not fake and not packs
    fits = fits and not (waits and args.subspace.residual != "none")
    return args.model.cuda_graphs == "auto" and optimizer.is_low_rank and fits


def replay_layers(model: CausalLM, optimizer: TrainingOptimizer) -> None:
    """Let the decoder layers run from CUDA graphs where they are compiled, on a CUDA GPU, and Triton updates them."""
    run, layers, device = model.compiled_layer, model.decoder_layers, next(model.parameters()).device
    if run is None or not isinstance(optimizer, LowRankAdamW):
        return
    matrices = [layer for layer in layers.modules() if isinstance(layer, LowRankLinear)]
    if device.type == "cuda" and all(reads_rows_on_device(device, x.group_size) for x in matrices):
        model.run_layers_by(LayerGraphs(list(layers), run, optimizer))
