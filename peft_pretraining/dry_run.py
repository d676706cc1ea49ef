"""Describe a run for `--dry_run`: the resolved configuration, the run's first lines and the planned memory."""

from __future__ import annotations

import os

from peft_pretraining.build import shape_of
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.data.sources.kind import TextKind, TokenKind
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.summary import describe_split
from peft_pretraining.memory.card_memory import card_here
from peft_pretraining.memory.fit_tables import days_in_words
from peft_pretraining.memory.fp8_gain import warning_of_fp8_gain
from peft_pretraining.memory.host import missing_host_memory
from peft_pretraining.memory.plan import plan
from peft_pretraining.run_summary import summary_lines
from peft_pretraining.speed.cards import Card
from peft_pretraining.speed.direction_price import warning_of_direction
from peft_pretraining.speed.run_speed import counted_tokens_per_second


def print_description(args: RunArgs, refusal: str = "") -> None:
    """Print `describe`, once for all ranks; refusal: why the run would not start, for a first line."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"warning: this run would be refused: {refusal}\n{describe(args)}" if refusal else describe(args))


def describe(args: RunArgs, card: Card | None = None) -> str:
    """The text of `--dry_run`; nothing is built and nothing is written.

    card: that speeds are counted for; None: this machine's, or an H100.
    """
    config, device = shape_of(args.model), args.runtime.device
    lines = [*args.notes, *(f"warning: {warning}" for warning in args.warnings)]
    counted = card is not None or device != "cpu"
    card = card or card_here()
    for warning in filter(None, (warning_of_direction(args, config, card), warning_of_fp8_gain(args, config, card))):
        lines.append(f"warning: {warning}")
    if missing := missing_host_memory(args):
        lines.append(f"warning: {missing}")
    chosen = _chosen_by_others(args)
    for group in GROUPS:
        lines.append(f"{group}:")
        lines += [f"  --{name} {chosen.get(name, value)}" for name, value in vars(getattr(args, group)).items()]
    ranks = f"{args.world_size} x {'cuda, or cpu without one' if device == 'auto' else device}"
    lines += summary_lines(args, ranks, _data(args))
    if config is not None:
        lines.append(plan(args, config).table())
        if counted:
            speed = counted_tokens_per_second(args, config, card)
            time = _in_words(args.tokens_per_update * args.schedule.num_training_steps / speed / 3600)
            lines.append(f"speed: {speed:,.0f} tokens/s counted for {card.name}, where all updates take {time}")
    return "\n".join(lines)


def _in_words(hours: float) -> str:
    if hours < 1:
        return "less than an hour"
    return f"{days_in_words(hours)} hours" if hours < 48 else f"{days_in_words(hours / 24)} days"


def _data(args: RunArgs) -> list[str]:
    """Lines on the data, as of a run: local files are opened for it, and nothing over a network. Raises UserError."""
    kind, name, tokenizer = find_kind(args.data.dataset), args.data.dataset, args.data.tokenizer
    if not (kind.name or kind.needs_network):
        name = describe_split(open_dataset(name, "train", args.data.source_options))
    if isinstance(kind, TextKind) and not tokenizer:
        default = kind.default_tokenizer
        tokenizer = default if isinstance(default, str) else f"a BPE of {default.vocab_size:,} trained on it"
    return [f"training on {name}", *([] if isinstance(kind, TokenKind) else [f"tokenizer {tokenizer}"])]


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
