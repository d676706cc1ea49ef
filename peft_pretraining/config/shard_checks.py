"""What cannot be combined with weights that are dealt to ranks: `--shard`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.registry import find_family

if TYPE_CHECKING:
    from peft_pretraining.config.run_config import RunArgs


def shard_problems(args: RunArgs) -> list[str]:
    """List what cannot work with `--shard`, in sentences."""
    shard, problems = args.runtime.shard, list[str]()
    if args.runtime.nproc and not args.runtime.dry_run:
        problems.append(
            f"--nproc {args.runtime.nproc} is the number of ranks that --dry_run describes: start a run by torchrun "
            f"--nproc_per_node {args.runtime.nproc}, or add --dry_run"
        )
    if shard == "none":
        if args.runtime.shard_sums != "auto":
            problems.append(
                f"--shard_sums {args.runtime.shard_sums} is about matrices that have owners, and with --shard none "
                "none has: add --shard optimizer, or leave it out"
            )
        return problems
    problems += _sum_problems(args)
    if shard == "full":
        problems += _full_problems(args)
    ranks, matrices = ranks_that_share(args.world_size), _matrices(args)
    if matrices and ranks > matrices:
        problems.append(
            f"--shard {shard}: {ranks} ranks share a model of {matrices} matrices, and some would own none: use at "
            f"most {matrices} ranks a machine, or --shard none"
        )
    return problems


def _sum_problems(args: RunArgs) -> list[str]:
    shard, sums, problems = args.runtime.shard, args.runtime.shard_sums, list[str]()
    if sums == "rank" and args.sums_in_momentum:
        problems.append(
            "--sum_in_momentum cannot work with --shard_sums rank: each rank would sum in momenta of all matrices, and "
            f"with --shard {shard} only the owner of a matrix has one. Use --shard_sums owner, or leave one of them out"
        )
    elif sums == "rank" and shard == "full" and not args.by_layer:
        problems.append(
            "--shard full cannot work with --shard_sums rank: sums of all matrices on every rank are what it does "
            "without. Use --shard_sums owner, or --shard optimizer"
        )
    if sums == "owner" and args.by_layer:
        problems.append(
            "--accumulate_by layer keeps the sums of one layer at a time and sends them once: --shard_sums owner would "
            "only send more. Leave one of them out"
        )
    if sums == "owner" and args.optimizer.optimizer in LIBRARY_OPTIMIZERS:
        problems.append(
            f"--shard_sums owner cannot work with --optimizer {args.optimizer.optimizer}, which is another library's "
            "and sums in the gradients of all parameters: leave it out, or use another optimizer"
        )
    return problems


def _full_problems(args: RunArgs) -> list[str]:
    name, problems = args.optimizer.optimizer, list[str]()
    if name in LIBRARY_OPTIMIZERS:
        problems.append(
            f"--shard full cannot work with --optimizer {name}, which is another library's and wants all weights: use "
            "--shard optimizer, or another optimizer"
        )
    if args.method.method != "full":
        problems.append(
            f"--shard full deals the matrices that are trained, and --method {args.method.method} trains others beside "
            "them: use --shard optimizer, or --method full"
        )
    if args.model.use_hf_model:
        problems.append(
            "--shard full gathers the layers of the project's own models, and transformers' run theirs in their own "
            "way: use --shard optimizer, or leave --use_hf_model out"
        )
    if args.schedule.average_last:
        problems.append(
            f"--shard full cannot work with --average_last {args.schedule.average_last:g}, which the first rank makes "
            "of all weights: use --shard optimizer, or leave it out"
        )
    return problems


def shard_warnings(args: RunArgs) -> list[str]:
    """List what works and is probably not intended."""
    shard = args.runtime.shard
    if shard != "none" and args.world_size == 1:
        return [f"--shard {shard} changes nothing on one rank, which owns everything"]
    if args.runtime.check_replicas and args.world_size == 1:
        return ["--check_replicas changes nothing on one rank, which has no other to compare with"]
    return []


def ranks_that_share(world_size: int) -> int:
    """The ranks of a machine, as torchrun has started them; all where nothing says otherwise."""
    return min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))


def _matrices(args: RunArgs) -> int:
    """Matrices, embeddings and head; 0 for a model that only transformers' class knows."""
    if args.model.use_hf_model:
        return 0
    try:
        raw = read_config_json(args.model.model_config)
        config = find_family(raw, args.model.model_config).config(raw, args.model.model_config)
    except UserError:
        return 0  # which has a sentence already
    sizes = [*config.matrix_shapes().values()] * config.num_hidden_layers + config.other_shapes()
    return sum(len(size) > 1 for size in sizes)  # norms go along with others
