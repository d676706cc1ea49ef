"""Deal weights to ranks so that states, time of updates and bytes on the wire balance.

Whole weights are dealt, since orthogonalisation, a subspace and a refresh need a matrix as a whole. A model's matrices
are many and of few sizes, for which the greedy rule is as good as any: the largest first, each to the rank with least.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

SMALL = 1 << 16
"""Values up to which a weight goes along with a larger one of its layer: a message of its own would cost more."""
_LAYER = re.compile(r"(.*?\.\d+)\.")


class Load(NamedTuple):
    """What a weight costs the rank that owns it."""

    name: str
    values: int
    cost: float
    """In any unit: `cost_of`."""


def cost_of(values: int, gradient_values: int) -> float:
    """What owning a weight costs: bytes of two 8-bit moments of its gradient, and of what an update rewrites."""
    return 2.0 * gradient_values + values


def layer_of(name: str) -> str:
    """The name of the layer of a stack that a parameter belongs to; its own name where it belongs to none."""
    found = _LAYER.match(name)
    return found.group(1) if found else name


def deal(loads: Sequence[Load], ranks: int) -> list[int]:
    """The rank that owns each weight; the same on every rank, since it depends on the arguments alone."""
    owners, costs = [0] * len(loads), [0.0] * ranks
    of_layer: dict[str, int] = {}
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index].cost, index)):
        load = loads[index]
        if load.values > SMALL:
            owner = min(range(ranks), key=lambda rank: (costs[rank], rank))
            costs[owner] += load.cost
            owners[index] = of_layer[layer_of(load.name)] = owner
    for index, load in enumerate(loads):
        if load.values <= SMALL:
            owners[index] = of_layer.get(layer_of(load.name), index % ranks)
    return owners
