"""The weights of one optimizer dealt to ranks: who owns which, and what goes from rank to rank in an update.

Every rank has all weights, and for each the bases of its subspace, which project its gradients. The owner alone has the
moments; of embeddings and head each rank owns some rows (`qgalore.sharding.deal`). In an update

1. gradients, projected where they are low-rank, are summed by the owner (`qgalore.sharding.bucket`), of embeddings
   perhaps the rows that were looked up alone (`qgalore.sharding.looked_up_rows`);
2. it checks them; whether one is not finite all ranks learn, before anything of the same hook or layer is written;
3. it updates moments and weight with the random bits that every rank would have used, and sends the stored weight, the
   codes of a quantized one (`qgalore.sharding.slots`), and new bases where they were refreshed; but not what passes
   gather (`qgalore.sharding.gathering`, `qgalore.sharding.tables`);
4. norms and the schedules of refreshes are shared at the end, for clipping, metrics and the next update.

So two ranks hold the bits that they would hold if each updated all weights, where an update is of one micro-batch or
its gradients are summed by every rank, and does not depend on a norm: that of embeddings and head is a sum over ranks,
so that the metric and what clips or limits by it differ in the last bits. Of more ranks the order of sums is that of
the collective, which may be another for `reduce` than for `all_reduce`.

A refresh by streaming multiplies the gradient with the momentum, which its owner then sends to all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.sharding.bucket import OwnedBucket
from qgalore.sharding.deal import Load, cost_of, deal, deals_rows, layer_of, row_ranges
from qgalore.sharding.gathering import Gathering
from qgalore.sharding.looked_up_rows import LookedUpRows, sends_rows
from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.slots import Slots
from qgalore.sharding.tables import Tables
from qgalore.subspace.methods import FlagForHost, Streaming
from qgalore.update.all_reduce import Waiting
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.ranks import Ranks
from qgalore.update.weight import Weight


class Shards(Ranks):
    """The part of a model's states that this rank keeps."""

    sums_gradients = deals_weights = True
    """See `Ranks`."""

    def __init__(self, mesh: ShardMesh, weights: Sequence[Weight]) -> None:
        """Deal the weights, which belong to their layers by now, and move them into slots."""
        self._mesh, self._weights = mesh, weights
        loads = list(map(_load_of, weights))
        for weight, load, dealt in zip(weights, loads, deal(loads, mesh.size), strict=True):
            owner = mesh.owners.get(f"{weight.name}.weight" if weight.layer is not None else weight.name, dealt)
            rows = row_ranges(weight.shape, mesh.size)[mesh.rank] if deals_rows(load, mesh.size) else None
            weight.give_to(owner, owner == mesh.rank or rows is not None, self._from_owner, rows)
        self._slots = Slots(weights, mesh)
        device = weights[0].param.device
        self._owned_here = torch.tensor([weight.owner == mesh.rank for weight in weights], device=device)
        self._refreshing: list[Weight] = []
        self._refreshed: dict[Weight, FlagForHost | None] = {}
        """Whose subspaces were refreshed in this update, with the flag `skip` as it was then."""
        self._works: list[Waiting] = []
        self.gathering: Gathering | None = None
        """Of `gather_layers`."""
        self.tables: Tables | None = None
        """Of `gather_tables`."""
        self.owners_sum = mesh.owners_sum
        """See `ShardMesh`."""
        for weight in weights if self.owners_sum else ():
            weight.sum_for_owner()

    def gather_layers(self, layers: Sequence[Sequence[Weight]]) -> Gathering:
        """From now on the matrices of layers are on other ranks than their owners only while their layer runs."""
        self.gathering = Gathering([self._slots.take_matrices(weights) for weights in layers], self._mesh)
        return self.gathering

    def gather_tables(self, weights: Sequence[Weight]) -> Tables:
        """From now on each rank has its rows alone of those weights that are dealt by rows, but while they are read."""
        self.tables = Tables(self._slots.take_rows(weights), self._mesh)
        return self.tables

    def is_elsewhere(self, weight: Weight) -> bool:
        """Whether this rank does not have a weight for good."""
        return self._slots.is_gathered(weight) and not weight.owned

    def _from_owner(self, value: Tensor, owner: int) -> Tensor:
        """What `owner` has as `value`, written into the others'."""
        self._mesh.broadcast(value, owner).wait()
        return value

    def bucket(self, weights: Sequence[Weight], parts: list[list[Tensor]], buffer: Tensor | None) -> OwnedBucket:
        """The gradients of weights, ready to be sent to their owners."""
        if buffer is None and sends_rows(weights, parts, self._mesh):
            return LookedUpRows(weights, parts, self._mesh)
        return OwnedBucket(weights, parts, self._mesh, buffer)

    def share_of_momenta(self, device: torch.device) -> float:
        """See `Ranks`: owners have the momenta whole."""
        return 1.0

    # ---- checks

    def agree_on_skip(self, checks: UpdateChecks) -> None:
        """Let the flag `checks.skip` be true if it is so on any rank."""
        self._mesh.any(checks.skip)

    def share_norms_of_rows(self, weights: Sequence[Weight], checks: UpdateChecks) -> None:
        """Let every rank have the norms of gradients of which each has checked some rows."""
        for weight in weights:
            if weight.rows is not None:
                self._mesh.sum(checks.squared_norms[weight.index])

    def share_checks(self, checks: UpdateChecks) -> None:
        """Let every rank have the norms of all gradients and the flag; again after more gradients, if need be."""
        own = torch.where(self._owned_here, checks.squared_norms, 0.0)
        shared = torch.cat([own, checks.skip.to(own.dtype)[None]])
        self._mesh.sum(shared)
        checks.squared_norms.copy_(shared[:-1])
        checks.skip.copy_(shared[-1] != 0)

    # ---- after updates

    def note_refreshes(self, weights: Sequence[Weight]) -> None:
        """Remember which subspaces the update of these weights is to refresh; before it is made."""
        self._refreshing += [weight for weight in weights if weight.subspace.due]

    def publish(self, weights: Sequence[Weight], checks: UpdateChecks) -> None:
        """Broadcast this rank's updated weights, and receive the others'; before anything else is checked."""
        self._slots.publish(weights)
        for weight in weights:
            if not weight.owned and weight.layer is not None and not self._slots.is_gathered(weight):
                weight.layer.was_written()
        if self._refreshing:
            chosen = [weight for weight in self._refreshing if weight in set(weights)]
            self._refreshing = [weight for weight in self._refreshing if weight not in set(weights)]
            for weight in chosen:
                parts = weight.subspace.refreshed_tensors(with_bases=not self._slots.is_gathered(weight))
                self._works += [self._mesh.broadcast(part, weight.owner) for part in parts]
                skip = None if weight.owned else checks.skip_for_kernels()
                self._refreshed[weight] = None if skip is None else FlagForHost(skip)

    def finish(self) -> None:
        """End an update: let later work wait for what was sent, and take over the schedules of refreshed subspaces."""
        self._slots.finish()
        if self.gathering is not None:
            self.gathering.forget()
        for work in self._works:
            work.wait()
        self._works.clear()
        if self._refreshed:
            self._share_schedules()
        self._refreshed.clear()

    def _share_schedules(self) -> None:
        """By one message of the hosts, as long as subspaces are refreshed in an update."""
        subspaces = [weight.subspace for weight in self._refreshed]
        streaming = [each for each in subspaces if isinstance(each, Streaming)]
        rows = [each.schedule_row() for each in streaming]
        rows = [row if weight.owned else [0.0] * len(row) for weight, row in zip(self._refreshed, rows, strict=True)]
        shared = torch.tensor([number for row in rows for number in row], dtype=torch.float64, device="cpu")
        self._mesh.sum(shared)
        parts = shared.split([len(row) for row in rows])
        for (weight, skipped), each, part in zip(self._refreshed.items(), streaming, parts, strict=True):
            if not weight.owned:
                each.take_schedule(part.tolist(), skipped)

    def forget(self) -> None:
        """Forget the update that goes on."""
        self._refreshing.clear()


def _load_of(weight: Weight) -> Load:
    values, gradient = weight.shape.numel(), weight.subspace.gradient_shape.numel()
    is_vector, plain = len(weight.shape) < 2, weight.layer is None and weight.config is None
    in_stack = layer_of(weight.name) != weight.name  # whose matrices may be gathered, each from one owner
    return Load(weight.name, values, cost_of(values, gradient), is_vector, plain and not is_vector and not in_stack)
