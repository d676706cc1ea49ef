"""Counted tokens a second of a run: the floor of its passes on a card, over the share of it that runs reach."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import Card
from peft_pretraining.speed.host_link import seconds_with_link
from peft_pretraining.speed.passes import Passes, seconds
from peft_pretraining.speed.update_passes import (
    Setting,
    adamw,
    all_passes,
    q_galore,
    recompute_tensors,
    rounded_activations,
)
from qgalore.config import FULL

SHARE_OF_FLOOR = 0.79
"""Of their floor's speed that runs reach. With it and `SECONDS_PER_KERNEL`, the two numbers that were fitted, what is
counted for an H100 is within 5 % of all rows in `measured_speeds.py`. For an H200, whose host others used, it is 4 to
19 % above them, and 36 % with micro-batches of 512 tokens (13B): `tests/test_run_speed.py`."""
MOST_OF_PUBLISHED = 0.57
"""Of a card's published bfloat16 rate that a run reaches at most, all its products counted: what the best of all
measured rows did, 13B on an H200 (3695cd6). Cards of which memory is fast beside their arithmetic, as consumer cards
are, are not promised more."""
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def counted_tokens_per_second(args: RunArgs, config: ModelConfig, card: Card) -> float:
    """Of all ranks of a run on such cards, messages between them not counted."""
    return args.tokens_per_update / counted_seconds(args, config, card)


def counted_seconds(args: RunArgs, config: ModelConfig, card: Card) -> float:
    """The time of an update of such a run."""
    s, ours = setting_of(args, config), args.optimizer.is_low_rank
    bare = replace(s, checkpointing=False, checkpoint_every=1, checkpoint_layers=0, tensors=())
    plain, again, rounding = _floors(bare, ours, card)
    repeated = [(s.recomputed, each) for each in again.values()] + [(count, again[name]) for name, count in s.tensors]
    parts = [(1, plain)] + [(s.grad_accum * count, each) for count, each in [*repeated, (s.rounded, rounding)]]
    by_floor = sum(count * each.seconds for count, each in parts) / SHARE_OF_FLOOR
    operations = sum(count * each.operations for count, each in parts)
    computing = max(by_floor, operations / (MOST_OF_PUBLISHED * card.tflops * 1e12))
    return seconds_with_link(args, s, computing, card.link_bytes_per_second)


def seconds_of_tensors(args: RunArgs, config: ModelConfig, card: Card) -> dict[str, float]:
    """The counted time that each tensor of a layer takes which is computed again, a micro-batch, by its name."""
    s = replace(setting_of(args, config), checkpointing=False, checkpoint_every=1, checkpoint_layers=0, tensors=())
    again = _floors(s, args.optimizer.is_low_rank, card)[1]
    return {name: each.seconds / SHARE_OF_FLOOR for name, each in again.items()}


class _Floor(NamedTuple):
    seconds: float
    operations: float


@lru_cache(maxsize=1 << 12)
def _floors(s: Setting, ours: bool, card: Card) -> tuple[_Floor, dict[str, _Floor], _Floor]:
    """Of an update in which nothing is computed again or rounded, and of both in a layer and micro-batch."""

    def floor(passes: Passes) -> _Floor:
        return _Floor(seconds(passes, card.ceilings), sum(each.operations for each in passes))

    plain = replace(s, int8_activations=False, has_fp8=card.fp8)
    update = q_galore(plain) if ours else adamw(plain, in_chunks=True)
    again = {name: floor(passes) for name, passes in recompute_tensors(s, ours).items()}
    return floor(all_passes(update)), again, floor(rounded_activations(s))


def setting_of(args: RunArgs, config: ModelConfig) -> Setting:
    """What decides the passes of a run; the mean of the ranks of attention and MLP stands for all matrices.

    Of accumulation by layers each pass of a micro-batch is counted as otherwise.
    """
    optimizer, subspace, model = args.optimizer, args.subspace, args.kept_activations
    of_both = (*subspace.ranks(), *subspace.ranks(of_mlp=True)) if optimizer.is_low_rank else ()
    ranks = [rank for rank in of_both if rank != FULL]
    return Setting(
        config,
        args.batch.batch_size,
        rank=round(sum(map(int, ranks)) / len(ranks)) if ranks else 0,
        grad_accum=args.batch.gradient_accumulation,
        checkpointing=model.activation_checkpointing or args.by_layer,
        length=args.batch.max_length,
        update_proj_gap=math.ceil(subspace.update_proj_gap),
        checkpoint_every=model.checkpoint_every,
        checkpoint_layers=model.checkpoint_layers,
        tensors=_tensors(model, config.num_hidden_layers),
        int8_activations=model.int8_activations,
        weight_bits=args.quantization.weight_format.stored_bits,
        basis_bits=subspace.proj_bits if subspace.proj_quant else None,
        sum_bytes=_BYTES[optimizer.grad_accum_dtype],
        direction=subspace.direction,
        newton_schulz=subspace.newton_schulz,
        products=args.quantization.weight_format.products,
        head_products=args.quantization.head_products,
    )


def _tensors(model: ModelArgs, layers: int) -> tuple[tuple[str, int], ...]:
    return tuple(model.recomputed_tensors(layers).items()) if model.recompute else ()
