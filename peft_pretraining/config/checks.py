"""Find combinations of flags that cannot work; each problem is a sentence that also says what would work.

The checks need only the flags, the number of ranks and the model's JSON configuration, and report all problems at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.config.flag_groups import (
    GALORE_OPTIMIZERS,
    LIBRARY_OPTIMIZERS,
    Q_GALORE_OPTIMIZERS,
    ModelArgs,
    ScheduleArgs,
    SubspaceArgs,
)
from peft_pretraining.config.method_checks import method_problems
from peft_pretraining.config.model_source import source_problems, source_warnings
from peft_pretraining.config.offload_checks import offload_problems, offload_warnings
from peft_pretraining.config.shard_checks import shard_problems, shard_warnings
from peft_pretraining.data.sources.kind import TokenKind
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import (
    check_length,
    check_method_rank,
    check_momentum_rank,
    rank_problems,
    read_config_json,
)
from peft_pretraining.models.family import ModelFamily
from peft_pretraining.models.registry import find_family
from qgalore.config import OF_PROJECTIONS, scaled_too_late

if TYPE_CHECKING:
    from peft_pretraining.config.run_config import RunArgs

_STORED_BASES = ("proj_quant", "proj_bits", "proj_group_size")
_OF_ACTIVATIONS = (
    *("activation_checkpointing", "checkpoint_every", "checkpoint_layers", "recompute"),
    "int8_activations",
)
_OF_SVD = ("svd_method", "max_update_proj_gap")
"""Of what subspaces by SVD alone read; official command lines have the rest of the lazy rule, whatever they add."""
_PER_LAYER = [name for name in (*GALORE_OPTIMIZERS, *Q_GALORE_OPTIMIZERS) if name.endswith("_per_layer")]
_LOW_RANK_FLAGS = ("recipe", *(field.name for field in fields(SubspaceArgs) if field.name not in _STORED_BASES))


def find_problems(args: RunArgs) -> list[str]:
    """List every combination in `args` (batch sizes resolved) that cannot work, in sentences."""
    return [
        *_activation_problems(args),
        *_model_problems(args),
        *source_problems(args.model, args.checkpoint),
        *_batch_problems(args),
        *_by_layer_problems(args),
        *_data_problems(args),
        *_optimizer_problems(args),
        *method_problems(args),
        *_float16_problems(args),
        *_quantization_problems(args),
        *_int8_products_problems(args),
        *_fp8_products_problems(args),
        *_subspace_problems(args),
        *_schedule_problems(args),
        *_run_problems(args),
        *shard_problems(args),
        *offload_problems(args),
    ]


def adds_problems(args: RunArgs, changed: RunArgs) -> bool:
    """Whether `changed`, which someone is to be advised, has a problem that `args` does not have."""
    return not set(find_problems(changed)) <= set(find_problems(args))


def unused_by_full_rank(args: RunArgs, given: Collection[str]) -> list[str]:
    """List the flags of projections among those `given` by name where `--rank full` leaves nothing to project."""
    if not args.optimizer.is_low_rank or args.subspace.projects:
        return []
    return [
        f"--{name} {getattr(args.subspace, name)}".removesuffix(" True")
        + " has no meaning with --rank full, which projects nothing: leave it out, or give a number of dimensions"
        for name in OF_PROJECTIONS
        if name in given and getattr(args.subspace, name) is not False
    ]


def find_warnings(args: RunArgs, given: Collection[str]) -> list[str]:
    """List what in `args` works but is probably not intended; `given`: the flags of the command line."""
    warnings = []
    if not args.optimizer.is_low_rank:
        of_method = "" if args.method.method == "full" else "rank"
        idle = [f"--{name}" for name in _LOW_RANK_FLAGS if name in given and name != of_method]
        if idle:
            warnings.append(f"{_idle(idle)}: --optimizer {args.optimizer.optimizer} has no subspace")
    for kind, used in (("weight", args.quantization.weight_quant), ("proj", args.subspace.proj_quant)):
        idle = [f"--{name}" for name in (f"{kind}_bits", f"{kind}_group_size") if name in given]
        if idle and not used:
            why = f"with --no-{kind}_quant" if f"{kind}_quant" in given else f"without --{kind}_quant"
            warnings.append(f"{_idle(idle)} {why}")
    idle = [name for name in _OF_ACTIVATIONS if name in given and getattr(args.model, name) != getattr(ModelArgs, name)]
    if idle and args.by_layer:
        flags = [f"--{name}" for name in idle]
        warnings.append(f"{_idle(flags)}: --accumulate_by layer recomputes every layer")
    if "adam8bit_backend" in given and args.optimizer.optimizer != "adam8bit":
        warnings.append(f"{_idle(['--adam8bit_backend'])}: --optimizer {args.optimizer.optimizer} is not adam8bit")
    if "momentum_rest_bits" in given and not args.subspace.momentum_rank:
        warnings.append(f"{_idle(['--momentum_rest_bits'])} without --momentum_rank")
    model = args.model
    warnings += [*source_warnings(model, args.data), *_unread_keys(model)]
    if model.int8_activations and (again := _recomputes_every_mlp(model)):
        warnings.append(f"{_idle(['--int8_activations'])}: {again}")
    elif model.int8_activations and model.compile == "off":
        warnings.append("--int8_activations rounds without saving memory: with --compile off all is kept anyway")
    warnings += [*_idle_subspace_flags(args, given), *_idle_optimizer_flags(args, given), *_by_layer_warnings(args)]
    warnings += _idle_run_flags(args, given)
    warnings += [*shard_warnings(args), *offload_warnings(args)]
    schedule = args.schedule
    if schedule.warmup_steps >= schedule.num_training_steps:
        warnings.append(
            f"--warmup_steps {schedule.warmup_steps} is not less than the run's {schedule.num_training_steps} updates: "
            "the learning rate only grows and never reaches its peak"
        )
    warnings += _idle_schedule_flags(schedule, given)
    settled = _last_rise(schedule)
    if schedule.average_last and schedule.averaged_updates > schedule.num_training_steps - settled:
        warnings.append(
            f"--average_last {schedule.average_last:g} reaches back to update "
            f"{schedule.num_training_steps - schedule.averaged_updates}, when the learning rate has still to rise, up "
            f"to update {settled}: such weights are far from the last ones"
        )
    if "num_training_steps" in given and schedule.max_train_tokens:
        warnings.append(
            f"--max_train_tokens replaces --num_training_steps: the run has {schedule.num_training_steps} updates"
        )
    return warnings


def _idle_subspace_flags(args: RunArgs, given: Collection[str]) -> list[str]:
    """Name the flags of subspaces by SVD among those `given` by name, beside another kind of subspace."""
    idle = [f"--{name}" for name in _OF_SVD if name in given]
    if not idle or not args.optimizer.is_low_rank or not args.subspace.projects or args.subspace.subspace == "svd":
        return []
    return [f"{_idle(idle)}: --subspace {args.subspace.subspace} makes no SVD and refreshes at a fixed interval"]


def _idle_optimizer_flags(args: RunArgs, given: Collection[str]) -> list[str]:
    """Name the flags of Adam among those `given` by name, beside an optimizer that has none."""
    name = args.optimizer.optimizer
    idle = [f"--{each}" for each in ("beta2", "adam_eps") if each in given and name in ("sgd", "adafactor")]
    return [f"{_idle(idle)}: --optimizer {name} has no second moment of Adam"] if idle else []


def _idle_run_flags(args: RunArgs, given: Collection[str]) -> list[str]:
    """Name the flags of text beside token ids, of compiled layers beside transformers' own, and of wandb without it."""
    warnings, dataset = [], args.data.dataset
    of_text = [f"--{name}" for name in ("text_column", "text_unit", "add_bos", "add_eos") if name in given]
    if of_text and isinstance(find_kind(dataset), TokenKind):
        warnings.append(f"{_idle(of_text)}: --dataset {dataset} holds token ids")
    if args.model.use_hf_model and args.model.compile == "on":
        warnings.append(
            "--compile on changes nothing: --use_hf_model runs transformers' layers, which are not compiled"
        )
    if "tags" in given and args.logging.resolved_wandb_mode == "off":
        warnings.append(f"{_idle(['--tags'])}: wandb is off")
    return warnings


