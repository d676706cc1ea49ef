"""Whether the host has the memory that a run takes there for what would else be on its device."""

from __future__ import annotations

import os

from peft_pretraining.accumulation.host_memory import free_host_bytes
from peft_pretraining.build import shape_of
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.plan import plan


def missing_host_memory(args: RunArgs, free: int | None = None) -> str | None:
    """The sentence for a run whose ranks on this machine take more host memory than is free; None if it fits.

    free: bytes; None: what this machine says, and where it does not nothing is found missing.
    """
    config, free = shape_of(args.model), free_host_bytes() if free is None else free
    if not args.by_layer or config is None or free is None:
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = ranks * plan(args, config).host
    if needed <= free:
        return None
    of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
    return (
        f"--accumulate_by layer keeps {needed / 1e9:.2f} GB of hidden states{of_ranks} in host memory, of which "
        f"{free / 1e9:.2f} GB are free: {(needed - free) / 1e9:.2f} GB are missing. Free them, give a smaller "
        "--total_batch_size, or --accumulate_by micro_batch"
    )
