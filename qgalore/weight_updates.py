"""The updates of several weights whose gradients are complete, with the directions that are made of all at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qgalore.direction import VALUES_TOGETHER, Direction
from qgalore.full_rank_weight import FullRankWeight
from qgalore.update_checks import UpdateChecks


def update_weights(weights: Sequence[FullRankWeight], checks: UpdateChecks, clip: Tensor | None = None) -> None:
    """Update weights whose gradients are complete and checked; `clip` is a factor of all of them, ()."""
    waiting: list[tuple[FullRankWeight, Tensor]] = []
    for weight in weights:
        factor = weight.limit_growth(checks.squared_norms[weight.index], checks.skip)
        if factor is None or clip is None:
            factor = clip if factor is None else factor
        else:
            factor = factor * clip
        started = weight.update(weight.release(), factor, checks.skip)
        if started is not None:
            waiting.append((weight, started))
        if sum(values.numel() for _, values in waiting) > VALUES_TOGETHER:
            _finish(waiting)
    _finish(waiting)


def _finish(waiting: list[tuple[FullRankWeight, Tensor]]) -> None:
    """Make the directions that updates wait for, those of one kind and rank at once, and finish; then none waits."""
    alike: dict[tuple[Direction, int], list[tuple[FullRankWeight, Tensor]]] = {}
    for weight, values in waiting:
        alike.setdefault((weight.direction, min(values.shape)), []).append((weight, values))
    waiting.clear()
    for (kind, _), started in alike.items():
        assert kind.together is not None
        for (weight, _), direction in zip(started, kind.together([values for _, values in started]), strict=True):
            weight.finish_update(direction)