def _by_layer_warnings(args: RunArgs) -> list[str]:
    """What --accumulate_by layer costs where it saves nothing."""
    if not args.by_layer:
        return []
    if args.batch.gradient_accumulation == 1:
        return [
            "--accumulate_by layer has one micro-batch an update and nothing to sum: it only recomputes every layer"
        ]
    if args.optimizer.per_layer:
        return []
    name = args.optimizer.optimizer
    other = f"{name}_per_layer" if f"{name}_per_layer" in _PER_LAYER else "an optimizer _per_layer"
    return [
        f"--accumulate_by layer saves no sums of gradients with --optimizer {name}, which keeps those of all layers "
        f"for its step: use {other}"
    ]


def _recomputes_every_mlp(model: ModelArgs) -> str:
    """What recomputes gate and up of every layer, so that none is rounded; empty where nothing does."""
    layers = read_config_json(model.model_config).get("num_hidden_layers")
    if not isinstance(layers, int):
        return ""
    if model.activation_checkpointing and len(model.recomputed(layers)) == layers:
        in_part = f" --checkpoint_layers {model.checkpoint_layers}" * (model.checkpoint_layers > 0)
        return f"--activation_checkpointing{in_part} recomputes every layer"
    every_mlp = model.recomputed_tensors(layers)["mlp"] == layers
    return f"--recompute {model.recompute} recomputes gate and up of every layer" if every_mlp else ""


