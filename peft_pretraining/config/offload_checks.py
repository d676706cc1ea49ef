"""What cannot be combined with layers that wait in host memory: `--offload`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS

if TYPE_CHECKING:
    from peft_pretraining.config.run_config import RunArgs


def offload_problems(args: RunArgs) -> list[str]:
    """List what cannot work with `--offload`, in sentences."""
    offload, name, problems = args.runtime.offload, args.optimizer.optimizer, list[str]()
    if offload == "none":
        return problems
    if name in LIBRARY_OPTIMIZERS:
        problems.append(
            f"--offload {offload} cannot work with --optimizer {name}, which is another library's and wants all states "
            "at once: use another optimizer, or --offload none"
        )
    if args.model.use_hf_model:
        problems.append(
            f"--offload {offload} runs the layers of the project's own models, and transformers' run theirs in their "
            "own way: leave --use_hf_model out, or use --offload none"
        )
    if args.method.method != "full":
        problems.append(
            f"--offload {offload} is for matrices that are trained, and --method {args.method.method} trains small "
            "ones beside them, whose states take no memory to speak of: use --method full, or --offload none"
        )
    if args.runtime.shard != "none":
        problems.append(
            f"--offload {offload} cannot work with --shard {args.runtime.shard}: either the host has what a rank does "
            "not need now, or other ranks have it. Leave one of them out"
        )
    if offload == "weights":
        problems += _problems_of_weights(args)
    return problems


def _problems_of_weights(args: RunArgs) -> list[str]:
    optimizer, problems = args.optimizer, list[str]()
    if not optimizer.is_low_rank or not args.quantization.stores_codes:
        problems.append(
            "--offload weights copies the codes of quantized weights, and those of this run are float: add "
            "--weight_quant with a q_galore or galore optimizer, or use --offload states"
        )
    if args.schedule.average_last:
        problems.append(
            f"--offload weights cannot work with --average_last {args.schedule.average_last:g}, which wants all "
            "weights on the device: use --offload states, or leave it out"
        )
    return problems


def offload_warnings(args: RunArgs) -> list[str]:
    """List what works and is probably not intended."""
    if args.runtime.offload != "none" and args.runtime.device == "cpu":
        return [
            f"--offload {args.runtime.offload} with --device cpu saves nothing: what waits on the host is in the same "
            "memory"
        ]
    return []
