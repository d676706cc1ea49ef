"""The order of a mixture: a lane that draws each row from one of its sources.

In the lane each source has a lane of its own, with its own units, epochs and position. Which of them gives row r is
decided by a point on a circle that moves on by the golden ratio with every row: its fractional parts are spread evenly,
so that of any n rows in a row a source with share w gives w n but for a few, and nothing has to be remembered but r.
A source that has ended is no longer chosen; the others keep their proportions.

Source of the sequence: Knuth, "The Art of Computer Programming" volume 3, 6.4, multiplicative hashing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.order import Lane, LaneState
from peft_pretraining.data.permutation import hash64

_MIXTURE = 5  # purpose of the hash, unlike those of `order`
_CIRCLE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15


class MixedLane:
    """A lane over the lanes of several sources; see `order.Lane`."""

    def __init__(self, lanes: Sequence[Lane], weights: Sequence[float], lane: int, seed: int, rows: int = 0) -> None:
        """`rows` were handed out already, and `lanes` stand where these have left them."""
        self._lanes, self._weights, self._rows = lanes, tuple(weights), rows
        self._begin = hash64(_MIXTURE, seed, lane)

    def state(self) -> LaneState:
        """See `order.Lane.state`."""
        return {"row": self._rows, "sources": [lane.state() for lane in self._lanes]}

    @property
    def ended(self) -> bool:
        """See `order.Lane.ended`."""
        return all(lane.ended for lane in self._lanes)

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `order.Lane.take`."""
        taken = [self._draw().take(1) for _ in range(rows)]
        return np.concatenate([row for row, _ in taken]), np.concatenate([length for _, length in taken])

    def _draw(self) -> Lane:
        left = tuple(number for number, lane in enumerate(self._lanes) if not lane.ended)
        if not left:
            return self._lanes[0]
        point = (self._begin + self._rows * _GOLDEN) % _CIRCLE
        self._rows += 1
        return self._lanes[left[bisect_right(_bounds(tuple(self._weights[number] for number in left)), point)]]


@cache
def _bounds(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Where on the circle each of several shares ends, but for the last."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return tuple(int(sum(exact[:count]) * _CIRCLE / total) for count in range(1, len(exact)))
