"""Where products in FP8 save too little time for a rounding: a warning with counted speeds."""

from __future__ import annotations

from dataclasses import replace

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.choice import WORTH_ROUNDING
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import Card
from peft_pretraining.speed.run_speed import counted_tokens_per_second


def warning_of_fp8_gain(args: RunArgs, config: ModelConfig | None, card: Card) -> str | None:
    """A sentence for a run whose products in FP8 save less than a rounding is worth; None for others.

    config: None for a model that is not planned. Speeds are counted for a card.
    """
    if config is None or not args.quantization.fp8_products:
        return None
    plain = replace(args.quantization, fp8_products=False, fp8_weight_gradients=False, fp8_head=False)
    without, found = (
        counted_tokens_per_second(each, config, card) for each in (replace(args, quantization=plain), args)
    )
    if found >= WORTH_ROUNDING * without:
        return None
    return (
        f"--fp8_products: {found:,.0f} tokens/s counted for {card.name}, and {without:,.0f} without. Leave it out: "
        "products of a narrow model wait for memory, and FP8 is for wider ones"
    )
