"""The first lines of a run, by which one sees that it is the one that was meant; `--dry_run` prints them, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from peft_pretraining.build import shape_of
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.optim.lr_schedule import describe_schedule
from qgalore.update.newton_schulz import method_of

_LABELS = {"training on ": "data", "validation on ": "validation", "tokenizer ": "tokenizer"}
"""The beginnings of lines on the data that have a label of their own, which is said instead; others stand below."""


_WIDTH = max(map(len, _LABELS.values()))


def summary_lines(
    args: RunArgs,
    device: str,
    data: Sequence[str] = (),
    parameters: int | None = None,
) -> list[str]:
    """Aligned lines on what a run trains, how, on what and where, and below them what else is to say of its data.

    device: in words; data: lines of `data.summary`, and on the tokenizer; parameters: their number, where the model is
    built: one that only transformers' class takes cannot be counted before.
    """
    config = shape_of(args.model)
    told = [
        (label, line.removeprefix(start)) for start, label in _LABELS.items() for line in data if line.startswith(start)
    ]
    rest = [line for line in data if not line.startswith(tuple(_LABELS))]
    pairs = [
        ("model", _model(args, config, parameters)),
        ("weights", _weights(args, config)),
        *([("method", _method(args, config))] if args.method.method != "full" else []),
        ("optimizer", _optimizer(args)),
        *([("subspace", _subspace(args, config))] if args.optimizer.is_low_rank else []),
        ("rates", _rates(args)),
        ("schedule", describe_schedule(args.schedule)),
        ("updates", _updates(args)),
        ("memory", _memory(args, config)),
        *told,
        ("device", device),
        ("folder", args.checkpoint.save_dir or "a new one in checkpoints"),
    ]
    return [*(f"{label:<{_WIDTH}}  {text}" for label, text in pairs), *rest]


def _model(args: RunArgs, config: ModelConfig | None, parameters: int | None) -> str:
    path = Path(args.model.model_config)
    name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    if config is None:
        return f"{name}, transformers' own class" + (f", {_millions(parameters)} parameters" if parameters else "")
    of_hf, layers = ", transformers' own class" if args.model.use_hf_model else "", config.num_hidden_layers
    return (
        f"{name}, {_millions(config.parameter_count())} parameters, {layers} layer{'s' if layers > 1 else ''}, "
        f"width {config.hidden_size}{of_hf}"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _weights(args: RunArgs, config: ModelConfig | None) -> str:
    """The values in each format of the stored weights."""
    format, dtype = args.quantization.weight_format, args.model.dtype
    if args.method.method == "qlora":
        return f"those that are trained in {dtype}"
    if format.bits is None:
        in_fp8 = "decoder and head" if args.quantization.fp8_head else "decoder"
        return f"all in {dtype}{f', {in_fp8} products in FP8' if format.fp8_products else ''}"
    group = "a row" if format.int8_products else f"{format.group_size}"
    rounding = "rounded stochastically" if format.stochastic_rounding else "rounded to nearest"
    rounding += ", multiplied in FP8" if format.fp8_products else ""
    rounding += " for gradients, too" if format.fp8_weight_gradients else ""
    rounding += ", the head as well" if args.quantization.fp8_head else ""
    stored = f"INT{format.bits} in groups of {group}"
    stored = f"{dtype} on the grid of {stored} (simulation)" if format.simulate else stored
    if config is None:
        return f"the decoder's matrices in {stored}, {rounding}; others in {dtype}"
    matrices = config.num_hidden_layers * sum(map(math.prod, config.matrix_shapes().values()))
    others = config.parameter_count() - matrices
    return f"{_millions(matrices)} in {stored}, {rounding}; {_millions(others)} in {dtype}"


def _method(args: RunArgs, config: ModelConfig | None) -> str:
    """What is trained of the decoder's matrices, and what is frozen."""
    method, rank = args.method, args.subspace.rank
    forms = {4: "NF4", 8: "8 bits"}
    frozen = forms[method.qlora_bits] if method.method == "qlora" else args.model.dtype
    text = (
        f"{method.method}, adapters of rank {rank} and alpha {method.lora_alpha:g} beside matrices frozen in {frozen}"
    )
    if method.method == "low_rank":
        text = f"low_rank, each matrix the product of two factors of rank {rank}"
    elif method.lora_dropout:
        text += f", dropout {method.lora_dropout:g}"
    if method.method == "relora":
        text += (
            f", merged every {method.relora_every:,} updates with {method.relora_prune:.3g} of their states set to "
            f"zero and {method.relora_warmup:,} updates of warm-up"
        )
    if config is None or not isinstance(rank, int):
        return f"{text}; all else trains in full"
    shapes, layers = config.matrix_shapes().values(), config.num_hidden_layers
    factors = layers * rank * sum(map(sum, shapes))
    others = config.parameter_count() - layers * sum(map(math.prod, shapes))
    return f"{text}; trains {_millions(factors)} values of these and all {_millions(others)} others"


