"""The ranks of a device mesh that share the states of one model, and the collectives among them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qgalore.update.all_reduce import Waiting


class ShardMesh:
    """A device mesh over whose last dimension weights are dealt; along a first one of two they are the same.

    So with two dimensions states are sharded inside a machine and replicated over machines, as in FSDP2's hybrid mode.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        """mesh: of one dimension or two; raises ValueError for more."""
        if mesh.ndim not in (1, 2):
            raise ValueError(f"a mesh of {mesh.ndim} dimensions: give one, or two of which the first has replicas")
        self._group = mesh.get_group(mesh.ndim - 1)
        self._replicas = mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None
        self.owners: Mapping[str, int] = {}
        """The rank that owns a parameter, by its name, where that has been decided; others are dealt."""
        self.owners_sum = False
        """Whether the gradient of each micro-batch is sent to the owners, which alone have sums of them. Else each rank
        sums its own, and sends them once an update."""
        self.looked_up: Mapping[str, int] = {}
        """Of embeddings, by the parameter's name, how many rows of its gradient at most are not zero when a rank sends
        it: tokens of a micro-batch, or of an update where ranks sum. The same on all ranks; of others all are sent."""
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def reduce(self, tensor: Tensor, owner: int) -> Waiting:
        """Start an asynchronous reduce of a tensor to `owner`, in place; undefined on the other ranks afterwards."""
        work: Waiting = dist.reduce(tensor, group_dst=owner, group=self._group, async_op=True)
        return work

    def sum_over_replicas(self, tensor: Tensor) -> None:
        """Sum what owners of the same weights have, over all replicas, in place; nothing on a mesh of one dimension."""
        if self._replicas is not None:
            dist.all_reduce(tensor, group=self._replicas)

    def broadcast(self, tensor: Tensor, owner: int) -> Waiting:
        """Start to copy a tensor of `owner` to the others', in place."""
        work: Waiting = dist.broadcast(tensor, group_src=owner, group=self._group, async_op=True)
        return work

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place: exactly, where each value is zero on all ranks but one."""
        dist.all_reduce(tensor, group=self._group)

    def any(self, flag: Tensor) -> None:
        """Set a bool () to whether it is true on any rank, in place."""
        dist.all_reduce(flag.view(torch.uint8), dist.ReduceOp.MAX, group=self._group)