def _unread_keys(model: ModelArgs) -> list[str]:
    """A sentence on keys of the model config that nothing reads; transformers' classes keep what they do not know."""
    if model.use_hf_model:
        return []
    raw = read_config_json(model.model_config)
    unknown = find_family(raw, model.model_config).unknown_keys(raw)
    named = [f"{key} (is {meant} meant?)" if meant else key for key, meant in unknown.items()]
    return [f"--model_config {model.model_config}: nothing reads {', '.join(named)}"] if named else []


def _idle_schedule_flags(schedule: ScheduleArgs, given: Collection[str]) -> list[str]:
    """Name the flags of other schedules among those `given` by name."""
    warnings, scheduler = [], schedule.scheduler
    if "restart_cycles" in given and scheduler != "cosine_restarts":
        warnings.append(f"--restart_cycles changes nothing: --scheduler {scheduler} has no restarts")
    idle = [f"--{name}" for name in ("decay_steps", "decay_shape") if name in given]
    if idle and scheduler != "wsd":
        warnings.append(f"{_idle(idle)}: --scheduler {scheduler} has no decay of its own length, as wsd has")
    if "min_lr_ratio" in given and scheduler == "constant":
        warnings.append(f"{_idle(['--min_lr_ratio'])}: --scheduler constant stays at the peak")
    return warnings


def _last_rise(schedule: ScheduleArgs) -> int:
    """The update from which on the learning rate only falls."""
    decay_steps = schedule.num_training_steps - schedule.warmup_steps
    if schedule.scheduler != "cosine_restarts" or decay_steps <= 0:
        return schedule.warmup_steps
    return schedule.num_training_steps - decay_steps // schedule.restart_cycles


def _idle(flags: list[str]) -> str:
    return f"{', '.join(flags)} {'change' if len(flags) > 1 else 'changes'} nothing"


def _activation_problems(args: RunArgs) -> list[str]:
    model, problems = args.model, []
    if model.int8_activations and model.use_hf_model:
        problems.append(
            "--int8_activations is for the project's own LLaMA: transformers' keeps its activations as they are; leave "
            "--int8_activations or --use_hf_model out"
        )
    if model.recompute and model.use_hf_model:
        problems.append(
            "--recompute is for the project's own LLaMA: transformers' recomputes every layer, with "
            "--activation_checkpointing; leave --recompute or --use_hf_model out"
        )
    if model.recompute and model.activation_checkpointing:
        problems.append(
            f"--activation_checkpointing recomputes all that --recompute {model.recompute} names: leave one out"
        )
    in_part = {"checkpoint_every": model.checkpoint_every > 1, "checkpoint_layers": model.checkpoint_layers > 0}
    for name in (name for name, given in in_part.items() if given):
        flag = f"--{name} {getattr(model, name)}"
        if model.recompute and not model.activation_checkpointing:
            names = [each.partition(":")[0].strip() for each in model.recompute.split(",")]
            counted = ",".join(f"{each}:{model.checkpoint_layers}" for each in names)
            instead = f"write --recompute {counted}, or " if name == "checkpoint_layers" else ""
            problems.append(
                f"{flag} is of whole layers, and --recompute {model.recompute} says itself in how many first layers: "
                f"{instead}leave --{name} out"
            )
        elif not model.activation_checkpointing:
            problems.append(f"{flag} needs --activation_checkpointing: nothing is recomputed")
        elif model.use_hf_model:
            problems.append(
                f"{flag} is for the project's own LLaMA: transformers' recomputes every layer; leave --{name} or "
                "--use_hf_model out"
            )
    if all(in_part.values()):
        problems.append(
            f"--checkpoint_every {model.checkpoint_every} and --checkpoint_layers {model.checkpoint_layers} both say "
            "which layers are recomputed: leave one out"
        )
    return problems


