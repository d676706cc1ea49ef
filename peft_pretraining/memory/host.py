"""Whether the host has the memory that a run takes there for what would else be on its device."""

from __future__ import annotations

import os

from peft_pretraining.accumulation.host_memory import free_host_bytes
from peft_pretraining.build import shape_of
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.plan import plan


def not_locked(args: RunArgs, error: Exception) -> str:
    """The sentence for a run whose host does not lock the memory of `--offload`."""
    return (
        f"--offload {args.runtime.offload}: {error}, which is to hold what waits for its layer. Lift the limit, if "
        "`ulimit -l` names one, or use --offload none"
    )


def missing_host_memory(args: RunArgs, free: int | None = None) -> str | None:
    """The sentence for a run whose ranks on this machine take more host memory than is free; None if it fits.

    free: bytes; None: what this machine says, and where it does not nothing is found missing.
    """
    config, free = shape_of(args.model), free_host_bytes() if free is None else free
    offload = args.runtime.offload
    if not (args.by_layer or offload != "none") or config is None or free is None:
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    planned = plan(args, config)
    needed = ranks * planned.host
    if needed <= free:
        return None
    kept, advice = list[str](), list[str]()
    of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
    if args.by_layer:
        kept.append(
            f"--accumulate_by layer keeps {ranks * planned.hidden_states / 1e9:.2f} GB of hidden states{of_ranks}"
        )
        advice += ["give a smaller --total_batch_size", "--accumulate_by micro_batch"]
    if offload != "none":
        what = "weights and optimizer states" if offload == "weights" else "optimizer states"
        kept.append(f"--offload {offload} keeps {ranks * planned.waiting / 1e9:.2f} GB of {what}{of_ranks}")
        advice.append("--offload states" if offload == "weights" else "--offload none")
    *first, last = advice
    missing = f"of which {free / 1e9:.2f} GB are free: {(needed - free) / 1e9:.2f} GB are missing"
    return (
        f"{' and '.join(kept)} in host memory, {missing}. Free them, "
        f"{', '.join([*first, f'or {last}'] if first else [f'or use {last}'])}"
    )
