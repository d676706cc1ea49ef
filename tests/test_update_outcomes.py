"""The outcome of an update: read from the device one update later; the training loop alone acts on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.reporting.reporter import RunMetrics
from peft_pretraining.runtime.update_outcomes import Outcome, UpdateOutcomes
from qgalore.update.loss_scale import LossScale
from tests.small_run import SmallRun, flags_of
from tests.test_skipped_updates import Fault, run_with

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


class Told:
    """An optimizer that says of its last update what it was told to."""

    param_groups = ({"lr": 0.1}, {"lr": 0.2})

    def __init__(self, skipped: bool, late_overflow: bool, loss_scale: LossScale | None = None) -> None:
        self._skipped, self._late_overflow = torch.tensor(skipped), torch.tensor(late_overflow)
        self.loss_scale = loss_scale

    def grad_norm(self) -> Tensor:
        return torch.tensor(2.0)

    def skipped(self) -> Tensor:
        return self._skipped

    def late_overflow(self) -> Tensor:
        return self._late_overflow

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        return {"subspace/refreshes": 3.0}


class NothingIsRead(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("start", "fixed", "loss", "expected"),
    [
        (2.0, None, 1.5, Outcome.SCALE_TOO_LARGE),
        (1.0, None, 1.5, Outcome.SKIPPED),  # it cannot fall
        (2.0, None, float("nan"), Outcome.SKIPPED),  # and would not help
        (2.0, 2.0, 1.5, Outcome.SKIPPED),
    ],
)
def test_an_overflow_that_halves_the_loss_scale_is_an_outcome_of_its_own(
    start: float, fixed: float | None, loss: float, expected: Outcome
) -> None:
    outcomes, scale = UpdateOutcomes(), LossScale("cpu", fixed)
    scale.load_state_dict({"scale": start, "updates_since": 0})
    with NothingIsRead():
        outcomes.put(5, {"train/loss": torch.tensor(loss)}, Told(True, False, scale), {})  # type: ignore[arg-type]
        scale.update_(torch.tensor(True))
    finished = outcomes.take()
    assert finished is not None and finished.outcome is expected
    assert finished.metrics["train/loss_scale"] == start and "train/loss_scale_can_fall" not in finished.metrics


@pytest.mark.parametrize(
    ("skipped", "late_overflow", "expected"),
    [
        (False, False, Outcome.MADE),
        (True, False, Outcome.SKIPPED),
        (True, True, Outcome.LATE_OVERFLOW),
    ],
)
def test_the_outcome_is_what_the_device_says(skipped: bool, late_overflow: bool, expected: Outcome) -> None:
    outcomes = UpdateOutcomes()
    assert outcomes.take() is None
    with NothingIsRead():
        outcomes.put(5, {"train/loss": torch.tensor(1.5)}, Told(skipped, late_overflow), {"time/x": 0.5})  # type: ignore[arg-type]
    finished = outcomes.take()
    assert finished is not None and (finished.update_step, finished.outcome) == (5, expected)
    assert finished.metrics == {
        "train/loss": 1.5, "train/lr": 0.2, "train/full_rank_lr": 0.1, "train/grad_norm": 2.0,
        "train/skipped": float(skipped), "subspace/refreshes": 3.0, "time/x": 0.5,
    }  # fmt: skip
    assert outcomes.take() is None


@pytest.fixture
def blind_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger that is told of updates and does nothing with them."""
    monkeypatch.setattr(RunMetrics, "update", lambda self, finished: None)


@pytest.mark.usefixtures("blind_logger")
def test_too_many_skipped_updates_end_a_run_whatever_its_logger_does(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = PER_LAYER | {"num_training_steps": 9, "max_skipped_updates": 3, "batch_size": 4}
    assert run_with(Fault("loss", (3, 4, 5, 6)), small.argv("run", flags)) == 2
    assert "--max_skipped_updates 3: 4 updates in a row" in capsys.readouterr().err
    assert small.result("run").train_lines == []


@pytest.mark.usefixtures("blind_logger")
def test_an_update_with_a_late_overflow_sends_a_run_back_whatever_its_logger_does(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = PER_LAYER | {"num_training_steps": 5, "save_every": 2, "batch_size": 8}
    assert run_with(Fault("gradient", (3,)), small.argv("run", flags)) == 0
    said = capsys.readouterr().err
    assert "update 4: a gradient further down was not finite" in said
    assert "2 of 5 updates are made already" in said
    assert len((small.folder / "run" / "command.txt").read_text().splitlines()) == 1, "it was one start"