def _model_problems(args: RunArgs) -> list[str]:
    try:
        raw = read_config_json(args.model.model_config)
    except UserError as error:
        return [str(error)]
    try:
        family = find_family(raw, args.model.model_config)
        config = family.config(raw, args.model.model_config)
    except UserError as error:
        # transformers' class accepts more than ours, and judges its own configuration.
        return [] if args.model.use_hf_model else [str(error)]
    checks: list[Callable[[], None]] = [lambda: check_length(config, args.batch.max_length)]
    if args.method.method != "full":
        checks.append(lambda: check_method_rank(config, args.subspace.rank))
    problems = [] if args.model.use_hf_model else _family_problems(args, family)
    problems += _too_many_layers(args.model, config.num_hidden_layers, config.source)
    if args.optimizer.is_low_rank:
        layers, shapes = config.num_hidden_layers, config.matrix_shapes()
        problems += rank_problems(config.source, layers, shapes, *args.subspace.both_ranks)
        if not args.subspace.projects:
            checks.append(lambda: check_momentum_rank(config, args.subspace.momentum_rank))
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _too_many_layers(model: ModelArgs, layers: int, source: str) -> list[str]:
    """Name numbers of recomputed layers beyond those of the model."""
    given = {f"--checkpoint_layers {model.checkpoint_layers}": model.checkpoint_layers}
    for name, colon, count in (part.partition(":") for part in model.recompute.split(",")):
        given[f"--recompute {name}:{count}"] = int(count) if colon else 0
    return [
        f"{flag} is more than the {layers} layers of {source}: give at most {layers}"
        for flag, count in given.items()
        if count > layers
    ]


def _family_problems(args: RunArgs, family: ModelFamily[Any]) -> list[str]:
    """List the flags that ask for a feature which the model family lacks."""
    lacks = {
        "activation_checkpointing": ("cannot recompute its layers", family.recomputes_layers),
        "recompute": ("cannot recompute its layers", family.recomputes_layers),
        "int8_activations": ("keeps its activations as they are", family.int8_activations),
    }
    given = {flag: flag for flag in lacks if getattr(args.model, flag)}
    if args.quantization.fp8_head:
        lacks["fp8_head"] = "has a loss of its own", family.fp8_head
        given["fp8_head"] = "fp8_head"
    if args.by_layer:
        lacks["accumulate_by"] = "does not run a layer at a time", family.runs_by_layer
        given["accumulate_by"] = "accumulate_by layer"
    return [
        f"--{text} cannot work with a model of model_type {family.model_type!r}, which {lacks[flag][0]}: leave it out"
        for flag, text in given.items()
        if not lacks[flag][1]
    ]


def _batch_problems(args: RunArgs) -> list[str]:
    batch, ranks = args.batch, args.world_size
    a_pass = batch.batch_size * ranks
    if batch.gradient_accumulation * a_pass == batch.total_batch_size:
        return []
    product = f"--batch_size {batch.batch_size} x {ranks} rank{'s' if ranks > 1 else ''}"
    if batch.total_batch_size % a_pass == 0:
        return [
            f"--total_batch_size {batch.total_batch_size} is not {product} x --gradient_accumulation "
            f"{batch.gradient_accumulation} = {a_pass * batch.gradient_accumulation}: leave one of them out, or give "
            f"--gradient_accumulation {batch.total_batch_size // a_pass}"
        ]
    below = batch.total_batch_size // a_pass * a_pass
    nearest = f"{below} or {below + a_pass}" if below else str(a_pass)
    return [
        f"--total_batch_size {batch.total_batch_size} is no multiple of {product} = {a_pass}: "
        f"the nearest that work are {nearest}"
        if below
        else f"--total_batch_size {batch.total_batch_size} is less than {product} = {a_pass}: give at least {a_pass}, "
        "a smaller --batch_size or fewer ranks"
    ]


