"""Deal weights to ranks so that states, time of updates and bytes on the wire balance.

Whole matrices are dealt, since orthogonalisation, a subspace and a refresh need them so. A model's matrices are many
and of few sizes, for which the greedy rule is as good as any: the largest first, each to the rank with least.
Embeddings and head are few and the largest of all; Adam moves each of their values by itself, so every rank gets some
of their rows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from qgalore.update.moments import BLOCK_SIZE, MIN_8BIT_NUMEL

LARGE = 1 << 16
"""Values from which on a weight may be dealt by rows."""
_LAYER = re.compile(r"(.*?\.\d+)\.")


class Load(NamedTuple):
    """What a weight costs the rank that owns it."""

    name: str
    values: int
    cost: float
    """In any unit: `cost_of`."""
    is_vector: bool = False
    """Whether it is a norm or a bias, which goes along with a matrix of its layer."""
    divisible: bool = False
    """Whether rows of it can be updated apart from others."""


def cost_of(values: int, gradient_values: int) -> float:
    """What owning a weight costs: bytes of two 8-bit moments of its gradient, and of what an update rewrites."""
    return 2.0 * gradient_values + values


def layer_of(name: str) -> str:
    """The name of the layer of a stack that a parameter belongs to; its own name where it belongs to none."""
    found = _LAYER.match(name)
    return found.group(1) if found else name


def row_ranges(shape: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """The rows start:stop of a matrix of each of so many ranks: of about equal size, whole blocks of an 8-bit state."""
    rows, columns = shape[0], math.prod(shape[1:])
    step = BLOCK_SIZE // math.gcd(columns, BLOCK_SIZE)
    bounds = [min(rows, round(rank * rows / ranks / step) * step) for rank in range(ranks)] + [rows]
    return list(itertools.pairwise(bounds))


def deals_rows(load: Load, ranks: int) -> bool:
    """Whether a weight is dealt by rows: if its update is one of each value, and there are enough for every rank."""
    return load.divisible and load.values > LARGE and load.values // ranks >= 2 * MIN_8BIT_NUMEL


def deal(loads: Sequence[Load], ranks: int) -> list[int]:
    """The rank that owns each weight; the same on every rank, since it depends on the arguments alone.

    Of a weight that is dealt by rows it is the one that owns what cannot be divided.
    """
    owners, costs = [0] * len(loads), [0.0] * ranks
    of_layer: dict[str, int] = {}
    whole = [index for index, load in enumerate(loads) if not load.is_vector and not deals_rows(load, ranks)]
    for index in sorted(whole, key=lambda index: (-loads[index].cost, index)):
        load = loads[index]
        owner = min(range(ranks), key=lambda rank: (costs[rank], rank))
        costs[owner] += load.cost
        owners[index] = of_layer[layer_of(load.name)] = owner
    for index, load in enumerate(loads):
        if load.is_vector:
            owners[index] = of_layer.get(layer_of(load.name), index % ranks)
        elif deals_rows(load, ranks):
            owners[index] = index % ranks
    return owners
