"""Rendezvous of the processes that were launched together, in the launcher's key-value store."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from peft_pretraining.errors import UserError
from peft_pretraining.runtime.signals import StopRequest

TIMEOUT = timedelta(minutes=10)


def world_size_of_launch() -> int:
    """The number of ranks that the launcher started: `WORLD_SIZE` of torchrun, 1 for plain python."""
    size = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(size)) if size.isdecimal() else 1  # others `check_launch` refuses


def check_launch() -> None:
    """Raise UserError for variables of a launcher that are no launch, such as those that a shell has kept."""
    found = {name: os.environ[name] for name in _NUMBERS if name in os.environ}
    instead = "start ranks by torchrun, which sets it, or remove it from the environment"
    for name, text in found.items():
        if not text.isdecimal():
            raise UserError(f"{name}={text} in the environment is no whole number: {instead}")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if int(found.get(name, "1")) < 1:
            raise UserError(f"{name}={found[name]} in the environment is no number of ranks: {instead}")
    size, rank = world_size_of_launch(), int(found.get("RANK", "0"))
    if rank >= size:
        raise UserError(f"RANK={rank} in the environment is of no launch with WORLD_SIZE={size}: {instead}")
    if size > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise UserError(
            f"WORLD_SIZE={size} in the environment says that there are {size} ranks, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there: start ranks by torchrun --nproc_per_node, or remove "
            "WORLD_SIZE from the environment"
        )
    port = os.environ.get("MASTER_PORT", "")
    if size > 1 and not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT={port} in the environment is no port, a number below 65536: {instead}")


_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What a launcher sets in each rank's environment."""


def agree_on_store(rank: int, world_size: int, stop: StopRequest) -> Store:
    """Agree on a prefix of the launcher's store that only the processes of this launch know; returns that part.

    torchrun keeps one store over its restarts (github.com/pytorch/pytorch/issues/135712), and a process that finds the
    address of a dead predecessor there fails to connect. So rank 0 draws a random prefix, and every other rank asks for
    it under a random name of its own, so that no rank can read an answer of an earlier launch.
    """
    store: Store = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))[0]
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"ask/{rank}", own)
        _poll(lambda: store.check([f"answer/{own}"]), stop)
        part = store.get(f"answer/{own}").decode()
        store.set(f"{part}/{rank}", "")
        return PrefixStore(part, store)
    absent = set(range(1, world_size))

    def all_there() -> bool:
        for other in sorted(absent):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
            if store.check([f"{own}/{other}"]):
                absent.remove(other)
        return not absent

    _poll(all_there, stop)
    return PrefixStore(own, store)


def _poll(done: Callable[[], bool], stop: StopRequest) -> None:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not done():
        if stop.requested:
            raise UserError(f"{stop.signal_name} came while this rank waited for the others to start; nothing was done")
        if time.monotonic() > deadline:
            raise UserError(
                f"not all {world_size_of_launch()} ranks started within {TIMEOUT.total_seconds() / 60:.0f} minutes: "
                "start torchrun on all machines, with the same --nnodes and the same rendezvous"
            )
        time.sleep(0.02)