def _by_layer_problems(args: RunArgs) -> list[str]:
    if not args.by_layer:
        return []
    optimizer, problems = args.optimizer, []
    if args.model.use_hf_model:
        problems.append(
            "--accumulate_by layer is for the project's own networks, which run a layer at a time: leave "
            "--accumulate_by or --use_hf_model out"
        )
    if args.updates_immediately and optimizer.grad_clipping:
        problems.append(
            f"--grad_clipping {optimizer.grad_clipping:g} cannot work with --optimizer {optimizer.optimizer} and "
            "--accumulate_by layer: the global norm needs all gradients at once, and those of each layer are used and "
            f"freed before the next has any. Use --accumulate_by micro_batch, --grad_clipping 0, --norm_growth, or "
            f"{optimizer.optimizer[:-10]}"
        )
    if args.sums_in_momentum:
        problems.append(
            "--sum_in_momentum saves sums of gradients by rounding momenta with every micro-batch, and with "
            "--accumulate_by layer there are those of one layer: leave one of them out"
        )
    return problems


def _data_problems(args: RunArgs) -> list[str]:
    problems = []
    data = args.data
    try:
        on_hub = find_kind(data.dataset).needs_network
    except UserError as error:
        problems.append(str(error))
    else:
        for flag in ("dataset_config", "dataset_revision"):
            if (value := getattr(data, flag)) and not on_hub:
                problems.append(
                    f"--{flag} {value} is for a data set on the hub, and --dataset {data.dataset} is none: leave it out"
                )
    if data.tokenizer.startswith((".", "/")) and not Path(data.tokenizer).exists():
        problems.append(f"--tokenizer {data.tokenizer} does not exist: give a file, a folder or a name on the hub")
    if data.data_lanes % args.world_size:
        problems.append(
            f"--data_lanes {data.data_lanes} is not divisible by the {args.world_size} ranks: every rank reads equally "
            f"many logical shards, so use a number of ranks that divides it, or a new run with --data_lanes "
            f"{-(-data.data_lanes // args.world_size) * args.world_size}"
        )
    return problems


def _optimizer_problems(args: RunArgs) -> list[str]:
    optimizer, name = args.optimizer, args.optimizer.optimizer
    problems = []
    if args.updates_immediately and optimizer.grad_clipping and args.batch.gradient_accumulation == 1:
        problems.append(
            f"--grad_clipping {optimizer.grad_clipping:g} cannot work with --optimizer {name} at one micro-batch an "
            "update: the global norm needs all gradients at once, and each is used and freed inside the backward pass. "
            f"Use a smaller --batch_size with the same --total_batch_size, --grad_clipping 0, or {name[:-10]}"
        )
    if optimizer.grad_accum_dtype != "float32" and name in LIBRARY_OPTIMIZERS:
        problems.append(
            f"--grad_accum_dtype {optimizer.grad_accum_dtype} cannot work with --optimizer {name}, whose gradients add "
            "up in the weights' own --dtype: leave it out or use another optimizer"
        )
    if 0 < optimizer.norm_growth < 1:
        problems.append(
            f"--norm_growth {optimizer.norm_growth:g} would let gradients only shrink: give 1 or more, such as 1.01, "
            "or 0 for no limit"
        )
    if optimizer.norm_growth and name in LIBRARY_OPTIMIZERS:
        problems.append(f"--norm_growth cannot work with --optimizer {name}: use --grad_clipping, or leave it out")
    if optimizer.cautious_decay and (name in LIBRARY_OPTIMIZERS or name == "adam"):
        problems.append(
            f"--cautious_decay cannot work with --optimizer {name}: its decay is part of the gradient or another "
            "library's; leave it out or use another optimizer"
        )
    if optimizer.full_rank_second_moment != "value" and name in LIBRARY_OPTIMIZERS:
        problems.append(
            f"--full_rank_second_moment {optimizer.full_rank_second_moment} cannot work with --optimizer {name}, which "
            "is another library's: leave it out or use another optimizer"
        )
    return problems + _backend_problems(args)


def needs_own_adam8bit(args: RunArgs) -> list[str]:
    """The flags that bitsandbytes' 8-bit Adam does not have."""
    optimizer, found = args.optimizer, []
    if optimizer.cautious_decay:
        found.append("--cautious_decay")
    if optimizer.full_rank_second_moment != "value":
        found.append(f"--full_rank_second_moment {optimizer.full_rank_second_moment}")
    if args.model.dtype == "float16":  # small gradients vanish when they are divided by the loss scale and stored
        found.append("--dtype float16")
    return found


