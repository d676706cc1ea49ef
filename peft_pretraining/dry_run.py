"""Describe a run for `--dry_run`: the resolved configuration, the model's size and the planned memory."""

from __future__ import annotations

import os

from peft_pretraining.build import shape_of
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.summary import describe_split
from peft_pretraining.memory.plan import plan
from peft_pretraining.optim.lr_schedule import describe_schedule


def print_description(args: RunArgs) -> None:
    """Print `describe`, once for all ranks."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(args))


def describe(args: RunArgs) -> str:
    """The text of `--dry_run`; nothing is built and nothing is written."""
    config, data = shape_of(args.model), _data(args)
    updates, tokens = args.schedule.num_training_steps, args.tokens_per_update
    lines = [*args.notes, *(f"warning: {warning}" for warning in args.warnings)]
    chosen = _chosen_by_others(args)
    for group in GROUPS:
        lines.append(f"{group}:")
        lines += [f"  --{name} {chosen.get(name, value)}" for name, value in vars(getattr(args, group)).items()]
    if config is not None:
        lines.append(
            f"model: {config.parameter_count() / 1e6:,.1f} M parameters, {config.num_hidden_layers} layers, "
            f"width {config.hidden_size}"
        )
    lines += [
        f"run: {updates:,} updates of {args.batch.total_batch_size} sequences of {args.batch.max_length} tokens "
        f"({tokens:,}), {updates * tokens / 1e9:,.2f} billion tokens, on {args.world_size} rank(s)",
        f"learning rate: {describe_schedule(args.schedule)}",
        *([f"data: {data}"] if data else []),
        plan(args, config).table() if config is not None else "memory: not planned for what only transformers reads",
    ]
    return "\n".join(lines)


def _data(args: RunArgs) -> str:
    """Describe the training data if it is in local files, which are opened for it; else "". Raises UserError."""
    kind = find_kind(args.data.dataset)
    if kind.name or kind.needs_network:
        return ""
    return describe_split(open_dataset(args.data.dataset, "train", args.data.source_options))


def _chosen_by_others(args: RunArgs) -> dict[str, object]:
    """The resolved values of flags whose default depends on other flags."""
    values: dict[str, object] = {
        "full_rank_lr": args.optimizer.peak_full_rank_lr,
        "full_rank_weight_decay": args.optimizer.decay_of_full_rank,
        "rotate_moments": args.subspace.rotates_moments,
        "wandb_mode": args.logging.resolved_wandb_mode,
    }
    if args.optimizer.optimizer not in ("sgd", "adafactor", "muon"):
        values["beta1"] = args.optimizer.adam_beta1
    return values
