"""Seeded permutations that do not depend on library versions.

`random`, numpy and `datasets` promise no stable shuffle across versions, and a run must see the same order on every
machine for years. So the order is built here from integer arithmetic alone: SplitMix64's finalizer as the hash, and a
six-round Feistel network over it as the permutation. A Feistel network computes any element without a table, so that
the position in an epoch is one integer, and a set of a billion windows needs no memory.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); Black and Rogaway, "Ciphers with
arbitrary finite domains" (2002), for walking the cycle back into the domain.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 6


def hash64(*values: int) -> int:
    """A 64-bit hash of a tuple of integers, each taken modulo 2**64."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0x9E3779B97F4A7C15 & _MASK
        state ^= state >> 30
        state = state * 0xBF58476D1CE4E5B9 & _MASK
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(positions: NDArray[np.uint64], count: int, key: int) -> NDArray[np.uint64]:
    """The elements at `positions`, each below `count`, of the permutation of range(count) with this `key`."""
    if count <= 1:
        return np.zeros_like(positions)
    # At least 16 elements in the domain: smaller halves leave too few round functions to mix with.
    half_bits = max(2, ((count - 1).bit_length() + 1) // 2)
    result = _feistel(positions, half_bits, key)
    while (outside := result >= np.uint64(count)).any():
        result[outside] = _feistel(result[outside], half_bits, key)
    return result


def permutation(count: int, key: int) -> list[int]:
    """The permutation of range(count) with this `key`, as a list."""
    return [int(element) for element in permute(np.arange(count, dtype=np.uint64), count, key)]


def _feistel(values: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_number in range(_ROUNDS):
        mixed = _finalise(right ^ np.uint64(hash64(key, round_number)))
        left, right = right, left ^ (mixed & mask)
    return (left << shift) | right


def _finalise(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; unsigned products wrap modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