def _backend_problems(args: RunArgs) -> list[str]:
    if not args.optimizer.by_bitsandbytes:
        return []
    problems = [
        f"{flag} cannot work with --adam8bit_backend bitsandbytes, whose kernels do not have it: give "
        f"--adam8bit_backend own, or leave {flag.split()[0]} out"
        for flag in needs_own_adam8bit(args)
    ]
    if find_spec("bitsandbytes") is None:
        problems.append(
            "--adam8bit_backend bitsandbytes needs the package bitsandbytes, which is not installed: pip install "
            "'qgalore[train]', or give --adam8bit_backend own, which goes on from the states of either"
        )
    return problems


def _float16_problems(args: RunArgs) -> list[str]:
    optimizer, name = args.optimizer, args.optimizer.optimizer
    if args.model.dtype != "float16":
        if not optimizer.loss_scale:
            return []
        return [
            f"--loss_scale {optimizer.loss_scale:g} is for --dtype float16, and --dtype is {args.model.dtype}, which "
            "holds gradients as they are: leave it out"
        ]
    if name in LIBRARY_OPTIMIZERS:
        return [
            f"--dtype float16 cannot work with --optimizer {name}, which keeps gradients and states in the data type "
            "of the weights: use adamw or adam8bit, or --dtype float32"
        ]
    if args.sums_in_momentum:
        return [
            "--sum_in_momentum keeps gradients in momenta from one update to the next, and the loss scale of --dtype "
            "float16 would change what they are worth: leave it out, or use --dtype bfloat16"
        ]
    if args.updates_immediately and not optimizer.loss_scale:
        where, others = "at one micro-batch an update", "a smaller --batch_size with the same --total_batch_size"
        if args.by_layer:
            where, others = "and --accumulate_by layer", "--accumulate_by micro_batch"
        return [
            f"--dtype float16 cannot work with --optimizer {name} {where}: its loss scale is found by overflows, and "
            "where the gradient of a lower layer overflows the upper ones have been updated already. Use "
            f"{others}, {name[:-10]}, or a fixed --loss_scale such as 1024, with which an overflow goes back to the "
            "newest checkpoint"
        ]
    return []


def _quantization_problems(args: RunArgs) -> list[str]:
    quantization, name = args.quantization, args.optimizer.optimizer
    problems = []
    if quantization.weight_quant and not args.optimizer.is_q_galore:
        problems.append(
            f"--weight_quant cannot work with --optimizer {name}, which updates float weights: use q_galore_adamw8bit "
            "or q_galore_adamw8bit_per_layer, or leave --weight_quant out"
        )
    if not quantization.weight_quant:
        names = ("stochastic_round", "simulation", "int8_products")
        flags = [f"--{name}" for name in names if getattr(quantization, name)]
        if args.subspace.rounding_feedback and args.optimizer.is_low_rank:
            flags.append(f"--rounding_feedback {args.subspace.rounding_feedback:g}")
        # The name of a q_galore optimizer alone means quantized weights.
        right = "leave it or --no-weight_quant"
        if not args.optimizer.is_q_galore:
            right = "use a q_galore optimizer, or leave it"
        problems += [f"{flag} is about quantized weights: {right} out" for flag in flags]
    if args.subspace.proj_quant and not args.optimizer.is_low_rank:
        problems.append(
            f"--proj_quant cannot work with --optimizer {name}, which has no projections: use a galore or q_galore "
            "optimizer, or leave --proj_quant out"
        )
    return problems


def _int8_products_problems(args: RunArgs) -> list[str]:
    quantization = args.quantization
    if not quantization.int8_products:
        return []
    problems = []
    if quantization.weight_bits != 8:
        problems.append(
            f"--int8_products multiplies weights in 8 bits, not in --weight_bits {quantization.weight_bits}: use "
            "--weight_bits 8 or leave --int8_products out"
        )
    if quantization.simulation:
        problems.append(
            "--int8_products multiplies stored integers, and --simulation stores float weights: leave one out"
        )
    # A default cannot be distinguished from the same value on the command line, as in the recipes.
    if quantization.weight_group_size != type(quantization).weight_group_size:
        problems.append(
            f"--weight_group_size {quantization.weight_group_size} cannot work with --int8_products, which wants one "
            "scale for each row of a weight: leave one out"
        )
    return problems


