"""The fastest of the settings that fit into a budget.

Of the settings of a step that fit, the one of the least counted time of an update is taken (`peft_pretraining.speed`).
Where others are as fast to one per cent, one that rounds nothing goes before one that does, then one that computes
nothing again, then the one of the least memory.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from enum import IntEnum

from peft_pretraining.memory.candidate import Candidate, least_of
from peft_pretraining.memory.candidates import Candidates
from peft_pretraining.speed.cards import Card

AS_FAST, WORTH_ROUNDING, WORTH_A_RANK = 1.01, 1.05, 2.0
"""Counted times of less than the first ratio are equal, as counts are not exact; sums are rounded for the second, and
the rank is smaller by another eighth for the third."""


class Ranks(IntEnum):
    """Which ranks are looked at, in the order in which something is given up for memory."""

    OWN = 0
    """That of the command line, or its recipe's."""
    OWN_BY_LAYER = 1
    """The same with sums of one layer at a time."""
    IN_PARTS = 2
    """Where a full rank is a default: the same with `IN_PARTS`, by layer if need be."""
    OF_SUBSPACE = 3
    """There that of `IN_SUBSPACE`."""
    SMALLER = 4


def choose(found: Candidates, budget: int, card: Card, ranks: Sequence[Ranks] = tuple(Ranks)) -> Candidate | None:
    """The fastest candidate on a card that fits into so many bytes, of the first of `ranks` with one; else None."""
    for rank in ranks:
        if rank == Ranks.OWN:
            chosen = _fastest_step(found.chains, WORTH_ROUNDING, budget, card)
        elif rank == Ranks.OWN_BY_LAYER:
            chosen = _fastest_step(found.chains_by_layer, WORTH_ROUNDING, budget, card)
        elif rank == Ranks.SMALLER and found.in_subspace is None:
            chosen = _fastest_step(found.lower_chains, WORTH_A_RANK, budget, card)
        else:
            other = found.in_parts if rank == Ranks.IN_PARTS else found.in_subspace
            same = (Ranks.SMALLER,) if rank == Ranks.SMALLER else (Ranks.OWN, Ranks.OWN_BY_LAYER)
            chosen = None if other is None else choose(other, budget, card, same)
        if chosen is not None:
            return chosen
    return None


def fastest_unrounded(found: Candidates, budget: int, card: Card) -> Candidate | None:
    """The fastest that fits without a smaller rank and with nothing rounded; None where none does."""
    chains = [each for each in found.chains[0] if "--int8_activations" not in each[0].flags]
    return _fastest(chains, budget, card)


def _fastest_step(
    steps: Sequence[Sequence[list[Candidate]]], worth: float, budget: int, card: Card
) -> Candidate | None:
    """Of the first step within `worth` of the least time of all steps the fastest candidate that fits."""
    found = [each for step in steps if (each := _fastest(step, budget, card))]
    limit = worth * min((each.seconds(card) for each in found), default=0.0)
    return next((each for each in found if each.seconds(card) <= limit), None)


def _fastest(chains: Sequence[list[Candidate]], budget: int, card: Card) -> Candidate | None:
    """Of what fits the candidate that gives up the least of those that are as fast as the fastest."""
    first = [(chain, start) for chain in chains if (start := _first_fitting(chain, budget)) is not None]
    limit = AS_FAST * min((chain[start].seconds(card) for chain, start in first), default=0.0)
    found = list[Candidate]()
    for chain, start in first:
        as_fast = itertools.takewhile(lambda each: each.seconds(card) <= limit, chain[start:])
        found += [each for each in as_fast if each.needs <= budget]
    return min(found, key=_by_what_it_gives_up) if found else None


def _first_fitting(chain: list[Candidate], budget: int) -> int | None:
    """The index of the first candidate of a chain that fits; None where none does."""
    start = bisect.bisect_left(chain, True, key=lambda each: each.needs <= budget)
    if start == len(chain):
        # What a layer computes again is there beside what others keep: of few layers the last may take more.
        return next((chain.index(each) for each in least_of(chain) if each.needs <= budget), None)
    return start


def _by_what_it_gives_up(candidate: Candidate) -> tuple[bool, bool, int]:
    model = candidate.args.model
    return model.int8_activations, model.recomputed_in_words != "none", candidate.peak
