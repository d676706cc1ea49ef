"""Deferred metrics are returned one update later, in order, all of them, with the values they had when stored."""

from __future__ import annotations

import pytest
import torch

from peft_pretraining.runtime.deferred_metrics import DeferredMetrics

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_what_goes_in_comes_out_one_later_and_in_order() -> None:
    deferred, out = DeferredMetrics(), []
    for step in range(1, 6):
        out.append(deferred.take())
        deferred.put(step, {"loss": torch.tensor(step / 2), "lr": 0.1 * step})
    assert out == [None] + [(step, {"loss": step / 2, "lr": 0.1 * step}) for step in range(1, 5)]
    assert deferred.take() == (5, {"loss": 2.5, "lr": 0.5})
    assert deferred.take() is None


def test_no_metrics_are_lost() -> None:
    deferred = DeferredMetrics()
    deferred.put(1, {"loss": 1.0})
    with pytest.raises(AssertionError, match="update 1 "):
        deferred.put(2, {"loss": 1.0})
    assert deferred.take() == (1, {"loss": 1.0})


@pytest.mark.parametrize("device", DEVICES)
def test_every_kind_of_value(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    deferred = DeferredMetrics()
    tensors = {
        "float32": torch.tensor(1.25, device=device),
        "bfloat16": torch.tensor(2.5, dtype=torch.bfloat16, device=device),
        "count": torch.tensor(7, device=device),
        "flag": torch.tensor(True, device=device),
        "nan": torch.tensor(float("inf"), device=device),
        "with_grad": torch.tensor(3.0, device=device, requires_grad=True) * 2,
    }
    deferred.put(3, {"first": 0.5, **tensors, "last": 4.0})
    taken = deferred.take()
    assert taken is not None
    step, values = taken
    assert step == 3
    assert values == {
        "first": 0.5, "float32": 1.25, "bfloat16": 2.5, "count": 7.0, "flag": 1.0, "nan": float("inf"),
        "with_grad": 6.0, "last": 4.0,
    }  # fmt: skip
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_is_that_of_the_moment(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    deferred, loss = DeferredMetrics(), torch.tensor(1.0, device=device)
    metrics = {"loss": loss}
    deferred.put(1, metrics)
    loss += 1  # the next update reuses the tensor
    metrics["loss"] = loss
    assert deferred.take() == (1, {"loss": 1.0})
    deferred.put(2, metrics)
    assert deferred.take() == (2, {"loss": 2.0})


def test_without_tensors_or_without_anything() -> None:
    deferred = DeferredMetrics()
    assert deferred.take() is None
    deferred.put(1, {"lr": 0.5})
    assert deferred.take() == (1, {"lr": 0.5})
    deferred.put(2, {})
    assert deferred.take() == (2, {})
