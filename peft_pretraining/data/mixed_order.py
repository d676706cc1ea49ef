"""The order of a mixture: a logical shard that draws each row from one of its sources.

Each source of the mixture has a part of its own in the logical shard, with its own units, epochs and position. Which
part gives row r is decided by a point on a circle that moves on by the golden ratio with every row. Such points are
spread evenly, so that of any n consecutive rows a source with share w gives w n but for a few, and the only state is r.
A source that has ended is no longer chosen; the others keep their proportions.

Source of the sequence: Knuth, "The Art of Computer Programming" volume 3, 6.4, multiplicative hashing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.order import LogicalShard, LogicalShardState
from peft_pretraining.data.permutation import hash64

_MIXTURE = 5  # purpose of the hash, unlike those of `order`
_CIRCLE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15


class MixedLogicalShard:
    """A logical shard over several sources, of which each is a part; see `order.LogicalShard`."""

    def __init__(
        self, parts: Sequence[LogicalShard], weights: Sequence[float], index: int, seed: int, rows: int = 0
    ) -> None:
        """`index`: of this logical shard; `rows`: rows that were handed out already, up to which `parts` have read."""
        self._parts, self._weights, self._rows = parts, tuple(weights), rows
        self._begin = hash64(_MIXTURE, seed, index)

    def state(self) -> LogicalShardState:
        """See `order.LogicalShard.state`."""
        return {"row": self._rows, "sources": [part.state() for part in self._parts]}

    @property
    def ended(self) -> bool:
        """See `order.LogicalShard.ended`."""
        return all(part.ended for part in self._parts)

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `order.LogicalShard.take`."""
        taken = [self._draw().take(1) for _ in range(rows)]
        return np.concatenate([row for row, _ in taken]), np.concatenate([length for _, length in taken])

    def _draw(self) -> LogicalShard:
        left = tuple(number for number, part in enumerate(self._parts) if not part.ended)
        if not left:
            return self._parts[0]
        point = (self._begin + self._rows * _GOLDEN) % _CIRCLE
        self._rows += 1
        return self._parts[left[bisect_right(_bounds(tuple(self._weights[number] for number in left)), point)]]


@cache
def _bounds(weights: tuple[float, ...]) -> tuple[int, ...]:
    """The point of the circle at which each share ends, without the last one's."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    return tuple(int(sum(exact[:count]) * _CIRCLE / total) for count in range(1, len(exact)))
