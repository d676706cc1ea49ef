"""When subspaces are refreshed: staggering, the lazy rule, counts."""

import dataclasses
import itertools
from typing import Any

import pytest

from qgalore.config import SubspaceConfig
from qgalore.subspace.schedule import RefreshSchedule, first_refresh_spread


def schedules(count: int, interval: int) -> list[RefreshSchedule]:
    options = SubspaceConfig(rank=4, update_proj_gap=interval, gamma_proj=1)
    return [RefreshSchedule(options, index, count) for index in range(count)]


def refreshes(weights: list[RefreshSchedule], updates: int) -> list[list[int]]:
    """For each update the numbers of the weights refreshed in it."""
    found = []
    for update_step in range(updates):
        due = [k for k, weight in enumerate(weights) if weight.due(update_step)]
        for k in due:
            weights[k].record(update_step, None)
        found.append(due)
    return found


@pytest.mark.parametrize(("count", "interval"), [(56, 200), (56, 50), (200, 50), (7, 200), (224, 500), (1, 10)])
def test_no_update_refreshes_many(count: int, interval: int) -> None:
    spread = first_refresh_spread(count, interval)
    found = refreshes(schedules(count, interval), spread + 4 * interval)
    first, later = found[:spread], found[spread:]
    # A few second refreshes fall among the first.
    assert max(map(len, first)) <= -(-count // spread) + -(-count // interval)
    assert max(map(len, later)) <= -(-count // interval)
    assert sorted({k for due in first for k in due}) == list(range(count))


def test_first_refreshes_take_eight_updates_or_more_for_large_models() -> None:
    # 60M, 130M, 350M, 7B, 13B, and intervals that are shorter.
    cases = [(56, 200, 8), (84, 200, 12), (168, 200, 24), (224, 500, 32), (280, 200, 40), (224, 10, 10), (56, 1, 1)]
    for count, interval, spread in cases:
        assert first_refresh_spread(count, interval) == spread


@pytest.mark.parametrize(("count", "interval"), [(56, 200), (200, 50), (5, 3), (9, 1)])
def test_every_weight_is_refreshed_every_interval(count: int, interval: int) -> None:
    found = refreshes(schedules(count, interval), 8 + 5 * interval)
    for k in range(count):
        times = [update for update, due in enumerate(found) if k in due]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert times[0] < first_refresh_spread(count, interval)
        assert gaps[0] <= interval
        assert all(gap == interval for gap in gaps[1:])


def test_a_first_refresh_without_a_gradient_is_put_off() -> None:
    """To the next update, and later from time to time, but never for more than an interval."""
    weight, tries = schedules(8, 20)[3], []
    for update_step in range(100):
        if weight.due(update_step):
            tries.append(update_step)
            weight.put_off(update_step)
    assert tries == [3, 7, 15, 31, 51, 71, 91] and weight.refreshes == 0
    weight.record(100, None)
    assert weight.refreshes == 1 and 100 < weight.next_refresh <= 120


def test_a_late_update_still_finds_its_refresh() -> None:
    weight = RefreshSchedule(SubspaceConfig(rank=4, update_proj_gap=10), index=0, count=1)
    weight.record(0, None)
    assert not weight.due(weight.next_refresh - 1)
    assert weight.due(weight.next_refresh) and weight.due(weight.next_refresh + 3)


# ---- the lazy rule


def lazy(queue_size: int = 3) -> RefreshSchedule:
    options = SubspaceConfig(rank=4, update_proj_gap=100, cos_threshold=0.4, gamma_proj=2, queue_size=queue_size)
    weight = RefreshSchedule(options, index=0, count=1)
    weight.record(0, None)  # the first basis has nothing to be compared with
    return weight


def feed(weight: RefreshSchedule, similarities: list[float | None]) -> list[int]:
    """Refresh with these similarities when due; returns the interval after each."""
    intervals = []
    for similarity in similarities:
        weight.record(weight.next_refresh, similarity)
        intervals.append(weight.interval)
    return intervals


def test_interval_grows_after_a_full_window_and_the_window_is_cleared() -> None:
    assert feed(lazy(), [0.9] * 7) == [100, 100, 200, 200, 200, 400, 400]


def test_interval_counts_from_the_refresh() -> None:
    weight = lazy()
    feed(weight, [0.9] * 2)
    at = weight.next_refresh
    weight.record(at, 0.9)
    assert weight.next_refresh == at + 200


def test_unsimilar_subspaces_keep_the_interval() -> None:
    assert feed(lazy(), [0.3, 0.39, 0.2] * 5) == [100] * 15


def test_the_window_slides_over_the_last_refreshes() -> None:
    # Means over three: 0.3, 0.367, then 0.433 is above the threshold.
    assert feed(lazy(), [0.3, 0.3, 0.3, 0.5, 0.5]) == [100, 100, 100, 100, 200]


def test_unknown_similarity_does_not_count() -> None:
    weight = lazy()
    assert feed(weight, [0.9, None, 0.9, None]) == [100] * 4
    assert feed(weight, [0.9]) == [200]


@pytest.mark.parametrize(("cap", "largest"), [(0, 800), (300, 300), (100, 100)])
def test_interval_has_a_cap(cap: int, largest: int) -> None:
    options = SubspaceConfig(rank=4, update_proj_gap=100, queue_size=1, max_update_proj_gap=cap)
    weight = RefreshSchedule(options, index=0, count=1)
    intervals = feed(weight, [1.0] * 12)
    assert intervals[-1] == largest and max(intervals) == largest


@pytest.mark.parametrize("without", [{"gamma_proj": 1}, {"subspace": "streaming"}])
def test_without_the_lazy_rule_nothing_grows(without: dict[str, Any]) -> None:
    options = SubspaceConfig(rank=4, update_proj_gap=100, queue_size=1, **without)
    weight = RefreshSchedule(options, index=0, count=1)
    assert feed(weight, [1.0] * 6) == [100] * 6
    assert weight.saved == 0


def test_saved_refreshes_are_counted() -> None:
    weight = lazy(queue_size=1)
    # Intervals 200, 400, 800, 800: 1 + 3 + 7 + 7 refreshes that a fixed interval would have made between.
    assert feed(weight, [1.0] * 4) == [200, 400, 800, 800]
    assert weight.saved == 18
    assert weight.refreshes == 5


def test_a_schedule_goes_on_from_its_state() -> None:
    def pattern(update: int) -> float:
        return 0.3 + 0.4 * (update % 3)

    def run(weight: RefreshSchedule, start: int, stop: int) -> list[int]:
        made = []
        for update in range(start, stop):
            if weight.due(update):
                weight.record(update, pattern(update))
                made.append(update)
        return made

    def new() -> RefreshSchedule:
        return RefreshSchedule(SubspaceConfig(rank=4, update_proj_gap=7, queue_size=2), index=3, count=5)

    whole, half, again = new(), new(), new()
    expected = run(whole, 0, 300)
    made = run(half, 0, 90)
    for field in ("interval", "next_refresh", "refreshes", "saved", "window"):
        setattr(again, field, getattr(half, field))
    assert made + run(again, 90, 300) == expected
    assert dataclasses.asdict(again) == dataclasses.asdict(whole)


def test_a_state_of_a_longer_queue_is_cut_to_this_ones() -> None:
    """So that the rows which ranks send each other are as long on all, whichever queue the checkpoint had."""
    long, short = (
        RefreshSchedule(SubspaceConfig(rank=4, update_proj_gap=2, cos_threshold=1.0, queue_size=size), 0, 1)
        for size in (4, 2)
    )
    for update_step, similarity in enumerate((None, 0.1, 0.2, 0.3)):
        long.record(update_step, similarity)
    state: dict[str, Any] = {}
    long.save(state)
    short.load(state)
    assert short.window == [0.2, 0.3]
