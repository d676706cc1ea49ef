"""What to tell a user whose device has less memory than a run is planned to take, or has run out of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from peft_pretraining.build import shape_of
from peft_pretraining.config.checks import adds_problems
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.config import ModelConfig
from qgalore.config import FULL


def warning_of_memory(args: RunArgs, device: torch.device) -> str | None:
    """A sentence for a run whose planned peak is above what is free on its CUDA device; None if it fits."""
    if device.type != "cuda" or (config := shape_of(args.model)) is None:
        return None
    free = torch.cuda.mem_get_info(device)[0]
    if plan(args, config).peak_bytes <= free:
        return None
    return f"it may run out of memory: {_comparison(args, config, free)}"


def out_of_memory(args: RunArgs, device: torch.device) -> str:
    """The sentence for a run that found no memory on its CUDA device."""
    save_dir, config = args.checkpoint.save_dir, shape_of(args.model)
    # What other processes and CUDA itself hold was never there for this one.
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    comparison = f": {_comparison(args, config, available)}" if config is not None else ""
    text = f"{device} has no memory left{comparison}. With --save_dir {save_dir} --continue_from auto "
    return f"{text}the same command, but for its --rank, goes on from the newest checkpoint"


def _comparison(args: RunArgs, config: ModelConfig, available: int) -> str:
    peak = plan(args, config).peak_bytes
    text = f"the run is planned to take {peak / 1e9:.1f} GB of {available / 1e9:.1f} (--dry_run says for what)"
    if peak <= available:
        return f"{text}, and took more; --activation_checkpointing or a smaller --batch_size takes less"
    fitting = flags_that_fit(args, config, available)
    return f"{text}; each of these alone would fit: {', '.join(fitting)}" if fitting else text


def flags_that_fit(args: RunArgs, config: ModelConfig, available: int) -> list[str]:
    """The smallest change of each kind that alone brings the planned peak to at most `available` bytes.

    The total batch stays what it is. What the checks would refuse is left out.
    """
    found: dict[str, str] = {}
    for flag, value, changed in _smaller(args, config):
        if flag in found or adds_problems(args, changed):  # which cannot be planned, either
            continue
        if plan(changed, config).peak_bytes <= available:
            found[flag] = f"{flag} {value}".strip()
    return list(found.values())


def _smaller(args: RunArgs, config: ModelConfig) -> Iterator[tuple[str, object, RunArgs]]:
    """Flags with values that take less, from little to much, and the arguments with them."""
    batch, model = args.batch, args.model
    if not model.activation_checkpointing:
        instead = f"instead of --recompute {model.recompute}" if model.recompute else ""
        values = {"activation_checkpointing": True, "checkpoint_every": 1, "recompute": ""}
        yield "--activation_checkpointing", instead, _with(args, "model", **values)
    elif model.checkpoint_every > 1:
        yield "--checkpoint_every", 1, _with(args, "model", checkpoint_every=1)
    elif model.checkpoint_layers:
        for count in range(model.checkpoint_layers + 1, config.num_hidden_layers + 1):
            yield "--checkpoint_layers", count, _with(args, "model", checkpoint_layers=count)
    if batch.gradient_accumulation > 1 and args.optimizer.grad_accum_dtype != "int8":
        yield "--grad_accum_dtype", "int8", _with(args, "optimizer", grad_accum_dtype="int8")
    if _fewer_by_layer(args):
        yield "--accumulate_by", "layer", _with(args, "batch", accumulate_by="layer")
    size, accumulation = batch.batch_size, batch.gradient_accumulation
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        changed = _with(args, "batch", batch_size=size, gradient_accumulation=accumulation)
        yield "--batch_size", f"{size} --gradient_accumulation {accumulation}", changed
    for eighths in (7, 6, 5, 4, 3, 2, 1) if args.optimizer.is_low_rank else ():
        whole, narrowest = FULL in args.subspace.ranks(), min(map(min, config.matrix_shapes().values()))
        rank = (narrowest if whole else args.subspace.config().dimensions) * eighths // 8
        if rank and (of_rank := _of_rank(args, rank)):
            yield "--rank", rank, of_rank


def _with(args: RunArgs, group: str, **options: object) -> RunArgs:
    changed = dataclasses.replace(getattr(args, group), **options)
    return dataclasses.replace(args, **{group: changed})


def _of_rank(args: RunArgs, rank: int) -> RunArgs | None:
    """`args` with what their command line means beside another --rank, such as another recipe; None if refused.

    Sizes of the batch may have been chosen for a budget, and not given.
    """
    batch, sums = args.batch, args.optimizer.grad_accum_dtype
    sizes = {
        "--batch_size": batch.batch_size,
        "--gradient_accumulation": batch.gradient_accumulation,
        "--total_batch_size": batch.total_batch_size,
        "--rank": rank,
    }
    flags = itertools.chain.from_iterable((flag, str(value)) for flag, value in sizes.items())
    try:
        there = parse_args([*args.command, *flags], args.world_size)
    except UserError:
        return None
    optimizer = dataclasses.replace(there.optimizer, grad_accum_dtype=sums)
    return dataclasses.replace(args, subspace=there.subspace, optimizer=optimizer)


def _fewer_by_layer(args: RunArgs) -> bool:
    """Whether sums of gradients over micro-batches are fewer where they are those of one layer at a time."""
    by_layer = dataclasses.replace(args, batch=dataclasses.replace(args.batch, accumulate_by="layer"))
    return by_layer.updates_immediately and not args.updates_immediately
