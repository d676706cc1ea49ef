"""A checkpoint that several ranks write while they train on is published, whatever ends the run meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import run_pretrain
from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.checkpoint.run_state import RunCheckpoints
from peft_pretraining.checkpoint.store import Unfinished
from peft_pretraining.errors import UserError
from tests.small_run import SmallRun, flags_of, on_ranks

FLAGS = flags_of("galore_adamw8bit") | {"shard": "optimizer", "batch_size": 2, "num_training_steps": 4, "save_every": 2}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def main_with_an_error(argv: list[str], failing_ranks: list[int], kind: str) -> int:
    """`run_pretrain.main` of a run that ends in the update after its checkpoint, before it has looked at that again."""
    update, rank = run_pretrain.Run.update, int(os.environ["RANK"])

    def update_or_fail(run: run_pretrain.Run) -> bool:
        if run.update_step == 2 and rank in failing_ranks:
            raise torch.OutOfMemoryError("no memory") if kind == "memory" else UserError("a damaged data set")
        return update(run)

    run_pretrain.Run.update = update_or_fail  # type: ignore[method-assign]
    RunCheckpoints.is_written = lambda checkpoints: False  # type: ignore[method-assign]
    return run_pretrain.main(argv)


@pytest.mark.parametrize(("failing_ranks", "kind"), [([1], "memory"), ([0, 1], "data")])
def test_a_checkpoint_that_was_written_is_there_after_an_error(
    small: SmallRun, failing_ranks: list[int], kind: str
) -> None:
    """Of one rank, whose end the other one sees in a collective, or of all of them."""
    argv, log = small.argv("run", FLAGS), small.folder / "log"
    codes = on_ranks(2, main_with_an_error, argv, failing_ranks, kind, log=log)
    assert 0 not in codes
    assert [path.name for path in list_checkpoints(small.folder / "run")] == ["step_00000000", "step_00000002"], (
        log.read_text()
    )
    assert not [path for path in (small.folder / "run").iterdir() if path.name.startswith(".tmp")]
    assert not list((small.folder / "run").rglob("*.written"))
    assert small.run_on(2, "run", **FLAGS, continue_from="auto").checkpoint().update_step == 4


def main_with_a_bug_in_writing(argv: list[str]) -> int:
    """`run_pretrain.main` in which the second rank cannot write the checkpoint after two updates."""
    write = Unfinished.write

    def write_or_fail(unfinished: Unfinished, number: int, *rest: Any) -> Any:
        if number == 1 and unfinished.target.name == "step_00000002":
            raise ZeroDivisionError("a bug")
        return write(unfinished, number, *rest)

    Unfinished.write = write_or_fail  # type: ignore[method-assign]
    return run_pretrain.main(argv)


def test_what_one_rank_cannot_write_all_ranks_learn(small: SmallRun) -> None:
    """Also where that is a bug: the others would wait for its answer."""
    log = small.folder / "log"
    assert on_ranks(2, main_with_a_bug_in_writing, small.argv("run", FLAGS), log=log) == [2, 2]
    said = log.read_text()
    assert "was not saved: rank 1 could not write its part (ZeroDivisionError: a bug)" in said
    assert "write_or_fail" in said, "the traceback of the bug"
    assert [path.name for path in small.result("run").checkpoints] == ["step_00000000"]
