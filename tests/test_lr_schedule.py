"""The learning-rate schedule against values worked out by hand."""

from typing import Any

import pytest
import torch

from peft_pretraining.config.flag_groups import ScheduleArgs
from peft_pretraining.optim.lr_schedule import (
    Decay,
    describe_change,
    describe_schedule,
    lr_multiplier,
    scheduled_multiplier,
    set_learning_rate,
)

FALLING = ["cosine", "linear", "cosine_restarts", "wsd"]
SCHEDULERS = [*FALLING, "constant"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warmup_grows_from_zero_to_the_peak(scheduler: str) -> None:
    values = [lr_multiplier(step, scheduler, warmup_steps=4, total_steps=20) for step in range(5)]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_warmup_the_first_update_has_the_peak(scheduler: str) -> None:
    assert lr_multiplier(0, scheduler, warmup_steps=0, total_steps=20) == 1.0


@pytest.mark.parametrize("scheduler", FALLING)
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
    with pytest.raises(ValueError, match="'inverse'"):
        lr_multiplier(0, "inverse", warmup_steps=0, total_steps=10)


def wsd(step: int, shape: str = "1-sqrt", total: int = 100, updates: int = 25, floor: float = 0.1) -> float:
    return lr_multiplier(
        step, "wsd", warmup_steps=10, total_steps=total, min_lr_ratio=floor, decay=Decay(updates, shape)
    )


def test_constant_has_no_end() -> None:
    values = {lr_multiplier(step, "constant", warmup_steps=10, total_steps=100) for step in (10, 11, 99, 100, 1000)}
    assert values == {1.0}


@pytest.mark.parametrize(
    ("shape", "values"),
    # 4, 9 and 16 of 25 updates into the decay: the roots are 0.4, 0.6 and 0.8.
    [
        ("1-sqrt", [0.1 + 0.9 * 0.6, 0.1 + 0.9 * 0.4, 0.1 + 0.9 * 0.2]),
        ("linear", [1 - 0.9 * 0.16, 1 - 0.9 * 0.36, 1 - 0.9 * 0.64]),
        ("exponential", [10**-0.16, 10**-0.36, 10**-0.64]),
    ],
)
def test_wsd_stays_and_then_falls(shape: str, values: list[float]) -> None:
    assert [wsd(step, shape) for step in range(10, 76)] == [1.0] * 66
    assert [wsd(step, shape) for step in (79, 84, 91)] == pytest.approx(values)
    falling = [wsd(step, shape) for step in range(75, 101)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 26 and falling[-1] == 0.1


def test_the_stable_phase_does_not_depend_on_the_length() -> None:
    assert [wsd(step) for step in range(76)] == [wsd(step, total=1000, updates=100) for step in range(76)]


def test_the_decay_is_a_number_of_updates_or_a_share_of_the_run() -> None:
    for steps, updates in ((0.1, 200), (300, 300), (0.2, 400), (1, 1)):
        args = ScheduleArgs(num_training_steps=2000, scheduler="wsd", warmup_steps=100, decay_steps=steps)
        assert (args.decay_updates, args.decay_start) == (updates, 2000 - updates)
        assert scheduled_multiplier(args, args.decay_start) == 1.0
        assert scheduled_multiplier(args, 2000 - updates // 2) < 1.0 or updates == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "grows from 0 to its peak at update 1,000, falls (cosine) to 0.1 of it at update 10,000"),
        ({"scheduler": "wsd", "decay_steps": 0.2, "min_lr_ratio": 0.0},
         "stays there to update 8,000 and falls (1-sqrt) to 0 of it at update 10,000"),
        ({"scheduler": "constant", "warmup_steps": 0}, "starts at its peak, stays there to update 10,000"),
        ({"scheduler": "cosine_restarts"}, "falls 4 times in a cosine, at last to 0.1 of it at update 10,000"),
        ({"num_training_steps": 500}, "would reach its peak at update 1,000, after the end at 500"),
    ],
)  # fmt: skip
def test_a_schedule_in_words(options: dict[str, Any], words: str) -> None:
    assert words in describe_schedule(ScheduleArgs(**options))


@pytest.mark.parametrize(
    ("before", "now", "step", "says"),
    [
        ({"scheduler": "wsd"}, {"scheduler": "wsd", "num_training_steps": 200}, 85, ""),
        ({"scheduler": "wsd"}, {"scheduler": "wsd", "num_training_steps": 200}, 95,
         "goes on at 1 of its peak, and the schedule of the checkpoint had 0.364 for update 95: it had begun to decay "
         "after update 90; a checkpoint from before goes on exactly"),
        ({"scheduler": "constant"}, {"scheduler": "wsd", "num_training_steps": 200}, 100, ""),
        ({}, {"num_training_steps": 200}, 55,
         "goes on at 0.881 of its peak, and the schedule of the checkpoint had 0.55 "),
    ],
)  # fmt: skip
def test_a_rate_that_goes_on_elsewhere_is_said(
    before: dict[str, Any], now: dict[str, Any], step: int, says: str
) -> None:
    old, new = ({"num_training_steps": 100, "warmup_steps": 10} | options for options in (before, now))
    text = describe_change(ScheduleArgs(**new), ScheduleArgs(**old), step)
    assert says in text if says else not text


def test_each_group_is_scaled_from_its_own_peak() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.002}])
    for multiplier in (0.0, 0.5, 1.0, 0.1):
        set_learning_rate(optimizer, multiplier)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01 * multiplier, 0.002 * multiplier]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.002]
