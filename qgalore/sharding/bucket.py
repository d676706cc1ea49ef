"""A bucket whose parts are each summed by the rank that owns their weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from qgalore import kernels
from qgalore.sharding.deal import row_ranges
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import Bucket, Waiting
from qgalore.update.weight import Weight


class OwnedBucket(Bucket):
    """The gradients of weights, those of one owner behind each other: a message for each owner."""

    def __init__(
        self, weights: Sequence[Weight], parts: list[list[Tensor]], mesh: ShardMesh, buffer: Tensor | None = None
    ) -> None:
        """parts, buffer: as of `Bucket`."""
        pieces = [
            (owner, number, [part if rows is None else kernels.rows_of(part, *rows) for part in each])
            for number, (weight, each) in enumerate(zip(weights, parts, strict=True))
            for owner, rows in shares_of(weight, mesh.size)
        ]
        pieces.sort(key=lambda piece: piece[:2])
        whole = parts[0][0] if len(parts) == 1 and len(parts[0]) == 1 else None
        self._whole = whole.flatten() if whole is not None and whole.is_contiguous() else None
        super().__init__([piece for *_, piece in pieces], lambda _: None, buffer)
        self._whole = None
        self._mesh, self._owners = mesh, [owner for owner, *_ in pieces]
        self._works: list[Waiting] = []
        self._parts_of_owners: dict[int, Tensor] = {}
        start = 0
        for owner, of_owner in itertools.groupby(pieces, key=lambda piece: piece[0]):
            values = sum(part.numel() for *_, piece in of_owner for part in piece)
            self._parts_of_owners[owner] = self.buffer[start : start + values]
            start += values

    def _gathered(self, flat: list[Tensor], buffer: Tensor | None) -> Tensor:
        # The rows of one matrix lie behind each other as they are: no copy is made of the gradient of embeddings.
        return super()._gathered(flat, buffer) if self._whole is None or buffer is not None else self._whole

    def start(self) -> None:
        """See `Bucket`."""
        self._works = [self._mesh.reduce(part, owner) for owner, part in self._parts_of_owners.items()]

    def wait(self) -> None:
        """See `Bucket`."""
        if not self._works:
            return
        for work in self._works:
            work.wait()
        self._works = []
        self._add_up()
        if self._mesh.rank in self._parts_of_owners:
            self._mesh.sum_over_replicas(self._parts_of_owners[self._mesh.rank])

    def _add_up(self) -> None:
        """Make the sums over the ranks of a mesh of what has come: a reduce has done so."""

    def summed(self) -> list[list[Tensor]]:
        """The sums of the weights that this rank owns, or owns rows of, in the order of the weights."""
        return [piece for owner, piece in zip(self._owners, super().summed(), strict=True) if owner == self._mesh.rank]


def shares_of(weight: Weight, ranks: int) -> list[tuple[int, tuple[int, int] | None]]:
    """The ranks that own a weight, with their rows; None for the whole."""
    if weight.rows is None:
        return [(weight.owner, None)]
    return list(enumerate(row_ranges(weight.shape, ranks)))
