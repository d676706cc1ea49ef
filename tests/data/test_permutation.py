"""Permutations: bijective for every size, even, and frozen."""

from collections import Counter

import numpy as np
import pytest

from peft_pretraining.data.permutation import hash64, permutation, permute


def test_every_size_is_a_bijection() -> None:
    for count in [*range(300), 1000, 4096, 4097]:
        assert sorted(permutation(count, key=count * 31)) == list(range(count))


def test_elements_need_no_table() -> None:
    count = 10**15 + 7
    positions = np.arange(1000, dtype=np.uint64) * np.uint64(10**12)
    elements = permute(positions, count, key=5)
    assert len(np.unique(elements)) == 1000
    assert int(elements.max()) < count
    assert permute(positions[7:8], count, key=5)[0] == elements[7]


@pytest.mark.parametrize("count", [2, 3, 10])
def test_each_element_stands_everywhere_equally_often(count: int) -> None:
    trials = 200 * count
    for element in (0, count - 1):
        counts = Counter(permutation(count, hash64(7, key)).index(element) for key in range(trials))
        expected = trials / count
        chi_square = sum((counts[i] - expected) ** 2 / expected for i in range(count))
        # Mean count - 1, variance 2 (count - 1); five standard deviations.
        assert chi_square < count - 1 + 5 * (2 * (count - 1)) ** 0.5 + 5


def test_frozen() -> None:
    """A change of these numbers changes the order of every run."""
    assert hash64(1, 2, 3) == 12639738183621888534
    assert permutation(10, key=1) == [9, 4, 6, 7, 8, 5, 0, 1, 3, 2]
