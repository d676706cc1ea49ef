"""Whether all ranks of an update have summed the gradients of the same parameters, in the same order.

Each gradient is summed over the ranks as soon as the backward pass has it, by a collective of its own. Where a rank's
rows take another way through the model, as through other experts, gradients of two parameters would be added up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from peft_pretraining.errors import UserError
from peft_pretraining.runtime.world import World


def numbers_to_sum(names: Sequence[str]) -> list[int]:
    """A number that stands for the names, and its square: of equal ones alone the sums of both agree."""
    number = int.from_bytes(hashlib.blake2b("\n".join(names).encode(), digest_size=3).digest(), "big")
    return [number, number**2]


def check_trained_alike(world: World, names: Sequence[str], sums: Sequence[int], update_step: int) -> None:
    """Raise UserError on all ranks where they have not summed gradients of the same parameters.

    names: those that this rank has summed, in order; sums: over the ranks, of `numbers_to_sum`.
    """
    total, squares = sums
    if squares * world.world_size == total**2:
        return
    everyone = world.gather(list(names))
    found = []
    for rank, own in enumerate(everyone):
        alone = [name for name in own if not all(name in other for other in everyone)]
        found += [f"{', '.join(alone[:3])} on rank {rank} alone"] if alone else []
    raise UserError(
        f"update {update_step}: the ranks trained different parameters ({'; '.join(found) or 'in another order'}), as "
        "where a model sends rows through some of its parts: gradients were added to those of others. Train such a "
        "model on one rank (--single_gpu), or let every parameter take part in every pass"
    )


def names_of(summed: Iterable[Tensor], by_param: Mapping[Tensor, str]) -> list[str]:
    """The names of parameters, in order."""
    return [by_param[param] for param in summed]
