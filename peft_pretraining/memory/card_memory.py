"""What a run may take of the memory of this machine's card."""

from __future__ import annotations

import os

import torch

from peft_pretraining.config.flags import format_size
from peft_pretraining.errors import UserError
from peft_pretraining.speed.cards import CARDS, Card

SHARE_OF_CARD, MARGIN = 0.94, 0.03
"""Of a card's memory what a run may take by default, and what is kept free beside what others hold."""


def memory_of_card(world_size: int) -> tuple[int, Card] | None:
    """What a run may take of this rank's card, by default, and the card; None without one."""
    if not torch.cuda.is_available():
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    if local_rank >= torch.cuda.device_count():
        return None  # which the start of the ranks refuses
    return default_budget(*torch.cuda.mem_get_info(local_rank), world_size), card_here()


def default_budget(free: int, total: int, world_size: int = 1) -> int:
    """What a run may take of a card in bytes: a fixed share of it, and no more than is free but for a margin.

    A share of the whole, so that a run on a card of its own chooses the same each time it starts; and of the whole
    alone where ranks must choose alike.
    """
    whole = int(SHARE_OF_CARD * total)
    return whole if world_size > 1 else min(whole, free - int(MARGIN * total))


def check_card(budget: int, total: int, name: str) -> None:
    """Refuse a budget beyond the memory of the device, `total` bytes: UserError."""
    if budget > total:
        raise UserError(
            f"--memory_budget {format_size(budget)} is more than the {total / 1e9:.1f} GB of this machine's {name}: "
            f"give at most {format_size(total // 10**9 * 10**9)}, of which the context of CUDA takes a part"
        )


def card_here() -> Card:
    """The card of this machine, as far as its speed is known; else an H100, for which counts were compared."""
    name = torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else ""
    known = {each.device or f"NVIDIA {each.name}": each for each in CARDS.values()}
    return known.get(name, CARDS["h100"])
