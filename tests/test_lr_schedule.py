"""The learning-rate schedule against values worked out by hand."""

import pytest
import torch

from peft_pretraining.optim.lr_schedule import lr_multiplier, set_learning_rate

SCHEDULERS = ["cosine", "linear", "cosine_restarts"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warmup_grows_from_zero_to_the_peak(scheduler: str) -> None:
    values = [lr_multiplier(step, scheduler, warmup_steps=4, total_steps=20) for step in range(5)]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_warmup_the_first_update_has_the_peak(scheduler: str) -> None:
    assert lr_multiplier(0, scheduler, warmup_steps=0, total_steps=20) == 1.0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_after_the_end_it_stays_at_the_minimum(scheduler: str) -> None:
    for step in (20, 21, 1000):
        assert lr_multiplier(step, scheduler, warmup_steps=4, total_steps=20, min_lr_ratio=0.3) == 0.3


def test_half_way_down() -> None:
    # Half a cosine and a line are both in the middle between peak and minimum: (1 + 0.1) / 2.
    for scheduler in ("cosine", "linear"):
        value = lr_multiplier(60, scheduler, warmup_steps=20, total_steps=100, min_lr_ratio=0.1)
        assert value == pytest.approx(0.55)
    # A quarter of the way: 0.1 + 0.9 * (1 + cos(pi / 4)) / 2 and 1 - 0.9 / 4.
    assert lr_multiplier(40, "cosine", warmup_steps=20, total_steps=100) == pytest.approx(0.8681980515)
    assert lr_multiplier(40, "linear", warmup_steps=20, total_steps=100) == pytest.approx(0.775)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_decay_only_falls(scheduler: str) -> None:
    values = [lr_multiplier(step, scheduler, warmup_steps=10, total_steps=100) for step in range(10, 101)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


def test_restarts_repeat_one_cosine() -> None:
    def value(step: int) -> float:
        return lr_multiplier(step, "cosine_restarts", warmup_steps=20, total_steps=100, restart_cycles=4)

    cycles = [[value(start + step) for step in range(20)] for start in (20, 40, 60, 80)]
    for cycle in cycles:
        assert cycle == pytest.approx(cycles[0])
        assert cycle[0] == 1.0
        assert cycle[10] == pytest.approx(0.55)
        assert cycle[19] < 0.11


def test_one_restart_cycle_is_the_cosine() -> None:
    for step in range(101):
        options = {"warmup_steps": 10, "total_steps": 100, "restart_cycles": 1}
        assert lr_multiplier(step, "cosine_restarts", **options) == lr_multiplier(step, "cosine", **options)


def test_warmup_longer_than_the_run() -> None:
    assert lr_multiplier(9, "cosine", warmup_steps=1000, total_steps=10) == pytest.approx(0.009)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'constant'"):
        lr_multiplier(0, "constant", warmup_steps=0, total_steps=10)


def test_each_group_is_scaled_from_its_own_peak() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.002}])
    for multiplier in (0.0, 0.5, 1.0, 0.1):
        set_learning_rate(optimizer, multiplier)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01 * multiplier, 0.002 * multiplier]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.002]
