"""Decide what runs the decoder layers of a training: the network itself, CUDA graphs, or what fetches their weights."""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

from torch import Tensor, nn

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import family_of
from peft_pretraining.optim.protocol import TrainingOptimizer
from qgalore.graphs.eager_layers import EagerLayers
from qgalore.graphs.evaluations import let_evaluations_in
from qgalore.graphs.runner import LayerGraphs
from qgalore.kernels import reads_rows_on_device
from qgalore.layer.linear import LowRankLinear
from qgalore.offload.offload import Pass
from qgalore.optimizer import LowRankAdamW


class Execution(Enum):
    """What runs the decoder layers in training."""

    IN_NETWORK = "the network's own loop, or one layer at a time with --accumulate_by layer"
    FROM_GRAPHS = "CUDA graphs"
    FROM_PYTHON = "a loop that brings what a layer needs from other ranks or from the host"


def execution_of(args: RunArgs, can_replay: bool) -> Execution:
    """What runs the layers of a run; can_replay: whether its device and its layers are such as CUDA graphs need."""
    if can_replay and allows_graphs(args):
        return Execution.FROM_GRAPHS
    arrives = args.gathers_layers or args.runtime.offload != "none"
    return Execution.FROM_PYTHON if arrives and not args.by_layer else Execution.IN_NETWORK


def allows_graphs(args: RunArgs) -> bool:
    """Whether these flags allow CUDA graphs of decoder layers.

    A graph must read everything that changes from step to step from the device. That is not so for fake quantization,
    group sizes that the Triton kernels do not support, a single micro-batch's gradient that is stored in 8 bits, and a
    residual that is kept until a later update. Nor is it served where gradients are added to momenta: each would have a
    buffer of its own, and there is to be none. These graphs are of one micro-batch in all layers: none where a layer
    has all micro-batches at once.
    """
    optimizer, quantization = args.optimizer, args.quantization
    fake = quantization.weight_quant and quantization.simulation
    packs = args.updates_immediately and optimizer.grad_accum_dtype == "int8"
    fits = quantization.weight_group_size % 8 == 0 and not fake and not packs
    fits = fits and (args.updates_immediately or args.subspace.residual == "none")
    fits = fits and not args.sums_in_momentum and not args.by_layer
    return args.model.cuda_graphs == "auto" and optimizer.is_low_rank and fits


def can_replay(model: CausalLM, optimizer: TrainingOptimizer) -> bool:
    """Whether decoder layers are compiled, on a CUDA GPU and updated by Triton kernels."""
    if model.compiled_layer is None or not isinstance(optimizer, LowRankAdamW):
        return False
    device = next(model.parameters()).device
    matrices = [layer for layer in model.decoder_layers.modules() if isinstance(layer, LowRankLinear)]
    return device.type == "cuda" and all(reads_rows_on_device(device, x.group_size) for x in matrices)


def set_execution(model: CausalLM, optimizer: TrainingOptimizer, args: RunArgs) -> None:
    """Let the decoder layers of a model with an attached optimizer run as the flags and the device say.

    With `--shard full` the layers' matrices lie with the ranks that own them from now on, as do the rows of embeddings
    and head. With `--offload` optimizer
    states of the layers wait on the host, and weights if it says so. Raises PageLockError where the system does not
    lock so much memory.
    """
    execution, offload = execution_of(args, can_replay(model, optimizer)), args.runtime.offload
    if execution is Execution.IN_NETWORK and offload == "none" and not args.gathers_layers:
        return
    assert isinstance(optimizer, LowRankAdamW)
    layers = list(model.decoder_layers)
    if args.gathers_layers:
        gathering = optimizer.gather_layers(layers)
        let_evaluations_in(layers, lambda index: gathering.enter(index, 1))
        if family_of(cast(ModelConfig, model.config)).brings_tables:
            bring_tables(model, optimizer)
    if offload != "none":
        waiting = optimizer.offload_layers(layers, offload == "weights", slots_of(args))

        def enter(index: int) -> None:
            if index == 0:
                waiting.leave_all()
            waiting.enter(index, Pass.FORWARD, 1)

        let_evaluations_in(layers, enter, waiting.leave)
    if execution is Execution.FROM_PYTHON:
        model.run_layers_by(EagerLayers(layers, model.compiled_layer, optimizer))
    elif execution is Execution.FROM_GRAPHS:
        replay_layers(model, optimizer)


def bring_tables(model: CausalLM, optimizer: LowRankAdamW) -> None:
    """Let embeddings and head that are dealt by rows be whole in passes alone; values that are loaded go to rows."""
    tables = optimizer.gather_tables(map(model.get_parameter, model.table_names))
    model.bring_tables_by(tables)

    def take_rows(module: nn.Module, entries: dict[str, Any], prefix: str, *_: object) -> None:
        for key, param in module.named_parameters(recurse=False):
            value = entries.get(f"{prefix}{key}")
            if isinstance(value, Tensor) and value.shape == param.shape and tables.store(param, value):
                entries[f"{prefix}{key}"] = param  # which torch then copies to itself

    for module in model.modules():
        if any(param in tables for param in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(take_rows)


def replay_layers(model: CausalLM, optimizer: LowRankAdamW) -> None:
    """Run the decoder layers from CUDA graphs, which `can_replay` allows."""
    assert model.compiled_layer is not None
    model.run_layers_by(LayerGraphs(list(model.decoder_layers), model.compiled_layer, optimizer))


def slots_of(args: RunArgs) -> int:
    """How many layers `--offload` has on the device at the same time: one that runs, one that comes.

    Over ranks one more, whose gradients are summed while the one below it runs.
    """
    return 2 if args.world_size == 1 else 3
