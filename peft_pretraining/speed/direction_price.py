"""What a direction costs where each micro-batch is an update: a warning with counted speeds."""

from __future__ import annotations

from dataclasses import replace

from peft_pretraining.config.checks import adds_problems
from peft_pretraining.config.flags import names_given
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import Card
from peft_pretraining.speed.run_speed import counted_tokens_per_second

_MANY, _MUCH = 32, 0.8
"""Micro-batches over which the price of a direction is spread, and the share of that speed below which it is told."""


def warning_of_direction(args: RunArgs, config: ModelConfig | None, card: Card) -> str | None:
    """A sentence for a run that orthogonalises its momenta so often that it takes much of its time; None for others.

    config: None for a model that is not planned. Speeds are counted for a card.
    """
    batch, optimizer = args.batch, args.optimizer
    if config is None or not optimizer.is_low_rank or args.subspace.direction == "adam":
        return None
    many = max(_MANY, batch.gradient_accumulation)
    grown = replace(batch, gradient_accumulation=many, total_batch_size=many * batch.batch_size * args.world_size)
    grown_args = replace(args, batch=grown)
    spread = replace(grown_args, optimizer=replace(optimizer, grad_accum_dtype="int8"))
    now, then = (counted_tokens_per_second(each, config, card) for each in (args, spread))
    if now >= _MUCH * then:
        return None
    often = batch.gradient_accumulation
    each_time = "every micro-batch" if often == 1 else f"every {often} micro-batches"
    in_momenta = replace(grown_args, subspace=replace(args.subspace, sum_in_momentum=True))
    sums = " with --grad_accum_dtype int8"
    if args.by_layer:
        sums = ""
    elif not adds_problems(args, in_momenta):
        sums = " with --sum_in_momentum, which sums in no memory of its own"
    return (
        f"an update {each_time} of {batch.batch_size * batch.max_length:,} tokens orthogonalises all momenta: "
        f"{now:,.0f} tokens/s counted for {card.name}, and {then:,.0f} with {many} micro-batches an update, for which "
        f"the direction is meant. Give a larger --total_batch_size{sums}{_or_another_direction(args)}"
    )


def _or_another_direction(args: RunArgs) -> str:
    """The advice of Adam's direction, by the recipe where that chose the direction; "" where a flag refuses it."""
    if adds_problems(args, replace(args, subspace=replace(args.subspace, direction="adam"))):
        return ""
    given = "direction" in names_given(args.command)
    return f", or {'--direction adam' if given else '--recipe paper'}, whose direction costs little at any batch"
