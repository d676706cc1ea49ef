"""Seeds for stochastic rounding and random bases, derived from what they are for and never from a global generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_MASK = 0xFFFFFFFFFFFFFFFF

ROUNDING, ACCUMULATION, START, TEST_MATRIX, RANGE_FINDER = range(5)
"""What random numbers are for."""


def mix_seed(*parts: int) -> int:
    """A 64-bit seed from integers by the splitmix64 finalizer.

    The finalizer is of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def step_of(state: Mapping[str, Tensor]) -> int:
    """Updates that a weight with this optimizer state has had."""
    return int(state["step"]) if "step" in state else 0


@dataclass(frozen=True)
class Seeds:
    """The seeds of one weight: `seeds(purpose)` is another one in each update."""

    run: int
    index: int
    """Number of the weight in its optimizer."""
    state: Mapping[str, Tensor]
    """The weight's optimizer state, which counts its updates."""

    def __call__(self, purpose: int, *parts: int) -> int:
        """A 64-bit seed for the update that comes next."""
        return mix_seed(self.run, step_of(self.state), self.index, purpose, *parts)
