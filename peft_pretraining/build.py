"""Build the model, its optimizer and its data from the options of a run."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.config.flag_groups import DataArgs, ModelArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.data.eval_set import EvalSet, build_eval_set
from peft_pretraining.data.held_out import open_splits
from peft_pretraining.data.sources.documents import revision_of
from peft_pretraining.data.sources.kind import SourceOptions, Splits
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.summary import describe_data
from peft_pretraining.data.tokenizer import Added, Tokenizer, kept_tokenizers, load_tokenizer
from peft_pretraining.data.train_loader import TrainLoader, build_train_loader
from peft_pretraining.errors import UserError
from peft_pretraining.methods.convert import matrix_converter
from peft_pretraining.methods.planned import planned_converter
from peft_pretraining.models.build import build_on_meta, matrix_shapes, network_on_meta
from peft_pretraining.models.config import ModelConfig, rank_problems
from peft_pretraining.models.init import OnModule, materialize
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import read_config
from peft_pretraining.models.source_tokenizer import tokenizer_of_source
from peft_pretraining.optim.adam8bit_backend import backend_of, with_backend
from peft_pretraining.optim.build import build_optimizer, low_rank_converter
from peft_pretraining.optim.layer_execution import set_execution
from peft_pretraining.optim.protocol import TrainingOptimizer
from peft_pretraining.runtime.world import World
from qgalore.kernels import product_dtype
from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.slots import give_up
from qgalore.update.all_reduce import AllReduce


def shape_of(args: ModelArgs) -> ModelConfig | None:
    """The shape of the model to train; None where only transformers' class takes the configuration."""
    try:
        return read_config(args.model_config)
    except UserError:
        if args.use_hf_model:
            return None
        raise


def build_model(
    args: ModelArgs, device: torch.device | str = "cpu", seed: int = 0, on_module: OnModule | None = None
) -> CausalLM:
    """Build a freshly initialised model in training mode; `on_module` as in `materialize`. Raises UserError.

    With --init_from its parameters are zeros: they come from there, or from the checkpoint of a run that is resumed.
    """
    device = torch.device(device)
    model = build_on_meta(args.model_config, args.use_hf_model)
    layers = len(model.decoder_layers)
    if args.activation_checkpointing:
        again = args.recomputed(layers)
        model.gradient_checkpointing_enable(None if len(again) == layers else again)
    elif args.recompute:
        model.recompute(args.recomputed_tensors(layers))
    if args.int8_activations:
        model.keep_int8_activations()
    std, draws = model.config.initializer_range, not args.init_from
    materialize(model, device, getattr(torch, args.dtype), seed, on_module, std, draws)
    if compiles_layers(args, _compiling_pays(device)):
        model.compile_layers()
    return model.train()


def _compiling_pays(device: torch.device) -> bool:
    """Whether there is Triton for a GPU with bfloat16: else inductor refuses a layer whose weight has scales in it."""
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and product_dtype(device) == torch.bfloat16


def compiles_layers(args: ModelArgs, pays: bool) -> bool:
    """Whether to compile the decoder layers; pays: whether they run on a GPU of `_compiling_pays`."""
    return not args.use_hf_model and (args.compile == "on" or (args.compile == "auto" and pays))


def build_training(
    args: RunArgs, device: torch.device, all_reduce: AllReduce | None = None, mesh: ShardMesh | None = None
) -> tuple[CausalLM, TrainingOptimizer]:
    """Build the model on `device`, with decoder matrices in the format of the options, and its attached optimizer.

    Compiled layers and CUDA graphs are set up where the options allow them. all_reduce sums a tensor over the ranks in
    place; mesh deals the optimizer's states to them instead; None for one rank. Raises UserError for a configuration
    that does not work.
    """
    args = with_backend(args, backend_of(args, device))
    seed = args.runtime.seed
    convert = converter_of(args)
    if mesh is not None and args.gathers_layers:
        convert = _of_owned(convert, mesh)
    waiting: list[tuple[Tensor, Tensor]] = []
    if args.runtime.offload == "weights":
        convert = _on_host(convert, waiting)
    model = build_model(args.kept_activations, device, seed, on_module=convert)
    if products := args.quantization.head_products:
        model.multiply_head_in_fp8(products)
    if args.optimizer.is_low_rank:
        # Of our own models it was seen before anything was built; those of transformers tell their shapes here.
        shapes, layers = matrix_shapes(model), len(model.decoder_layers)
        if problems := rank_problems(args.model.model_config, layers, shapes, *args.subspace.both_ranks):
            raise UserError("; ".join(problems))
    optimizer = build_optimizer(model, args.optimizer, args.subspace, seed, all_reduce, mesh)
    while waiting:  # attached as tensors of the device, which they are while their layer runs
        tensor, value = waiting.pop()
        tensor.data = value
    set_execution(model, optimizer, args)
    return model, optimizer


