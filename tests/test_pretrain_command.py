"""`qgalore pretrain` is run_pretrain.py under another name: the same bits, its own name in usage and messages."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from peft_pretraining.commands import main
from peft_pretraining.runtime.process import exit_code_of
from tests.golden.record import restored_process
from tests.small_run import ROOT, TORCHRUN, SmallRun, assert_same_run, environment


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def test_it_is_the_program_run_pretrain(small: SmallRun) -> None:
    with restored_process():
        assert main(["pretrain", *small.argv("command")]) == 0
    assert_same_run(small.result("command"), small.run("program"))


def test_usage_and_messages_name_the_command(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: qgalore pretrain --model_config ")
    assert main(["pretrain", *small.argv("run", {"batch_size": 3})]) == 2
    assert capsys.readouterr().err.startswith("qgalore pretrain: --total_batch_size")
    assert main(["pretrain", *small.argv("run", {"dataset": small.folder / "absent"})]) == 2
    assert capsys.readouterr().err.startswith("qgalore pretrain: ")


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    version = capsys.readouterr().out.removeprefix("qgalore ").strip()
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_a_missing_package_is_named_with_its_extra() -> None:
    """As where torch alone is installed."""
    program = "import sys; sys.modules['numpy'] = None; from peft_pretraining.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "tokenize", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2 and done.stdout == ""
    sentence = "needs the package numpy, which is not installed: pip install 'qgalore[train]'"
    assert done.stderr.splitlines()[-1] == f"qgalore tokenize: {sentence}"


def test_a_package_that_a_run_misses_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def program(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert exit_code_of(lambda: program("datasets.features"), "qgalore pretrain") == 2
    assert capsys.readouterr().err.startswith("qgalore pretrain: needs the package datasets, which is not installed")
    with pytest.raises(ModuleNotFoundError, match="wandb_of_ours"):
        exit_code_of(lambda: program("wandb_of_ours"), "qgalore pretrain")


@pytest.mark.slow
def test_two_ranks_under_torchrun(small: SmallRun) -> None:
    def launched(name: str, **flags: object) -> subprocess.CompletedProcess[str]:
        argv = [*TORCHRUN, "-m", "peft_pretraining", "pretrain", *small.argv(name, {"batch_size": 2} | flags)]
        command = [sys.executable, *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)

    done = launched("command")
    assert done.returncode == 0, done.stderr
    assert_same_run(small.result("command"), small.run_on(2, "program"))
    refused = launched("refused", data_lanes=7)
    assert refused.returncode == 1 and "qgalore pretrain: --data_lanes" in refused.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_ends_a_command_quietly(unbuffered: str) -> None:
    """As `qgalore plan ... | head -1`; containers often set PYTHONUNBUFFERED."""
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "peft_pretraining", "plan", "--cards"]
    env = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(program, cwd=ROOT, env=env, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_ctrl_c_ends_a_command_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from peft_pretraining.commands import plot

    def interrupted(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "main", interrupted)
    assert main(["plot"]) == 130 and capsys.readouterr().err == ""
