"""How `benchmarks/chaos.py` starts, signals and kills a run, and the small disk that it gives it."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.small_run import ROOT, TORCHRUN, environment, ranks_of, start_ranks


class Run(Protocol):
    """Processes that compute one run."""

    def poll(self) -> int | None:
        """The exit code when all have ended."""

    def pids(self) -> list[int]:
        """The ranks, in their order."""

    def kill(self, pids: list[int]) -> None:
        """SIGKILL."""

    def signal(self, number: int) -> None:
        """Ask for a stop as its user or a scheduler would."""


class Command:
    """`python run_pretrain.py`, or torchrun."""

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
        """See `Run`; with all ranks the launcher goes, too, as if the machine lost its power."""
        for pid in [self.process.pid, *pids] if pids == self.pids() else pids:
            kill(pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """See `Run`; SIGTERM is what torchrun passes on."""
        kill(self.process.pid, signal.SIGTERM if self.ranks > 1 else number)


class Forked:
    """The ranks alone, forked from a process that has loaded torch."""

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
    """A rank of `Forked`: the program, after `chaos_inside` has done what the environment asks for."""
    runpy.run_path(str(ROOT / "benchmarks" / "chaos_inside" / "sitecustomize.py"))["arm"]()
    import run_pretrain

    return run_pretrain.main(argv)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """The folder, on a file system of its own of 16 MB where this process may mount one."""
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
