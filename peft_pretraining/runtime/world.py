"""The ranks of a run: this rank's index and device, and the collectives that the run uses.

Data parallelism needs no wrapper around the model. Every rank computes its micro-batches, the optimizer sums each
accumulated gradient (the projected one where it is low-rank) over the ranks, and all ranks then apply the same update,
with the same random bits, to the same weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from peft_pretraining.errors import UserError
from peft_pretraining.runtime.rendezvous import TIMEOUT, agree_on_store, world_size_of_launch
from peft_pretraining.runtime.signals import StopRequest
from qgalore.sharding.mesh import ShardMesh

T = TypeVar("T")


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether a collective has failed, as it does where another rank has died; gloo raises bare RuntimeErrors.

    Then nothing more may wait for the other ranks.
    """
    signs = ("gloo", "NCCL", *_OF_A_CONNECTION)
    may_be = world_size_of_launch() > 1 and isinstance(error, RuntimeError)
    return may_be and any(sign in str(error) for sign in signs)


def tells_of_a_connection(error: BaseException) -> bool:
    """Whether such an error is about the connection to another rank, and not about what this one has asked for."""
    return any(sign in str(error) for sign in _OF_A_CONNECTION)


_OF_A_CONNECTION = (
    "Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "Timed out waiting",
    "timed out", "remote process exited", "Socket closed",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """This process's rank, device and collectives."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that reports and saves."""
        return self.rank == 0

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, asynchronously where that is a GPU."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def gradient_all_reduce(self) -> Callable[[Tensor], dist.Work | None] | None:
        """A function that starts an asynchronous `all_reduce` and returns its `Work`; None for one rank."""
        return (lambda tensor: dist.all_reduce(tensor, async_op=True)) if self.world_size > 1 else None

    def shard_mesh(self, mode: str) -> ShardMesh | None:
        """The mesh over which `--shard` deals a model: the ranks of a machine, replicated over machines; None for none.

        Raises UserError where machines have unequal numbers of ranks.
        """
        if mode == "none" or self.world_size == 1:
            return None
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size)))
        sizes = self.gather(local)
        if len(set(sizes)) > 1:
            counts = ", ".join(str(size) for size in sorted(set(sizes)))
            raise UserError(
                f"--shard {mode}: the machines run unequal numbers of ranks ({counts}), and each of them has to hold "
                "the same parts: give all of them the same --nproc_per_node"
            )
        shape, names = [self.world_size // local, local], ["replicate", "shard"]
        first = int(local == self.world_size)  # one machine has a mesh of one dimension
        mesh = init_device_mesh(self.device.type, tuple(shape[first:]), mesh_dim_names=tuple(names[first:]))
        return ShardMesh(mesh)

    def sum_on_host(self, value: int) -> int:
        """The sum of an integer over all ranks, without touching the accelerator."""
        return self.sums_on_host([value])[0]

    def sums_on_host(self, values: Sequence[int]) -> list[int]:
        """The sum of each integer over all ranks, in one message, without touching the accelerator."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals)
        return [int(total) for total in totals]

    def all_on_host(self, flag: bool) -> bool:
        """Whether the flag is true on every rank, without touching the accelerator."""
        return self.sum_on_host(int(flag)) == self.world_size

    def any_on_host(self, flag: bool) -> bool:
        """Whether the flag is true on any rank, without touching the accelerator."""
        return self.sum_on_host(int(flag)) > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on every rank; a UserError there is raised on all."""
        outcome: list[object] = [None]
        if self.is_main:
            try:
                outcome = [make()]
            except UserError as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            try:
                raise outcome[0]
            finally:
                outcome.clear()  # else the error and this frame are a reference cycle that keeps other frames alive
        return outcome[0]  # type: ignore[return-value]

    def check_replicas(self, tensors: Mapping[str, Tensor], update_step: int) -> None:
        """Compare a hash of every tensor over all ranks; raises UserError that names those which differ."""
        digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        others = self.gather(digests)  # of what other ranks do not have there is nothing to compare
        differing = sorted(
            {name for other in others for name in other if digests.get(name, other[name]) != other[name]}
        )
        if any(self.gather(bool(differing))):
            named = ", ".join(differing[:5]) or "tensors of another rank"
            raise UserError(
                f"--check_replicas: after {update_step} updates the ranks hold different weights ({named}): a device "
                "or its link computes wrongly. Resume with --continue_from auto on other machines"
            )

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()


def start_world(device: str, stop: StopRequest) -> World:
    """Choose this rank's device (`auto`, `cpu`, `cuda`) and join the other ranks; raises UserError, also on a stop."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, world_size = int(os.environ.get("RANK", "0")), world_size_of_launch()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node started rank {local_rank} of this machine, "
                f"which has {torch.cuda.device_count()} CUDA devices: start at most one rank a device"
            )
        chosen = torch.device("cuda", local_rank)
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            # Read at the first allocation. It lets free blocks be merged, which a nearly full GPU needs.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(chosen)
        # CUDA graphs cannot be captured on the default stream, nor while autograd has work pending on it. cuBLAS keeps
        # a workspace of 64 MiB for each stream: a process that trains again keeps the stream that it has.
        if torch.cuda.current_stream(chosen) == torch.cuda.default_stream(chosen):
            torch.cuda.set_stream(torch.cuda.Stream(chosen))
    else:
        chosen = torch.device("cpu")
    if world_size > 1:
        # Host integers go over gloo, so that counting tokens never waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        store = agree_on_store(rank, world_size, stop)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return World(rank, world_size, chosen)
