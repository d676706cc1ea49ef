"""Build the optimizer of `--optimizer`, attached to its model.

All optimizers have the same few methods (`TrainingOptimizer`), so the training loop has no branch on their kind. The
Adam family uses `qgalore` also at full rank, because it rounds bfloat16 weights stochastically: torch's AdamW on
bfloat16 weights loses every update smaller than 1/512 of a weight. On float32 weights the two agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS, OptimizerArgs, QuantizationArgs, SubspaceArgs
from peft_pretraining.methods.convert import trained_matrix_names
from peft_pretraining.models.config import is_of_mlp
from peft_pretraining.models.network import CausalLM
from peft_pretraining.optim.bitsandbytes_adam import BitsandbytesAdamW8bit
from peft_pretraining.optim.other_libraries import LibraryOptimizer, library_optimizer, library_state
from peft_pretraining.optim.protocol import TrainingOptimizer
from qgalore import GaLoreAdamW, GaLoreAdamW8bit, LowRankLinear, QGaLoreAdamW8bit, low_rank_param_groups
from qgalore.config import SubspaceConfig
from qgalore.layer.conversion import low_rank_linear
from qgalore.layer.linear_names import is_conv1d
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import AllReduce
from qgalore.update.loss_scale import LossScale

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
    """A callback for `build_model` that replaces each decoder matrix by a `LowRankLinear` as soon as it exists."""
    format = quantization.weight_format

    def convert(model: CausalLM, name: str) -> None:
        linear = model.get_submodule(name)
        is_linear = isinstance(linear, nn.Linear) or is_conv1d(linear)
        if optimizer.is_low_rank and is_linear and model.is_decoder_matrix(name):
            parent, _, child = name.rpartition(".")
            # What is computed again for the backward pass can be freed before the gradient of it is made.
            options = {"pads_output": model.pads_output(name), "frees_input": model.recomputes(name)}
            setattr(model.get_submodule(parent), child, low_rank_linear(linear, format, **options))

    return convert


def build_optimizer(
    model: CausalLM,
    args: OptimizerArgs,
    subspace: SubspaceArgs,
    seed: int,
    all_reduce: AllReduce | None = None,
    mesh: ShardMesh | None = None,
) -> TrainingOptimizer:
    """Build the optimizer of `--optimizer` and attach it to the model.

    all_reduce sums a tensor over the ranks in place; mesh deals the states to them instead; None for one rank.
    """
    groups = _param_groups(model, args, subspace)
    if args.optimizer in LIBRARY_OPTIMIZERS:
        return LibraryOptimizer(library_optimizer(args, groups), all_reduce, mesh)
    family = BitsandbytesAdamW8bit if args.by_bitsandbytes else _ADAM_FAMILY[args.optimizer]
    optimizer = family(
        groups,
        lr=args.lr,
        betas=(args.adam_beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        decoupled_weight_decay=args.optimizer != "adam",
        accumulator_dtype=args.grad_accum_dtype,
        norm_growth=args.norm_growth,
        cautious_decay=args.cautious_decay,
        seed=seed,
    )
    # Clipping needs all gradients at once, so a clipped run updates after the last backward pass.
    in_backward = args.per_layer and not args.grad_clipping
    scale = _loss_scale(model, args)
    optimizer.attach(model, update_in_backward=in_backward, all_reduce=all_reduce, loss_scale=scale, mesh=mesh)
    return optimizer


def _loss_scale(model: nn.Module, args: OptimizerArgs) -> LossScale | None:
    """That of `--loss_scale` for a model with float16 parameters; None for others."""
    half = next((param for param in model.parameters() if param.dtype == torch.float16), None)
    return None if half is None else LossScale(half.device, args.loss_scale or None)


def _param_groups(model: CausalLM, args: OptimizerArgs, subspace: SubspaceArgs) -> list[dict[str, Any]]:
    """Two groups: embeddings, head and norms at the full-rank learning rate; the decoder's matrices, or their factors.

    Matrices of the MLP or of a part of the layers are in groups of their own if they have other ranks.
    """
    groups = low_rank_param_groups(model, trained_matrix_names(model), lr=args.lr, initial_lr=args.lr)
    groups[0] |= {"lr": args.peak_full_rank_lr, "initial_lr": args.peak_full_rank_lr}
    groups[0]["weight_decay"] = args.decay_of_full_rank
    if args.optimizer not in LIBRARY_OPTIMIZERS:
        groups[0]["second_moment"] = args.full_rank_second_moment
    if not args.is_low_rank:
        return groups
    matrices, low_rank = groups.pop(), dict[tuple[bool, SubspaceConfig], list[Tensor]]()
    options = _options_of_layers(model, subspace)
    for apart in (False, True):  # the order of groups is that of a saved state
        for param in matrices["params"]:
            if options[param][0] is apart:
                low_rank.setdefault(options[param], []).append(param)
    return [*groups, *(matrices | dataclasses.asdict(x) | {"params": params} for (_, x), params in low_rank.items())]


def _options_of_layers(model: CausalLM, subspace: SubspaceArgs) -> dict[Tensor, tuple[bool, SubspaceConfig]]:
    """For each parameter of a decoder layer whether --mlp_rank is for it, and its options."""
    layers, found = model.decoder_layers, dict[Tensor, tuple[bool, SubspaceConfig]]()
    for layer, options in zip(layers, subspace.by_depth(len(layers)), strict=True):
        configs = {of_mlp: options.config(of_mlp) for of_mlp in (False, True)}
        for name, param in layer.named_parameters():
            apart = subspace.mlp_rank != 0 and is_of_mlp(name)
            found[param] = apart, configs[apart]
    return found


def states_on_meta(model: CausalLM, args: OptimizerArgs, subspace: SubspaceArgs) -> Mapping[Tensor, dict[str, Tensor]]:
    """What the optimizer of `--optimizer` keeps of each parameter of a model on the meta device, where it is empty."""
    groups = _param_groups(model, args, subspace)
    if args.optimizer in LIBRARY_OPTIMIZERS:
        return {x: library_state(args, x, group is groups[1]) for group in groups for x in group["params"]}
    layers = (layer for layer in model.modules() if isinstance(layer, LowRankLinear))
    for group in groups:
        group["norm_growth"] = args.norm_growth
    return _ADAM_FAMILY[args.optimizer].initial_states(groups, layers)
