"""Seeds for stochastic rounding and random bases, derived from what they are for and never from a global generator."""

from __future__ import annotations

_MASK = 0xFFFFFFFFFFFFFFFF


def mix_seed(*parts: int) -> int:
    """A 64-bit seed from integers (run seed, update step, parameter index, purpose) by the splitmix64 finalizer.

    The finalizer is of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
