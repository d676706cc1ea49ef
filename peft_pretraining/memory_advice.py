"""What to tell a user whose device has less memory than a run is planned to take, or has run out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from peft_pretraining.args import RunArgs
from peft_pretraining.dry_run import plan
from peft_pretraining.model_config import LlamaConfig


def warning_of_memory(args: RunArgs, device: torch.device) -> str | None:
    """A sentence for a run whose planned peak is above what is free on its CUDA device; None if it fits."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    return f"it may run out of memory: {_comparison(args, free)}" if _peak(args) > free else None


def out_of_memory(args: RunArgs, device: torch.device) -> str:
    """The sentence for a run that found no memory on its CUDA device."""
    total = torch.cuda.get_device_properties(device).total_memory
    return (
        f"{device} has no memory left: {_comparison(args, total)}. Its checkpoints are whole: the same command with "
        "--continue_from auto goes on from the newest"
    )


def _comparison(args: RunArgs, available: int) -> str:
    text = f"the run is planned to take {_peak(args) / 1e9:.1f} GB of {available / 1e9:.1f} (--dry_run says for what)"
    fitting = flags_that_fit(args, available)
    return f"{text}; each of these alone would fit: {', '.join(fitting)}" if fitting else text


def flags_that_fit(args: RunArgs, available: int) -> list[str]:
    """Changes of one flag each that bring the planned peak to at most `available` bytes, of each flag the smallest."""
    found: dict[str, str] = {}
    for flag, value, changed in _smaller(args):
        if flag not in found and _peak(changed) <= available:
            found[flag] = f"{flag} {value}".strip()
    return list(found.values())


def _peak(args: RunArgs) -> int:
    return plan(args, LlamaConfig.from_json(args.model.model_config)).peak_bytes


def _smaller(args: RunArgs) -> Iterator[tuple[str, object, RunArgs]]:
    """Flags with values that take less, from little to much, and the arguments they would give."""
    batch, optimizer = args.batch, args.optimizer
    if not args.model.activation_checkpointing:
        yield "--activation_checkpointing", "", _with(args, "model", activation_checkpointing=True)
    if batch.gradient_accumulation > 1 and optimizer.grad_accum_dtype != "int8":
        yield "--grad_accum_dtype", "int8", _with(args, "optimizer", grad_accum_dtype="int8")
    size, accumulation = batch.batch_size, batch.gradient_accumulation
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        yield "--batch_size", size, _with(args, "batch", batch_size=size, gradient_accumulation=accumulation)
    if optimizer.is_low_rank:
        for eighths in (7, 6, 5, 4, 3, 2, 1):
            rank = args.subspace.rank * eighths // 8
            if rank:
                yield "--rank", rank, _with(args, "subspace", rank=rank)


def _with(args: RunArgs, group: str, **values: Any) -> RunArgs:
    """The arguments with other values in one of their groups."""
    changed: dict[str, Any] = {group: dataclasses.replace(getattr(args, group), **values)}
    return dataclasses.replace(args, **changed)
