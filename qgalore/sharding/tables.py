"""Embeddings and head of which each rank keeps the rows that it owns, whole for the moments in which a pass reads them.

A rank has its rows beside their moments and updates them in place; nothing is sent after an update. A parameter keeps
its shape and has no memory of its own: for a moment of a pass it gets some, into which each rank broadcasts its rows.
The look-up of embeddings needs the table alone, and keeps nothing of it for the backward pass. The head's loss has its
gradient when it returns (`peft_pretraining.models.ops.linear_cross_entropy`), which may take the place of the table. So
neither moment has more in memory than it has where the tables stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.sharding.deal import row_ranges
from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.slots import give_up, is_given_up
from qgalore.update.weight import Weight


class Tables:
    """The tables of a model that are dealt by rows; all ranks bring the same one at the same time."""

    def __init__(self, weights: Sequence[Weight], mesh: ShardMesh) -> None:
        """weights: of which every rank has all rows yet; others' are given up."""
        self._mesh, self._weights = mesh, {weight.param: weight for weight in weights}
        self._unread: set[Tensor] = set()
        for weight in weights:
            assert weight.rows is not None
            weight.kept_rows = kernels.rows_of(weight.param.data, *weight.rows).clone()
            give_up(weight.param)
        self._absent = {table: table.data for table in self._weights}
        """What stands for a table that is not here, without memory; made once, and not where a pass allocates."""

    def __contains__(self, table: object) -> bool:
        return table in self._weights

    @contextlib.contextmanager
    def whole(self, table: Tensor) -> Iterator[bool]:
        """Within it a table (rows, columns) has all its rows.

        Gives whether its memory may be written over as soon as nobody reads it any more: not where the table stays, or
        has been brought by somebody around this. Nothing may keep it for a backward pass.
        """
        if table not in self._weights or table in self._unread or not is_given_up(table):
            yield False
            return
        table.data = self._gathered(self._weights[table])
        try:
            yield True
        finally:
            table.data = self._absent[table]

    @contextlib.contextmanager
    def unread(self, table: Tensor) -> Iterator[None]:
        """Within it `whole` leaves a table as it is: for a look-up of zeros, of which the backward pass is wanted."""
        self._unread.add(table)
        try:
            yield
        finally:
            self._unread.remove(table)

    def store(self, table: Tensor, values: Tensor) -> bool:
        """Let the rows that are kept of a table be those of values (rows, columns); False for another parameter."""
        weight = self._weights.get(table)
        if weight is None:
            return False
        assert weight.rows is not None and weight.kept_rows is not None
        weight.kept_rows.copy_(kernels.rows_of(values, *weight.rows))
        return True

    def _gathered(self, weight: Weight) -> Tensor:
        assert weight.rows is not None and weight.kept_rows is not None
        whole = torch.empty(weight.shape, dtype=weight.param.dtype, device=weight.param.device)
        kernels.rows_of(whole, *weight.rows).copy_(weight.kept_rows)
        ranges = enumerate(row_ranges(weight.shape, self._mesh.size))
        works = [self._mesh.broadcast(kernels.rows_of(whole, *rows), owner) for owner, rows in ranges]
        for work in works:
            work.wait()
        return whole
