"""A signal stops a run cleanly: its state is saved, a marker is written and a line logged, and the exit code is 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import run_pretrain
from peft_pretraining import commands
from peft_pretraining.runtime.signals import StopRequest
from tests.data.hub_server import C4Hub
from tests.small_run import (
    ROOT,
    SmallRun,
    assert_same_run,
    environment,
    flags_of,
    restored_process,
    start,
    start_ranks,
    write_text,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    with restored_process():
        yield


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.requested and stop.signal_name is None
    os.kill(os.getpid(), number)
    assert stop.requested and stop.signal_name == number.name


def test_a_second_ctrl_c_ends_at_once() -> None:
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested


def test_a_second_signal_of_a_launcher_does_not_break_the_save() -> None:
    stop = StopRequest()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert stop.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_and_marks(
    small: SmallRun, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    stopped = small.stop("run", 2, micro_batch=2, number=number, **flags_of("galore_adamw8bit_per_layer"))
    assert [path.name for path in stopped.checkpoints] == ["step_00000002"]
    assert (stopped.save_dir / "STOPPED").read_text() == f"{number.name} after 2 updates\n"
    assert len(stopped.train_lines) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line == "stopped after 2 updates; --continue_from auto goes on from here"


def test_a_signal_in_the_last_update_still_stops(small: SmallRun) -> None:
    whole = small.run("whole", num_training_steps=3)
    stopped = small.stop("parts", 2, micro_batch=2, num_training_steps=3)
    assert stopped.checkpoint().update_step == 2 and (stopped.save_dir / "STOPPED").is_file()
    assert_same_run(whole, small.run("parts", num_training_steps=3, continue_from="auto"))


def test_the_program_ends_with_0_in_time_and_goes_on(small: SmallRun) -> None:
    flags = flags_of("galore_adamw8bit_per_layer") | {"num_training_steps": 400, "continue_from": "auto"}
    process = start(small.argv("run", flags))
    metrics = small.folder / "run" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    assert time.monotonic() - begin < 20, "torchrun and SLURM give 30 seconds"
    stopped = small.result("run")
    updates = stopped.checkpoint().update_step
    assert 3 <= updates < 400 and len(stopped.train_lines) == updates
    last_line = text.strip().splitlines()[-1]
    assert last_line == f"stopped after {updates} updates; --continue_from auto goes on from here"
    assert "Traceback" not in text
    # The learning rate depends on the length of the run, so a comparison has to stop in the same way.
    resumed = small.stop("run", updates + 2, **flags)
    assert_same_run(small.stop("whole", updates + 2, **flags), resumed)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_a_network_outage_stops_in_time(small: SmallRun, ranks: int) -> None:
    """The run waits for data between two tries: it saves what it has, and goes on when the hub is back."""
    hub = C4Hub(small.folder)
    flags = write_text(small.folder / "en") | {"dataset": "c4", "workers": 0, "num_training_steps": 12}
    flags |= {"continue_from": "auto", "save_every": 4, "batch_size": 8 // ranks, "shuffle_buffer": 1}
    argv, log = small.argv("run", flags), small.folder / "log"

    def begin() -> list[ForkServerProcess]:
        return start_ranks(ranks, run_pretrain.main, argv, log=log, HF_ENDPOINT=hub.endpoint)

    def codes(processes: list[ForkServerProcess]) -> list[int | None]:
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    try:
        hub.faults = ["503"] * 10_000
        processes = begin()
        end = time.monotonic() + 60
        while len(hub.paths) < 3 * ranks or not (small.folder / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < end and all(process.is_alive() for process in processes), log.read_text()
            time.sleep(0.02)
        time.sleep(1.0)
        sent = time.monotonic()
        for process in processes:
            os.kill(process.pid or 0, signal.SIGTERM)
        assert codes(processes) == [0] * ranks, log.read_text()
        assert time.monotonic() - sent < 20, "torchrun and SLURM give 30 seconds"
        assert (small.folder / "run" / "STOPPED").read_text() == "SIGTERM after 0 updates\n"
        hub.faults = []
        assert codes(begin()) == [0] * ranks
        assert small.result("run").checkpoint().update_step == 12
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["run_pretrain.py", "--model_config", "9m"], "run_pretrain.py"),
        (["-m", "peft_pretraining", "pretrain", "--help"], "qgalore pretrain"),
        (["-m", "peft_pretraining", "evaluate", "run"], "qgalore evaluate"),
    ],
)
def test_ctrl_c_while_libraries_are_loaded_is_one_line(command: list[str], name: str, tmp_path: Path) -> None:
    """Of a torch whose import gets the signal, and would take it for a reason to go on."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == f"{name}: interrupted while it was starting"


def test_ctrl_c_is_as_before_when_a_command_is_loaded() -> None:
    """And nothing is changed for a program that imports ours."""
    before = signal.getsignal(signal.SIGINT)
    assert commands.main(["plan", "--cards"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
