"""The updates of several weights whose gradients are complete: of small matrices at once, which is faster on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qgalore.layer.grouped_update import update_layers_
from qgalore.update.directions import Direction
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.full_rank import FullRankWeight
from qgalore.update.moments import GradientStep

Begun = tuple[FullRankWeight, GradientStep]
"""A weight and what its direction is made of."""


def update_weights(weights: Sequence[FullRankWeight], checks: UpdateChecks, clip: Tensor | None = None) -> None:
    """Update weights whose gradients are complete and checked; `clip` is a factor of all of them, ()."""
    waiting: dict[Direction, list[Begun]] = {}
    for weight in weights:
        factor = weight.limit_growth(checks.squared_norms[weight.index], checks.skip)
        if factor is None or clip is None:
            factor = clip if factor is None else factor
        else:
            factor = factor * clip
        step = weight.update(weight.release(), factor, checks.skip)
        if step is None:
            continue
        begun = waiting.setdefault(weight.direction, [])
        begun.append((weight, step))
        if sum(each.gradient_shape.numel() for each, _ in begun) > weight.direction.values_together:
            _finish(weight.direction, begun, checks)
    for direction, begun in waiting.items():
        _finish(direction, begun, checks)


def _finish(kind: Direction, begun: list[Begun], checks: UpdateChecks) -> None:
    """Make the directions that begun updates wait for, apply them and end the updates; then none waits."""
    if not begun:
        return
    # On the host the flag was looked at when the updates began.
    skip = None if checks.skip.device.type == "cpu" else checks.skip
    weights, steps = zip(*begun, strict=True)
    begun.clear()
    directions = kind.steps(steps, skip)
    del steps
    updates = [weight.apply_direction(direction) for weight, direction in zip(weights, directions, strict=True)]
    update_layers_([update for update in updates if update is not None], skip)
    del directions, updates
    for weight in weights:
        weight.end_update()
