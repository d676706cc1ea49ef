"""Newton-Schulz steps that are the same on all ranks, where only some of their GPUs have products in FP8.

Each rank updates its own copy of the weights, and copies drift apart where directions are not the same.
"""

from __future__ import annotations

import dataclasses

import torch

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.config.shard_checks import ranks_that_share
from peft_pretraining.runtime.world import World
from qgalore.kernels import has_fp8, use_triton
from qgalore.update.newton_schulz import AUTO


def with_steps_of_all(args: RunArgs, world: World) -> RunArgs:
    """The arguments, with Muon's steps in the place of `auto` where that would be FP8 on some ranks alone.

    With --shard on one machine each weight has one rank that updates it for all, and may do so as its GPU can.
    """
    one_copy = args.runtime.shard != "none" and ranks_that_share(world.world_size) == world.world_size
    if world.world_size == 1 or args.newton_schulz != AUTO or one_copy:
        return args
    everyone = world.gather(_makes_fp8(world.device))
    if len(set(everyone)) == 1:
        return args
    note = (
        f"--newton_schulz muon instead of auto: {sum(everyone)} of {len(everyone)} ranks have products in FP8, and all "
        "make the same steps, so that their weights stay the same"
    )
    subspace = dataclasses.replace(args.subspace, newton_schulz="muon")
    return dataclasses.replace(args, subspace=subspace, notes=(*args.notes, note))


def _makes_fp8(device: torch.device) -> bool:
    """Whether `auto` is FP8 on a device, for matrices that gain by it."""
    return has_fp8(device) and use_triton(device)