def _fp8_products_problems(args: RunArgs) -> list[str]:
    if not args.quantization.fp8_products:
        given = [flag for flag in ("fp8_weight_gradients", "fp8_head") if getattr(args.quantization, flag)]
        return [f"--{flag} comes beside --fp8_products: give both, or leave it out" for flag in given]
    problems = []
    if not args.optimizer.is_low_rank:
        problems.append(
            f"--fp8_products is for the layers of the project's own optimizers, and --optimizer "
            f"{args.optimizer.optimizer} trains ordinary ones: use a galore or q_galore optimizer, or leave "
            "--fp8_products out"
        )
    if args.quantization.int8_products:
        problems.append("--fp8_products and --int8_products are two ways to multiply: leave one out")
    if args.model.dtype == "float16":
        problems.append(
            "--fp8_products gives values of bfloat16's range, which --dtype float16 does not hold: use --dtype "
            "bfloat16, which every GPU with FP8 has, or leave --fp8_products out"
        )
    return problems


def _subspace_problems(args: RunArgs) -> list[str]:
    if not args.optimizer.is_low_rank:
        return []
    problems = args.subspace.problems(lambda option: f"--{option} {getattr(args.subspace, option)}")
    if args.sums_in_momentum:
        problems += [
            scaled_too_late(f"--{flag} {value:g}", "--sum_in_momentum", f"give --{flag} 0")
            for flag in ("grad_clipping", "norm_growth")
            if (value := getattr(args.optimizer, flag))
        ]
    return problems


def _schedule_problems(args: RunArgs) -> list[str]:
    problems, schedule = [], args.schedule
    total, warmup, decay = schedule.num_training_steps, schedule.warmup_steps, schedule.decay_updates
    if schedule.scheduler == "cosine_restarts" and 0 < total - warmup < schedule.restart_cycles:
        problems.append(
            f"--restart_cycles {schedule.restart_cycles} is more than the {total - warmup} updates after the warm-up: "
            f"give at most {total - warmup}"
        )
    if schedule.scheduler != "wsd":
        return problems
    given = f"--decay_steps {schedule.decay_steps:g}"
    if decay < 2:
        # The first update of the decay still has the peak.
        problems.append(
            f"{given} of {total} updates is {decay}, and a decay takes 2: give a number of updates from 2 on, or "
            "--scheduler constant"
        )
    elif 0 < total - warmup < decay:
        are = "" if schedule.decay_steps >= 1 else f", {decay} updates,"
        problems.append(
            f"{given}{are} is more than the {total - warmup} of {total} updates after the warm-up: give at most "
            f"{total - warmup}, or fewer --warmup_steps"
        )
    if schedule.decay_shape == "exponential" and not schedule.min_lr_ratio:
        problems.append(
            "--decay_shape exponential never reaches --min_lr_ratio 0: give a ratio such as 0.01, or another shape"
        )
    return problems


def _run_problems(args: RunArgs) -> list[str]:
    problems = []
    if args.runtime.single_gpu and args.world_size > 1:
        problems.append(
            f"--single_gpu runs one process, torchrun started {args.world_size}: use --nproc_per_node 1 or leave "
            "--single_gpu out"
        )
    schedule = args.schedule
    if schedule.average_last and schedule.averaged_updates < 2:
        problems.append(
            f"--average_last {schedule.average_last:g} of {schedule.num_training_steps} updates is "
            f"{schedule.averaged_updates}, and a mean needs 2: give at least "
            f"{min(1.0, math.ceil(2000 / schedule.num_training_steps) / 1000):g}, or leave it out"
        )
    if args.logging.unset_wandb and args.logging.wandb_mode in ("online", "offline"):
        problems.append(
            f"--unset_wandb and --wandb_mode {args.logging.wandb_mode} contradict each other: leave one out"
        )
    if args.logging.tensorboard and find_spec("tensorboard") is None:
        problems.append(
            "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or leave "
            "--tensorboard out (metrics.jsonl has every metric)"
        )
    source = args.checkpoint.continue_from
    if source == "auto" and not args.checkpoint.save_dir:
        problems.append("--continue_from auto looks for checkpoints in --save_dir: give --save_dir")
    if source not in ("", "auto") and not Path(source).is_dir():
        fault = "is a file" if Path(source).exists() else "does not exist"
        problems.append(
            f"--continue_from {source} {fault}: give a folder step_... that run_pretrain.py wrote (safetensors and "
            "JSON; a pickle, which could run code, is never read), or auto"
        )
    return problems
