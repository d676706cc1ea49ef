"""A bucket whose parts are each summed by the rank that owns their weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import Bucket, Waiting
from qgalore.update.weight import Weight


class OwnedBucket(Bucket):
    """The gradients of weights, those of one owner behind each other: a message for each owner."""

    def __init__(
        self, weights: Sequence[Weight], parts: list[list[Tensor]], mesh: ShardMesh, buffer: Tensor | None = None
    ) -> None:
        """parts, buffer: as of `Bucket`."""
        order = sorted(range(len(weights)), key=lambda index: weights[index].owner)
        super().__init__([parts[index] for index in order], lambda _: None, buffer)
        self._mesh, self._order, self._weights = mesh, order, weights
        self._works: list[Waiting] = []
        self._parts_of_owners: dict[int, Tensor] = {}
        start = 0
        for owner in sorted({weight.owner for weight in weights}):
            values = sum(
                part.numel() for each, of in zip(weights, parts, strict=True) if each.owner == owner for part in of
            )
            self._parts_of_owners[owner] = self.buffer[start : start + values]
            start += values

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
        if self._mesh.rank in self._parts_of_owners:
            self._mesh.sum_over_replicas(self._parts_of_owners[self._mesh.rank])

    def summed(self) -> list[list[Tensor]]:
        """The sums of the weights that this rank owns, in the order of the weights."""
        found = dict(zip(self._order, super().summed(), strict=True))
        return [found[index] for index, weight in enumerate(self._weights) if weight.owned]