def _optimizer(args: RunArgs) -> str:
    optimizer = args.optimizer
    parts = [f"{optimizer.optimizer} by bitsandbytes" if optimizer.by_bitsandbytes else optimizer.optimizer]
    if optimizer.is_low_rank:
        parts += [f"recipe {optimizer.recipe}", f"direction {args.subspace.direction}"]
    if optimizer.grad_clipping:
        parts.append(f"clipping at {optimizer.grad_clipping:g}")
    if optimizer.norm_growth:
        parts.append(f"norms of gradients grow by {optimizer.norm_growth:g} at most")
    return ", ".join(parts)


def _subspace(args: RunArgs, config: ModelConfig | None) -> str:
    subspace, steps = args.subspace, _steps(args, config)
    rank = f"rank {subspace.rank}" + (
        f", {subspace.mlp_rank} in the MLP" if subspace.mlp_rank not in (0, subspace.rank) else ""
    )
    if not subspace.projects:
        return f"{rank}: no projections; scale {subspace.galore_scale:g}{steps}"
    basis = f"INT{subspace.proj_bits}" if subspace.proj_quant else "float"
    return (
        f"{rank}, {subspace.subspace}, {basis} projections, a refresh every {subspace.update_proj_gap} updates, "
        f"scale {subspace.galore_scale:g}{steps}"
    )


def _steps(args: RunArgs, config: ModelConfig | None) -> str:
    """That momenta are orthogonalised in FP8, always or on a GPU that has it, and of how many matrices of a layer."""
    if config is None or args.subspace.direction == "adam":
        return ""
    rows = [min(matrix.gradient_shape) for matrix in PlannedRun(args, config).matrices]

    def count(has_fp8: bool) -> int:
        return sum(method_of(args.newton_schulz, each, lambda _: has_fp8).fp8 for each in rows)

    always, possible = count(False), count(True)
    if not possible:
        return ""
    of = "" if possible == len(rows) else f" of {possible} of {len(rows)} matrices a layer"
    return f"; momenta{of} orthogonalised in FP8{'' if always else ' on a GPU that has it'}"


def _rates(args: RunArgs) -> str:
    optimizer = args.optimizer
    rates = f"lr {optimizer.lr:.3g}, weight decay {optimizer.weight_decay:.3g}"
    rest = (optimizer.peak_full_rank_lr, optimizer.decay_of_full_rank)
    if rest == (optimizer.lr, optimizer.weight_decay):
        return rates
    return f"{rates}; of embeddings, head and norms {rest[0]:.3g} and {rest[1]:.3g}"


def _updates(args: RunArgs) -> str:
    tokens, schedule = args.tokens_per_update, args.schedule
    micro = f" in {args.batch.gradient_accumulation} micro-batches" if args.batch.gradient_accumulation > 1 else ""
    return (
        f"{schedule.num_training_steps:,} of {tokens:,} tokens ({args.batch.total_batch_size} sequences of "
        f"{args.batch.max_length}{micro}), {_count(tokens * schedule.num_training_steps)} in all"
    )


def _count(tokens: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if tokens >= size:
            return f"{tokens / size:,.3g} {word}" if tokens < 1000 * size else f"{tokens / size:,.0f} {word}"
    return f"{tokens:,}"


def _memory(args: RunArgs, config: ModelConfig | None) -> str:
    if config is None:
        return "not planned for what only transformers reads"
    planned = plan(args, config)
    here = f"{(planned.weights_and_states_bytes - planned.waiting) / 1e9:.3g}"
    on_host = f"; {planned.host / 1e9:.3g} GB of host memory" if planned.host else ""
    return f"{planned.peak_bytes / 1e9:.3g} GB planned a rank, {here} of it weights and optimizer states{on_host}"
