"""One update: finalize the gradients, check, clip, make directions, apply them, refresh the subspaces.

W <- round(decay * W - step_size * leftᵀ N right), where the direction N is made of the projected gradient by Adam or by
orthogonalisation (`qgalore.update.directions`), and the bases are those of GaLore (arXiv 2403.03507) and Q-GaLore
(arXiv 2407.08296). Scalars come from each weight's step row, and whether to skip from a flag, both on the device: the
host waits for nothing, and a CUDA graph of all this can be replayed.

Lists of weights go in, and are worked on in groups: of small matrices several at once are faster on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.linear import LowRankLinear
from qgalore.subspace.fira import full_direction
from qgalore.update import moments
from qgalore.update.all_reduce import Bucket
from qgalore.update.directions import Direction
from qgalore.update.finite_checks import UpdateChecks, limit_growth
from qgalore.update.gradient_sum import dense, rows_of_gradient
from qgalore.update.weight import Weight


def finalize_gradients(weights: Sequence[Weight], bucket: Bucket | None, checks: UpdateChecks) -> None:
    """Make the gradients of an update final, of this rank's sums or of those over the ranks, and check their norms."""
    summed = itertools.repeat(None, len(weights)) if bucket is None else bucket.summed()
    for weight, parts in zip(weights, summed, strict=True):
        weight.gradient.finalize(parts)
    checks.check({weight.index: weight.gradient.final for weight in weights})


def update_weights(weights: Sequence[Weight], checks: UpdateChecks, clip: Tensor | None = None) -> None:
    """Update weights with final gradients, scaled by `clip` (); where a check found one not finite nothing changes."""
    skip = checks.skip_on_device()
    skipped = skip is None and bool(checks.skip)
    for group in _groups(weights):
        factors = [_factor(weight, checks, clip) for weight in group]
        for weight in group:
            weight.count_update()
        if not skipped:
            _update_group(group, factors, skip)
        for weight in group:
            weight.clear()


def _update_group(weights: list[Weight], factors: list[Tensor | None], skip: Tensor | None) -> None:
    if _is_plain(weights[0]):
        _update_rows(weights[0], factors[0], skip)
        return
    for weight in weights:
        weight.subspace.change_before_step(weight.rotate_moments, skip)
    sketches = [weight.gradient.take_sketches() for weight in weights]
    steps = [
        weight.adam_step(dense(weight.gradient.final.take_stored()), factor)
        for weight, factor in zip(weights, factors, strict=True)
    ]
    # A residual is made of the projected gradient, too; others are freed when their directions are there.
    gradients = [step.grad if weight.has_residual else None for weight, step in zip(weights, steps, strict=True)]
    directions = weights[0].direction.of(steps, skip)
    del steps
    _apply(weights, directions, gradients, skip)
    del directions, gradients
    for weight, found in zip(weights, sketches, strict=True):
        weight.subspace.change_after_step(found, weight.rotate_moments, skip)


def _groups(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Weights whose directions are made at once: of one kind, and no more than fill a GPU; plain ones alone."""
    waiting: dict[Direction, list[Weight]] = {}
    for weight in weights:
        if _is_plain(weight):
            yield [weight]
            continue
        group = waiting.setdefault(weight.direction, [])
        group.append(weight)
        if sum(each.subspace.gradient_shape.numel() for each in group) > weight.direction.group_values:
            yield waiting.pop(weight.direction)
    yield from waiting.values()


def _is_plain(weight: Weight) -> bool:
    """Whether a weight is a float parameter under AdamW or Adam: embeddings, head, norms."""
    return weight.layer is None and weight.config is None


def _factor(weight: Weight, checks: UpdateChecks, clip: Tensor | None) -> Tensor | None:
    """What a gradient is multiplied by, (), to clip it and to limit the growth of its norm; None for 1."""
    growth = weight.group["norm_growth"]
    if not growth:
        return clip
    weight.init_state()
    factor = limit_growth(weight.state, growth, checks.squared_norms[weight.index], checks.skip)
    return factor if clip is None else factor * clip


def _apply(
    weights: list[Weight], directions: list[Tensor], gradients: list[Tensor | None], skip: Tensor | None
) -> None:
    """Project directions back and add them, in the dtype of the activations: to quantized weights at once."""
    layers: list[LowRankLinear] = []
    updates: list[kernels.QuantizedUpdate] = []
    for weight, direction, gradient in zip(weights, directions, gradients, strict=True):
        layer, dtype = weight.layer, weight.subspace.dtype
        if layer is None or layer.quantized_weight is None or gradient is not None:
            _apply_alone(weight, direction.to(dtype), gradient, skip)
        else:
            left, right = weight.subspace.bases(dtype)
            updates.append(layer.quantized_update(direction.to(dtype), left, right, weight.row))
            layers.append(layer)
    kernels.update_quantized_(updates, skip)
    for layer in layers:
        layer.was_written()


def _apply_alone(weight: Weight, direction: Tensor, gradient: Tensor | None, skip: Tensor | None) -> None:
    """The same for a weight that is float, or that has a residual, which is made of the projected gradient, too."""
    left, right = weight.subspace.bases(direction.dtype)
    full = weight.gradient.last_full(direction.dtype)
    if full is not None and gradient is not None:
        direction, left, right = full_direction(direction, gradient, full, left, right), None, None
    if weight.layer is not None:
        weight.layer.update_(direction, left, right, weight.row, skip)
    else:
        kernels.update_float_(weight.param.data, direction, left, right, weight.row, skip=skip)


def _update_rows(weight: Weight, factor: Tensor | None, skip: Tensor | None) -> None:
    """A plain parameter's update, a range of rows after the other: no float32 copy of a whole embedding is made."""
    grad = weight.gradient.final.take_stored()
    l2 = 0.0 if weight.group["decoupled_weight_decay"] else weight.group["weight_decay"]
    param = torch.atleast_1d(weight.param.data)
    for start, stop in moments.row_parts(weight.state, param.shape):
        part, scale, rows = rows_of_gradient(grad, start, stop), factor, param[start:stop]
        if l2:
            part, scale = kernels.scaled(part, factor).add(rows, alpha=l2), None
        step = weight.adam_step(part, scale, moments.rows_of(weight.state, start, stop))
        (direction,) = weight.direction.of([step], skip)
        kernels.update_float_(rows, direction, None, None, weight.row, row_start=start, skip=skip)
