"""The memory plan of a command line."""

from __future__ import annotations

from dataclasses import replace

from peft_pretraining.build import compiles_layers
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import MemoryPlan, plan_memory
from peft_pretraining.memory.settings import MemorySettings
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.registry import family_of, read_config
from peft_pretraining.optim.build import allows_graphs

_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def shape_of(args: RunArgs) -> ModelConfig | None:
    """The shape of the model to train; None where only transformers' class takes the configuration."""
    try:
        return read_config(args.model.model_config)
    except UserError:
        if args.model.use_hf_model:
            return None
        raise


def plan(args: RunArgs, config: ModelConfig) -> MemoryPlan:
    """The planned memory of one rank of this run; on a CUDA GPU unless `--device cpu` is given."""
    settings = memory_settings(args)
    if not family_of(config).compiles_layers:
        settings = replace(settings, compiled=False, cuda_graphs=False)
    return plan_memory(config, settings)


def memory_settings(args: RunArgs) -> MemorySettings:
    """What of the flags decides the memory, of a model whose layers can be compiled."""
    optimizer, subspace = args.optimizer, args.subspace
    of_library = optimizer.optimizer in LIBRARY_OPTIMIZERS
    states = int(optimizer.beta1 > 0) if optimizer.optimizer in ("sgd", "adafactor") else 2
    one = optimizer.optimizer == "muon" or (optimizer.is_low_rank and subspace.direction == "orthogonal")
    decoder_states = 1 if one else states
    cuda = args.runtime.device != "cpu"
    compiled = compiles_layers(args.model, pays=cuda)
    return MemorySettings(
        batch_size=args.batch.batch_size,
        max_length=args.batch.max_length,
        ranks=args.world_size,
        dtype_bytes=_DTYPE_BYTES[args.model.dtype],
        cuda=cuda,
        compiled=compiled,
        cuda_graphs=compiled and cuda and allows_graphs(args),
        grad_accum_steps=args.batch.gradient_accumulation,
        grad_accum_dtype=args.model.dtype if of_library else optimizer.grad_accum_dtype,
        per_layer=optimizer.per_layer,
        activation_checkpointing=args.model.activation_checkpointing,
        checkpoint_every=args.model.checkpoint_every,
        int8_activations=args.model.int8_activations,
        subspace=subspace.config() if optimizer.is_low_rank else None,
        mlp_rank=subspace.mlp_rank,
        weight=args.quantization.weight_format,
        state_bits=8 if "8bit" in optimizer.optimizer else 32,
        states=states,
        decoder_states=decoder_states,
        factored=optimizer.optimizer == "adafactor",
    )
