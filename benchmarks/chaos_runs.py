"""Start, signal and kill runs for `benchmarks/chaos.py`, give them a disk, and compare their results."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.chaos_faults import SCHEDULE
from peft_pretraining.checkpoint.manifest import read_manifest
from peft_pretraining.checkpoint.store import list_checkpoints, load_checkpoint
from peft_pretraining.reporting.jsonl import deterministic_metrics, read_metrics
from tests.small_run import ROOT, TORCHRUN, environment, ranks_of, start_ranks


class Run(Protocol):
    """The processes of a run."""

    def poll(self) -> int | None:
        """The exit code when all have ended."""

    def pids(self) -> list[int]:
        """The process ids of the ranks, in order."""

    def kill(self, pids: list[int]) -> None:
        """Send SIGKILL."""

    def signal(self, number: int) -> None:
        """Send a signal that asks for a stop, as a user or a scheduler would."""


class Command:
    """A run by `python run_pretrain.py` or torchrun."""

    def __init__(self, ranks: int, argv: list[str], log: Path, variables: dict[str, str], restarts: int) -> None:
        launcher = (*TORCHRUN, f"--max-restarts={restarts}") if ranks > 1 else ()
        inside = {"PYTHONPATH": str(ROOT / "benchmarks" / "chaos_inside")} | variables
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / "run_pretrain.py"), *argv],
                cwd=ROOT, env=environment(**inside), stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.ranks = ranks

    def poll(self) -> int | None:
        """See `Run`."""
        return self.process.poll()

    def pids(self) -> list[int]:
        """See `Run`."""
        return ranks_of(self.process) if self.ranks > 1 else [self.process.pid]

    def kill(self, pids: list[int]) -> None:
        """See `Run`; with all ranks the launcher is killed, too, as by a power failure."""
        for pid in [self.process.pid, *pids] if pids == self.pids() else pids:
            kill(pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """See `Run`; torchrun passes on SIGTERM only."""
        kill(self.process.pid, signal.SIGTERM if self.ranks > 1 else number)


class Forked:
    """A run of ranks that are forked from a process with torch already imported."""

    def __init__(self, ranks: int, argv: list[str], log: Path, variables: dict[str, str]) -> None:
        self.processes = start_ranks(ranks, forked_run, argv, log=log, **variables)

    def poll(self) -> int | None:
        """See `Run`."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def pids(self) -> list[int]:
        """See `Run`."""
        return [process.pid for process in self.processes if process.pid]

    def kill(self, pids: list[int]) -> None:
        """See `Run`."""
        for pid in pids:
            kill(pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """See `Run`; one rank gets it."""
        kill(self.pids()[-1], number)


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def forked_run(argv: list[str]) -> int:
    """A rank of `Forked`: run the program after `chaos_inside` has read its environment variables."""
    runpy.run_path(str(ROOT / "benchmarks" / "chaos_inside" / "sitecustomize.py"))["arm"]()
    import run_pretrain

    return run_pretrain.main(argv)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A folder on a file system of its own of 16 MB, if this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def fill(file: Path, room: int) -> None:
    """Write a file that leaves about `room` bytes of its disk."""
    with file.open("wb") as ballast, contextlib.suppress(OSError):
        free = os.statvfs(file.parent).f_bavail * os.statvfs(file.parent).f_frsize
        ballast.write(bytes(max(0, free - room)))


# ---- what a run left


def ended(save_dir: Path) -> bool:
    """Whether the run has made its last checkpoint."""
    found = list_checkpoints(save_dir)
    return bool(found) and found[-1].name.endswith(f"{SCHEDULE['num_training_steps']:08d}")


def fingerprint(save_dir: Path) -> dict[str, Any]:
    """Everything that must be equal: hashes of weights and optimizer state, the rest of the state, and the metrics."""
    result: dict[str, Any] = {"metrics": [deterministic_metrics(line) for line in read_metrics(save_dir)]}
    for path in list_checkpoints(save_dir):
        state = load_checkpoint(path).state
        hashes = {name: entry for name, entry in read_manifest(path).files.items() if not name.startswith("state")}
        values = {k: v for k, v in state.items() if k != "save_dir"} | hashes
        result |= {f"{path.name}/{name}": value for name, value in values.items()}
    result["newest"] = list_checkpoints(save_dir)[-1].name
    return result


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The differences between two fingerprints, except for a checkpoint that a stop has left in one run."""
    return [name for name in one.keys() & other.keys() if one[name] != other[name]]
