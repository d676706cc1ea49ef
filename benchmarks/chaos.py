"""Kill a small run repeatedly, fill its disk, damage its checkpoints and its network, and compare the resulting bits.

    python -m benchmarks.chaos --kills 220 --seed 0 --out benchmarks/results/chaos.csv
    python -m benchmarks.chaos --network 4 --seed 21 --out benchmarks/results/chaos_network.csv
    python -m benchmarks.chaos --sharded --kills 60 --faults 20 --out benchmarks/results/chaos_sharded.csv

The run is `run_pretrain.py`, started as a user would start it, on one rank and with torchrun on two. One fault after
another interrupts it, and each time the same command starts it again, until it ends normally. Then weights, optimizer
state, order of the data and metrics of its newest checkpoints are compared with those of an undisturbed run.
One row for each setting and kind of fault: how many were made, and how many of them lie in runs that ended with the
same bits. Whatever else goes wrong, such as a start that fails, makes the program end with 1.

One start in ten, and every restart by torchrun, is the user's command; the others are the same ranks forked from a
process that has loaded torch.

Kills are SIGKILL: by the clock, from outside; or at a named moment, from inside (`chaos_inside/sitecustomize.py`).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.chaos_faults import (
    BY_THE_CLOCK,
    CUT,
    EVENTS,
    FLIPPED,
    FULL_DISK,
    KILLS,
    LOST,
    MOMENTS,
    NETWORK,
    NETWORK_FAULTS,
    ONE_RANK,
    PRUNE,
    RESTART,
    SAVE,
    SCHEDULE,
    SETTINGS,
    SHARDED,
    STOPPED,
    Fault,
    Setting,
    deal,
    every_place,
)
from benchmarks.chaos_runs import Command, Forked, Run, differences, ended, fill, fingerprint, small_disk
from peft_pretraining.checkpoint.store import list_checkpoints
from tests.data.hub_server import C4Hub, DatasetHub, HubRepository, HubServer
from tests.small_run import ROOT, SmallRun, write_text

STARTED = "\nfolder "
"""A text that the run logs when it has been built and its first update begins: the last line of its summary."""
LONGEST_SECONDS = 180.0
SHARE_OF_COMMANDS = 0.1
LONGEST_CHAIN = 8
LONGEST_IDLE = 40
"""Limit of consecutive runs in which no fault could be made."""


@dataclass
class Report:
    """Counts of faults, and failures."""

    made: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    same_bits: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """The number of SIGKILLs."""
        return sum(count for (_, _, kind), count in self.made.items() if kind in KILLS)

    def rows(self) -> Iterator[dict[str, object]]:
        """The rows of the table."""
        for setting, ranks, kind in sorted(self.made):
            count = self.made[setting, ranks, kind], self.same_bits[setting, ranks, kind]
            yield {"setting": setting, "ranks": ranks, "fault": kind, "made": count[0], "same_bits": count[1]}


class Ending(NamedTuple):
    """The end of a process."""

    code: int
    output: str
    killed: bool


Act = Callable[[Run, Path], bool]


class Chaos:
    """Runs one setting with faults."""

    def __init__(self, setting: Setting, folder: Path, report: Report, rng: random.Random) -> None:
        """Create model and data in `folder`, and make the undisturbed run."""
        self.setting, self.folder, self.report, self.rng = setting, folder, report, rng
        folder.mkdir(parents=True)
        self.small = SmallRun(folder)
        text = write_text(folder / "en", documents=600)
        self.hub, dataset = serve(folder, setting.from_hub)
        self.flags = SCHEDULE | text | {"dataset": dataset} | setting.flags
        self.chains = 0
        self.start("warm_up")
        marks = [time.monotonic()]

        def note_start(run: Run, log: Path) -> bool:
            self.wait_for_start(run, log)
            marks.append(time.monotonic())
            return False

        ending = self.start("undisturbed", note_start)
        self.building_seconds, self.training_seconds = marks[1] - marks[0], time.monotonic() - marks[1]
        if ending.code:
            raise SystemExit(f"the undisturbed run failed:\n{ending.output}")
        self.expected = fingerprint(folder / "undisturbed")

    # ---- one start of the command

    def start(self, name: str, act: Act | None = None, launcher: bool = False, **variables: str) -> Ending:
        """Run the command to its end; `act` may interrupt it from outside and returns whether it did.

        With `launcher`, and now and then without, it is the user's command, with torchrun where there are two ranks;
        else the ranks are forked from a process that has loaded torch, which saves most of the time.
        """
        argv = self.small.argv(name, self.flags)
        log, marks = self.folder / f"{name}.log", self.folder / f"{name}.marks"
        for file in (log, marks):
            file.unlink(missing_ok=True)
        variables |= {"CHAOS_LOG": str(marks)} | self.network_variables()
        if launcher or self.rng.random() < SHARE_OF_COMMANDS:
            run: Run = Command(self.setting.ranks, argv, log, variables, restarts=int(launcher))
        else:
            run = Forked(self.setting.ranks, argv, log, variables)
        acted = act is not None and act(run, log)
        deadline = time.monotonic() + LONGEST_SECONDS
        while (code := run.poll()) is None:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                run.kill(run.pids())
                self.report.failures.append(f"{self.setting.name}: did not end in {LONGEST_SECONDS} s: {variables}")
        return Ending(code, log.read_text() if log.exists() else "", acted or marks.exists())

    def network_variables(self) -> dict[str, str]:
        """Environment variables with the address of the hub, and without other requests and caches."""
        if self.hub is None:
            return {}
        cache = str(self.folder / "hub_cache")
        return {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": cache, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}

    def wait_for_start(self, run: Run, log: Path) -> None:
        """Wait until the run has been built or has ended."""
        while run.poll() is None and not (log.exists() and STARTED in log.read_text()):
            time.sleep(0.005)

    # ---- faults

    def disturb(self, fault: Fault, save_dir: Path) -> bool:
        """Run the command with one fault; returns whether it could be made. Records failures."""
        kind, name, rng = fault.kind, save_dir.name, self.rng
        if kind in MOMENTS:
            file, function, most = rng.choice(MOMENTS[kind])
            moment = fault.where or f"{file}:{function}:{rng.choice(EVENTS)}:{rng.randint(1, most)}"
            # Only the first rank publishes and deletes; the others of a sharded run write.
            writes = self.setting in SHARDED and function in ("_synced_file", "write", "_write_parts")
            main_alone = kind in (SAVE, PRUNE) and not writes
            rank = 0 if main_alone else rng.randrange(self.setting.ranks)
            ending = self.start(name, CHAOS_MOMENT=moment, CHAOS_RANK=str(rank))
            return self.survive_kill(ending)
        if kind in (BY_THE_CLOCK, ONE_RANK, RESTART):
            return self.survive_kill(self.start(name, self.killer(kind), launcher=kind == RESTART))
        if kind == STOPPED:
            return self.stop_in_good_order(save_dir)
        if kind == FULL_DISK:
            return self.fill_disk(save_dir)
        if kind == NETWORK:
            ending = self.start(name)
            self.expect(ending.code == 0, "did not survive the network", ending)
            return True
        return self.damage(fault, save_dir)

    def survive_kill(self, ending: Ending) -> bool:
        """Return whether a process was killed; if not, the run must have ended normally."""
        if not ending.killed:
            self.expect(ending.code == 0, "ended badly although nothing was done to it", ending)
        return ending.killed

    def killer(self, kind: str) -> Act:
        """An `Act` that kills all processes, or one rank, at a random moment of the whole run or of its updates."""
        whole_time, share = self.rng.random() < 0.2, self.rng.random()

        def act(run: Run, log: Path) -> bool:
            if not whole_time:
                self.wait_for_start(run, log)
            time.sleep(share * (self.training_seconds + whole_time * self.building_seconds))
            pids = run.pids()
            if run.poll() is not None or not pids:
                return False
            run.kill(pids if kind == BY_THE_CLOCK else [self.rng.choice(pids)])
            return True

        return act

    def stop_in_good_order(self, save_dir: Path) -> bool:
        """Send a signal, after which the run must save and log that."""
        number = self.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        delay = self.rng.random() * self.training_seconds

        def act(run: Run, log: Path) -> bool:
            self.wait_for_start(run, log)
            time.sleep(delay)
            run.signal(number)
            return True

        ending = self.start(save_dir.name, act)
        stopped = (save_dir / "STOPPED").exists()
        logged = "--continue_from auto goes on from here" in ending.output
        self.expect(stopped == logged, "left a marker without logging it, or logged one without leaving it", ending)
        return stopped

    def fill_disk(self, save_dir: Path) -> bool:
        """Fill the disk: a real one if this process may mount one, else by a limit on the size of files."""
        room = self.rng.randint(0, 600_000)
        ballast = save_dir / "ballast"
        if save_dir.is_mount():
            fill(ballast, room)
            ending = self.start(save_dir.name)
            ballast.unlink()
        else:
            ending = self.start(save_dir.name, CHAOS_FILE_LIMIT=str(room // 2))
        if ending.code == 0:
            return False
        self.expect("run_pretrain.py: " in ending.output, "did not report that the disk is full", ending)
        self.expect('run_pretrain.py", line' not in ending.output, "a traceback for a full disk", ending)
        return True

    def damage(self, fault: Fault, save_dir: Path) -> bool:
        """Flip a byte of a file of the newest checkpoint, cut it or delete it: it must then be refused."""
        found = list_checkpoints(save_dir)
        if not found:
            return False
        names = sorted(path.name for path in found[-1].iterdir())
        file = found[-1] / (fault.where or self.rng.choice(names))
        content = bytearray(file.read_bytes())
        if fault.kind == FLIPPED:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        elif fault.kind == CUT:
            del content[self.rng.randrange(len(content)) :]
        file.write_bytes(content)
        if fault.kind == LOST:
            file.unlink()
        ending = self.start(save_dir.name)
        self.expect(ending.code == 0, f"could not go on beside a damaged {file.name}", ending)
        self.expect(f"{found[-1]} refused" in ending.output, f"took a checkpoint with a damaged {file.name}", ending)
        return True

    def break_network(self, alone: bool) -> None:
        """Make the hub answer its next requests with a few faults; with more of them, among good ones, if `alone`."""
        if self.hub is None:
            return
        count = self.rng.randint(8, 16) if alone else self.rng.randrange(3)
        faults = [self.rng.choice(NETWORK_FAULTS) for _ in range(count)]
        good = [""] * self.rng.randrange(2 * count) if alone else []
        self.hub.made, self.hub.faults = [], self.rng.sample(faults + good, len(faults) + len(good))

    def mend_network(self) -> int:
        """Stop making faults; returns how many were made."""
        if self.hub is None:
            return 0
        self.hub.faults = []
        return len(self.hub.made)

    def expect(self, right: bool, what: str, ending: Ending) -> None:
        """Record a failure."""
        if not right:
            name = f"{self.setting.name}, {self.setting.ranks} ranks"
            self.report.failures.append(f"{name}: {what} (exit code {ending.code})\n{ending.output[-3000:]}")

    # ---- a whole run with several faults

    def chain(self, deck: list[Fault]) -> None:
        """Make a run with faults from the deck until it has ended, and compare it with the undisturbed one."""
        self.chains += 1
        save_dir = self.folder / f"run_{self.chains}"
        made: Counter[str] = Counter()
        with small_disk(save_dir):
            for _ in range(LONGEST_CHAIN):
                fault = pick(deck, save_dir)
                if fault is None:
                    break
                self.break_network(alone=fault.kind == NETWORK)
                if not self.disturb(fault, save_dir):
                    deck.insert(0, fault)
                elif fault.kind != NETWORK:
                    made[fault.kind] += 1
                if faults := self.mend_network():
                    made[f"{NETWORK}, {self.setting.from_hub}"] += faults
            ending = self.start(save_dir.name)
            self.expect(ending.code == 0, "could not be continued", ending)
            while damaged := pick([fault for fault in deck if fault.kind in (FLIPPED, CUT, LOST)], save_dir):
                # Also of a run that has ended: it does its last updates again.
                deck.remove(damaged)
                made[damaged.kind] += self.disturb(damaged, save_dir)
                if sum(made.values()) >= LONGEST_CHAIN:
                    break
            different = (
                differences(fingerprint(save_dir), self.expected) if ending.code == 0 else ["nothing to compare"]
            )
            self.expect(not different, f"other bits of {different} after {dict(made)}", ending)
            same = not different
            shutil.rmtree(save_dir, ignore_errors=True)
        for kind, count in made.items():
            key = self.setting.name, self.setting.ranks, kind
            self.report.made[key] += count
            self.report.same_bits[key] += count * same
        print(
            f"{self.setting.name} x{self.setting.ranks}: {dict(made)} {'same bits' if same else 'OTHER BITS'}",
            flush=True,
        )


def serve(folder: Path, kind: str) -> tuple[HubServer | None, object]:
    """(a hub that serves the text of the folder as C4 or as parquet, or None; the value of --dataset)."""
    if not kind:
        return None, folder
    if kind == "json":
        return C4Hub(folder), "c4"
    data = folder / "repository" / "data"
    data.mkdir(parents=True)
    for split, files in (("train", 8), ("validation", 2)):
        (path,) = (folder / "en").glob(f"c4-{split}.*")
        with gzip.open(path, "rt") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        for number in range(files):
            table = pa.table({"text": texts[number::files]})
            pq.write_table(table, data / f"{split}-{number:05d}-of-{files:05d}.parquet", row_group_size=20)
    return DatasetHub({"org/text": HubRepository(data.parent)}), "org/text"


def pick(deck: list[Fault], save_dir: Path) -> Fault | None:
    """Take the next fault from the deck that can be made now; None if there is none."""
    for index in reversed(range(len(deck))):
        if list_checkpoints(save_dir) if deck[index].kind in (FLIPPED, CUT, LOST) else not ended(save_dir):
            return deck.pop(index)
    return None


def disturb_all(folder: Path, settings: Sequence[Setting], decks: Sequence[list[Fault]], seed: int) -> Report:
    """Run every setting with its deck; two runs at a time if they have one rank."""
    report = Report()

    def of(number: int) -> None:
        setting, deck = settings[number], decks[number]
        chaos = Chaos(setting, folder / str(number), report, random.Random(f"{seed}/{number}"))
        idle = 0
        try:
            while deck and idle < LONGEST_IDLE:
                left = len(deck)
                chaos.chain(deck)
                idle = 0 if len(deck) < left else idle + 1
        finally:
            if chaos.hub is not None:
                chaos.hub.close()
        report.failures += [f"{setting.name}, {setting.ranks} ranks: {fault} could never be made" for fault in deck]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of, [number for number, setting in enumerate(settings) if setting.ranks == 1]))
    for number, setting in enumerate(settings):
        if setting.ranks > 1:
            of(number)
    return report


def main() -> int:
    """Run the program; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=220, help="SIGKILLs, over all settings")
    parser.add_argument("--faults", type=int, default=80, help="other faults than kills and the network's")
    parser.add_argument(
        "--every-place", action="store_true", help="all steps of a save and all files, instead of a random choice"
    )
    parser.add_argument(
        "--network",
        type=int,
        default=0,
        metavar="RUNS",
        help="instead: so many runs of each setting with the hub, with faults of the network alone",
    )
    parser.add_argument("--sharded", action="store_true", help="instead: runs whose ranks write a checkpoint together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args()
    begin = time.monotonic()
    all_settings = SHARDED if args.sharded else SETTINGS
    rng, count = random.Random(args.seed), len(all_settings)
    if args.every_place:
        settings: Sequence[Setting] = [setting for setting in SETTINGS if setting.name == "q_galore_per_layer"]
        decks = [every_place() for _ in settings]
    elif args.network:
        settings = [setting for setting in SETTINGS if setting.from_hub]
        decks = [[Fault(NETWORK)] * args.network for _ in settings]
    else:
        settings = all_settings
        decks = [deal(args.kills // count, args.faults // count, setting.ranks, rng) for setting in settings]
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        report = disturb_all(Path(folder), settings, decks, args.seed)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = {
        "places": "every one" if args.every_place else "by lot",
        "seed": args.seed,
        "commit": commit.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rows = [row | machine for row in report.rows()]
    if args.out is not None and rows:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for failure in report.failures:
        print(f"FAILURE: {failure}\n")
    made, same = sum(report.made.values()), sum(report.same_bits.values())
    survived = sum(count for (_, _, kind), count in report.same_bits.items() if kind in KILLS)
    print(
        f"{survived} of {report.kills} kills survived with identical bits, {same} of {made} faults of all kinds; ",
        end="",
    )
    print(f"{len(report.failures)} failures; {(time.monotonic() - begin) / 60:.0f} minutes")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