def _of_owned(convert: OnModule, mesh: ShardMesh) -> OnModule:
    """A callback that also frees the decoder matrices that other ranks own, as soon as they are there."""

    def convert_and_free(model: CausalLM, name: str) -> None:
        convert(model, name)
        if mesh.owners.get(f"{name}.weight", mesh.rank) != mesh.rank and model.is_decoder_matrix(name):
            matrix = model.get_submodule(name)
            for tensor in (matrix.get_parameter("weight"), *matrix.buffers(recurse=False)):
                give_up(tensor)

    return convert_and_free


def _on_host(convert: OnModule, waiting: list[tuple[Tensor, Tensor]]) -> OnModule:
    """A callback that also moves decoder matrices to host memory, as soon as they are there: tensors and their values.

    The tensors keep shape and device, and no memory.
    """

    def convert_and_move(model: CausalLM, name: str) -> None:
        convert(model, name)
        if model.is_decoder_matrix(name):
            matrix = model.get_submodule(name)
            for tensor in (matrix.get_parameter("weight"), *matrix.buffers(recurse=False)):
                waiting.append((tensor, tensor.data.to("cpu", copy=True)))
                give_up(tensor)

    return convert_and_move


def converter_of(args: RunArgs) -> OnModule:
    """A callback for `build_model` that gives each decoder matrix the form that the run's flags say."""
    if args.method.method == "full":
        return low_rank_converter(args.optimizer, args.quantization)
    return matrix_converter(args.method, args.subspace.rank, args.runtime.seed, args.model.model_config)


def model_on_meta(args: RunArgs, config: ModelConfig) -> CausalLM:
    """Build the model of `build_training` without memory, and with one of its layers: they are alike."""
    model, convert = network_on_meta(config), low_rank_converter(args.optimizer, args.quantization)
    if args.method.method != "full":
        convert = planned_converter(args.method, args.subspace.rank)
    del model.decoder_layers[1:]
    for param in model.parameters():
        param.data = param.data.to(getattr(torch, args.model.dtype))
    for name, _ in list(model.named_modules()):
        convert(model, name)
    return model


def build_data(args: RunArgs, world: World) -> tuple[TrainLoader, EvalSet]:
    """Build the training loader and the validation set of `--dataset` for this rank."""
    data, batch = args.data, args.batch
    kind, options = find_kind(data.dataset), replace(data.source_options, stop=threading.Event())
    if kind.needs_network:
        # All ranks read the commit that the main rank finds to be the newest.
        newest = world.from_main(lambda: revision_of(open_dataset(data.dataset, "train", options)))
        options = replace(options, revision=newest or options.revision)
    # The main rank first: what it holds out, trains or downloads the others then find in the cache.
    opened: list[tuple[Splits, Tokenizer | None]] = []
    world.from_main(lambda: opened.append(_open_data(args, options)))
    splits, tokenizer = opened[0] if opened else _open_data(args, options)
    common: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size}
    common |= {"dataset": data.dataset, "tokenizer": tokenizer, "packing": data.packing, "max_length": batch.max_length}
    common |= {"damaged_limit": data.damaged_limit, "options": options}
    # A pause between two tries must not block the thread that gets the signals.
    workers = max(1, data.workers) if kind.needs_network else data.workers
    loader = build_train_loader(
        **common, source=splits.train, batch_size=batch.batch_size, grad_accum_steps=batch.gradient_accumulation,
        seed=args.runtime.seed, data_lanes=data.data_lanes, shuffle_buffer=data.shuffle_buffer, workers=workers,
        repeat=data.repeat,
    )  # fmt: skip
    if world.is_main:
        loader.about = partial(_about, data, splits, tokenizer, batch.max_length)
    evaluation = args.evaluation
    eval_set = build_eval_set(
        **common, source=splits.validation, eval_batch_size=evaluation.eval_batch_size,
        eval_tokens=evaluation.eval_tokens,
    )  # fmt: skip
    if not kind.needs_network:  # over a network the check would delay the start
        world.from_main(eval_set.check)
    return loader, eval_set


def _about(data: DataArgs, splits: Splits, tokenizer: Tokenizer | None, max_length: int) -> list[str]:
    """Lines that describe what a run reads."""
    # Nothing is read over a network here: while it fails, a stop signal would have to wait.
    reads = not find_kind(data.dataset).needs_network
    lines = describe_data(splits, tokenizer, data.packing, max_length, reads)
    unused = tokenizer is None and data.tokenizer
    return [*lines, f"--tokenizer {unused} has no effect: --dataset holds token ids already"] if unused else lines


def _open_data(args: RunArgs, options: SourceOptions) -> tuple[Splits, Tokenizer | None]:
    """Open both splits, and the tokenizer if they are text; a trained tokenizer sees no held-out document."""
    data, checkpoint = args.data, args.checkpoint
    splits = open_splits(data.dataset, options)
    if isinstance(splits.train, TokenFiles | TokenMixture):
        return splits, None
    kept = kept_tokenizers(checkpoint.save_dir, checkpoint.continue_from)
    added, name = Added(data.add_bos, data.add_eos), data.tokenizer
    if not name and args.model.init_from:
        name = tokenizer_of_source(args.model.init_from)
    return splits, load_tokenizer(name, data.dataset, added=added, options=options, source=splits.train, kept=kept)
