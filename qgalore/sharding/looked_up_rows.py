"""A bucket with the gradient of embeddings, of which the rows are sent that a rank has looked up.

An update of T tokens a rank has a gradient of at most T rows of the table; all others are zero. Where the rows of all
ranks are fewer than the table's, each rank sends its own to all, with their numbers, and adds up what it gets. For two
ranks this gives the bits of a reduce, but for the sign of zeros, on which no moment depends: zero and one gradient,
then the other. It is rows that are looked for, and not ids: so sums over micro-batches and every way to look up are
served. How many there may be is said before, alike on all ranks (`ShardMesh.looked_up`), since to count them would let
the host wait for its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.sharding.bucket import OwnedBucket
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.weight import Weight

_NUMBER = torch.int64
"""Of a row, as indexing wants it."""


def gathered_bytes(shape: Sequence[int], itemsize: int, looked_up: int, ranks: int) -> int:
    """Bytes of the rows of all ranks, looked_up of each; 0 where these are not fewer than those of the whole gradient.

    shape: of the table, (rows, columns).
    """
    gathered = ranks * looked_up * (shape[1] * itemsize + _NUMBER.itemsize)
    return gathered if gathered < shape[0] * shape[1] * itemsize else 0


def sends_rows(weights: Sequence[Weight], parts: list[list[Tensor]], mesh: ShardMesh) -> bool:
    """Whether a `LookedUpRows` of these arguments sends less than an `OwnedBucket`."""
    if len(weights) != 1 or weights[0].rows is None or len(parts[0]) != 1:
        return False
    looked_up, gradient = mesh.looked_up.get(weights[0].name, 0), parts[0][0]
    return looked_up > 0 and gathered_bytes(gradient.shape, gradient.itemsize, looked_up, mesh.size) > 0


class LookedUpRows(OwnedBucket):
    """The gradient of one table that is dealt by rows; afterwards it is the sum over ranks, on all of them.

    Not finite where a rank has more rows than were said: then none of its values is to be used.
    """

    def __init__(self, weights: Sequence[Weight], parts: list[list[Tensor]], mesh: ShardMesh) -> None:
        """The arguments are as of `OwnedBucket`; `sends_rows` is true of them."""
        super().__init__(weights, parts, mesh)
        self._table = self.buffer.view(parts[0][0].shape)  # (rows, columns)
        self._looked_up = mesh.looked_up[weights[0].name]
        self._numbers = self._rows = self.buffer.new_empty(0)

    def start(self) -> None:
        """See `Bucket`."""
        table, mesh, count = self._table, self._mesh, self._looked_up
        written = table.any(dim=1)  # that is not a number, too
        # With rows of zeros to make up the count: those that are looked up come first.
        numbers = written.to(torch.int32).argsort(descending=True, stable=True)[:count]
        self._numbers = numbers.new_empty(mesh.size, count)
        self._rows = table.new_empty(mesh.size, count, table.shape[1])
        own = self._rows[mesh.rank]
        torch.index_select(table, 0, numbers, out=own)
        own[0, 0] = torch.where(written.sum() > count, torch.nan, own[0, 0])
        self._numbers[mesh.rank] = numbers
        gathered = (self._numbers, self._rows)
        self._works = [mesh.broadcast(each[owner], owner) for each in gathered for owner in range(mesh.size)]

    def _add_up(self) -> None:
        """The sum over the ranks of a mesh, in the place of this rank's gradient."""
        self._table.zero_()
        for numbers, rows in zip(self._numbers, self._rows, strict=True):
            self._table.index_put_((numbers,), rows, accumulate=True)  # each once: in no order that could matter
        self._numbers = self._rows = self.buffer.new_empty(0)
