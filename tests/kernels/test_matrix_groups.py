"""How matrices of Newton-Schulz are put into launches."""

from __future__ import annotations

import pytest
import torch

from qgalore.kernels.arguments import even_groups


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (8, [8]), (9, [4, 5]), (14, [7, 7]), (17, [5, 6, 6]), (24, [8, 8, 8])]
)
def test_groups_are_even(count: int, sizes: list[int]) -> None:
    """Of 14 matrices of 1,024 rows, eight and six took 8 to 13 % longer than seven and seven."""
    groups = even_groups(range(count))
    assert [len(group) for group in groups] == sizes
    assert [item for group in groups for item in group] == list(range(count))


def test_the_widest_matrices_come_first() -> None:
    matrix_groups = pytest.importorskip("qgalore.kernels.triton.matrix_groups", reason="Triton is not installed")
    shapes = [(24, 24), (40, 24), (24, 130), (24, 40)]
    group = matrix_groups.SideBySide([torch.zeros(shape) for shape in shapes], 32)
    assert group.starts == [9 * 32, 5 * 32, 0, 7 * 32] and group.width == 10 * 32
    assert group.ends == [5, 7, 9, 10, 10, 10, 10, 10], "tiles of columns, in the order of the buffer"
    assert [tuple(slot.shape) for slot in group.slots(group.empty(torch.float32))] == shapes
