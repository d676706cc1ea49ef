"""One update of weights: from the sums of their gradients to new weights.

Before: during backward passes each layer's gradient sink and each parameter's hook (`qgalore.update.hooks`) add
gradients to `weight.gradient`, already projected where the weight has a subspace, without any clipping. With the last
micro-batch `qgalore.optimizer.update_cycle` calls `finalize_gradients`, then `update_weights`: at once for the weights
of each hook, if updates are made in the backward pass, else in `LowRankAdamW.step` for all. In this order:

At full rank the momentum may take the place of the sum (`qgalore.update.momentum_sum`): then `add_to_momenta` checks
each micro-batch's gradient and adds it, and at step 4 the momentum has them all.

1. `finalize_gradients`: the sums over micro-batches become final gradients, over all processes of a data-parallel run.
   Where a refresh by SVD is due the sum is that of the full gradient: it gives the new bases here, and is projected
   onto them. Norms are taken; one that is not finite sets the flag `checks.skip`.
2. Each gradient gets a factor, by which it is multiplied in step 4: that of clipping the norm of all gradients, which
   `LowRankAdamW.clip_grad_norm_` has worked out, and a limit to the growth of its own norm.
3. Bases that step 1 has found are stored, and the moments are rotated into them where the group says so.
4. A direction N is made of each gradient, in the subspace, by Adam or by orthogonalisation
   (`qgalore.update.directions`); this moves the moments.
5. W <- decay * W - step_size * leftᵀ N right, where left is (rank, out_features), right (rank, in_features), or one of
   them is missing, or both. A quantized weight is read from its codes and rounded back to codes, stochastically.
   At full rank what that has lost may be fed into the momentum (`qgalore.update.rounding_feedback`).
6. Where a streaming refresh was due, or the first one of an SVD, the backward passes have made a sketch beside the
   projected gradient: the next bases come of it, and the moments are rotated into them. Only the next update sees them.

When a subspace is refreshed its schedule says (`qgalore.subspace.schedule`), before the gradients of the update are
made. The subspaces are those of GaLore (arXiv 2403.03507) and Q-GaLore (arXiv 2407.08296).

The learning rate and all other scalars of an update come from the weight's *step row*, eight 32-bit values on the
device (`qgalore.update.step_table`), which the optimizer writes before. The flag `skip`, also on the device, is
cumulative over an update: it keeps every weight that is written after it was set, with its moments and bases, as it was
to the bit. That is the whole update where `step` makes it; in the backward pass upper layers may have been written
before (`LowRankAdamW.late_overflow`). So the host of a GPU waits for nothing, and a CUDA graph of all this can be
replayed; on a CPU the host looks at the flag itself. The count of updates, hence bias correction and random numbers,
goes on in any case; a refresh that was due stays due.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.linear import LowRankLinear
from qgalore.subspace import fit
from qgalore.subspace.fira import full_direction
from qgalore.subspace.methods import grouped_bases
from qgalore.update import moments, momentum_sum
from qgalore.update.all_reduce import Bucket
from qgalore.update.directions import Direction, RowsOfWeight, Step
from qgalore.update.finite_checks import UpdateChecks, limit_growth
from qgalore.update.gradient_sum import Gradient, rows_of_gradient
from qgalore.update.momentum_sum import Addition, SummedGradient
from qgalore.update.rounding_feedback import apply_with_feedback
from qgalore.update.weight import Weight

_SMALL = 1 << 16
"""Plain weights of up to so many values, norms and biases, share the launches of a batch."""


def add_to_momenta(weights: Sequence[Weight], checks: UpdateChecks, share: float | None) -> None:
    """Check the micro-batch's gradients of the weights that sum them in their momentum, and add them to it.

    share: of the momentum from before the update that each of several ranks has; None for one rank. From the first
    gradient that is not finite on nothing is added, which `UpdateChecks.late_overflow` tells if something was before.
    """
    waiting = [(weight, gradient) for weight, gradient in _summed(weights) if gradient.has_micro_batch]
    if not waiting:
        return
    if share is not None:  # what this rank alone finds out comes too late: others have added
        checks.note_write()
    scalars = [weight.addition_scalars(gradient.additions, share or 1.0) for weight, gradient in waiting]
    grads = {weight.index: gradient.take_micro_batch() for weight, gradient in waiting}
    checks.check_micro_batch(grads)
    checks.note_write()
    additions = [
        Addition(weight.state, grads[weight.index], weight.sum_row(each))
        for (weight, _), each in zip(waiting, scalars, strict=True)
    ]
    _add_unless_skipped(additions, checks)


def parts_to_sum(weight: Weight, checks: UpdateChecks) -> list[Tensor]:
    """What `finalize_gradients` needs the sums of over the ranks: `WeightGradient.parts_to_sum`, or the momentum.

    That is not finite where this rank has found a gradient that is not, so that all ranks learn of it; and with it goes
    the sum of its micro-batches' squared norms.
    """
    if not isinstance(weight.gradient, SummedGradient):
        return weight.gradient.parts_to_sum()
    momentum = torch.where(checks.skip, torch.nan, momentum_sum.read(weight.state))
    return [momentum, checks.squared_norms[weight.index, None]]


def store_momenta(weights: Sequence[Weight], checks: UpdateChecks) -> None:
    """After `finalize_gradients`: the momenta become those summed over the ranks, if they are finite."""
    values: dict[Weight, Tensor] = {}
    for weight, gradient in _summed(weights):
        if gradient.of_ranks is not None:
            values[weight], squared_norm = gradient.of_ranks
            checks.squared_norms[weight.index].copy_(squared_norm[0])
    if values:
        # Their norms are not asked for, whether they are finite is.
        norms = checks.squared_norms.new_zeros(len(values))
        kernels.check_gradients_(list(values.values()), norms, range(len(values)), checks.skip)
    _add_unless_skipped(
        [Addition(weight.state, x, weight.sum_row(weight.replacing_scalars())) for weight, x in values.items()], checks
    )


def _summed(weights: Sequence[Weight]) -> list[tuple[Weight, SummedGradient]]:
    """The weights whose gradients are summed in their momenta."""
    found = ((weight, weight.gradient) for weight in weights)
    return [(weight, gradient) for weight, gradient in found if isinstance(gradient, SummedGradient)]


def _add_unless_skipped(additions: Sequence[Addition], checks: UpdateChecks) -> None:
    skip = checks.skip_for_kernels()
    if additions and (skip is not None or not bool(checks.skip)):
        momentum_sum.add_(additions, skip)


def finalize_gradients(weights: Sequence[Weight], bucket: Bucket | None, waits: bool) -> None:
    """Step 1, but for the check: leaves `weight.gradient.final`.

    bucket: the sums of all processes, sent and on their way; None where this process is alone. waits: whether the
    gradients stay until others are there.
    """
    summed = itertools.repeat(None, len(weights)) if bucket is None else bucket.summed()
    for weight, parts in zip(weights, summed, strict=True):
        weight.gradient.finalize(parts, waits)


def check_gradients(weights: Sequence[Weight], checks: UpdateChecks) -> None:
    """The rest of step 1: the squared norms of final gradients go into `checks`, with the flag `checks.skip`."""
    checks.check({weight.index: weight.gradient.final for weight in weights if not weight.sums_in_momentum})


class Replay(Protocol):
    """Makes step 4 and 5 of batches in another way, such as by CUDA graphs (`qgalore.graphs.updates`)."""

    def update(
        self,
        weights: Sequence[Weight],
        gradients: Sequence[Gradient | None],
        factors: Sequence[Tensor | None],
        skip: Tensor | None,
    ) -> bool:
        """`make_update` of a batch without refreshes; returns whether it was made. The arguments stay as they are."""


def update_weights(
    weights: Sequence[Weight], checks: UpdateChecks, clip: Tensor | None = None, replay: Replay | None = None
) -> None:
    """Steps 2 to 6, which use up the final gradients; where `checks.skip` is true only the weights' steps are counted.

    The step rows of the update must have been written. clip: a factor () of all gradients, with the inverse of
    the loss's scale in it; None for 1.
    """
    skip = checks.skip_for_kernels()
    skip_on_host = skip is None and bool(checks.skip)
    for weight in weights:
        weight.count_update()
    factors = _gradient_factors(weights, checks, clip)
    for batch in _batches(weights):
        if not skip_on_host:
            _update_batch(batch, [factors[weight] for weight in batch], skip, replay)
        for weight in batch:
            weight.clear()


def _batches(weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Weights that are worked on at once, of one kind of direction; a large plain one is a batch of its own.

    That is faster for small ones. A batch is closed by the weight with which its gradients have enough values to fill a
    GPU, `batch_values`. So it also bounds memory.
    """
    waiting: dict[tuple[Direction, bool], list[Weight]] = {}
    values: dict[tuple[Direction, bool], int] = collections.defaultdict(int)
    for weight in weights:
        plain = _is_plain(weight)
        if plain and not is_small(weight):
            yield [weight]
            continue
        kind = weight.direction, plain
        waiting.setdefault(kind, []).append(weight)
        values[kind] += weight.subspace.gradient_shape.numel()
        if values[kind] > (kernels.PART if plain else weight.direction.batch_values):
            del values[kind]
            yield waiting.pop(kind)
    yield from waiting.values()


def is_small(weight: Weight) -> bool:
    """Whether a weight is a norm, a bias or another one that is best updated along with others."""
    return _is_plain(weight) and weight.param.numel() <= _SMALL


def _is_plain(weight: Weight) -> bool:
    """Whether a weight is a float parameter in a param group without a rank: embeddings, head, norms.

    What is not takes the way of batches, also with `Identity` for a subspace: a quantized layer without a rank.
    """
    return weight.layer is None and weight.config is None


def _gradient_factors(
    weights: Sequence[Weight], checks: UpdateChecks, clip: Tensor | None
) -> dict[Weight, Tensor | None]:
    """Step 2: what each gradient is to be multiplied by, a tensor (); None for 1.

    The growth limit sees the norm before clipping.
    """
    factors: dict[Weight, Tensor | None] = dict.fromkeys(weights, clip)
    limited: dict[float, list[Weight]] = {}
    for weight in weights:
        if growth := weight.param_group["norm_growth"]:
            limited.setdefault(growth, []).append(weight)
    norms = checks.norms().unbind() if limited else ()
    for growth, alike in limited.items():
        found = limit_growth(
            [weight.state for weight in alike], growth, [norms[weight.index] for weight in alike], checks.skip
        )
        factors |= zip(alike, (found if clip is None else found * clip).unbind(), strict=True)
    return factors


def _update_batch(
    weights: list[Weight], factors: list[Tensor | None], skip: Tensor | None, replay: Replay | None
) -> None:
    """Steps 3 to 6 for one batch. Where the flag `skip` is true, nothing that lasts is written.

    skip: a bool () on a GPU, None on a CPU, where this is not called for an update that is skipped.
    """
    gradients = [weight.take_gradient(stored=_is_plain(weight)) for weight in weights]
    sketches = [weight.gradient.take_sketches() for weight in weights]
    refreshes = any(sketches) or any(weight.subspace.has_fitted_bases for weight in weights)
    if replay is not None and not refreshes and replay.update(weights, gradients, factors, skip):
        return
    for weight in weights:
        weight.subspace.adopt_fitted_bases(weight.rotate_moments, skip)
    make_update(weights, gradients, factors, skip)
    for weight, sketch in zip(weights, sketches, strict=True):
        weight.subspace.refresh_from_sketches(sketch, weight.rotate_moments, skip)


def make_update(
    weights: list[Weight], gradients: list[Gradient | None], factors: list[Tensor | None], skip: Tensor | None
) -> None:
    """Steps 4 and 5 for one batch. Its gradients leave the list, so that they are freed as soon as they can be."""
    if _is_plain(weights[0]):
        _update_plain(weights, gradients, factors, skip)
        return
    steps: list[Step] = []
    kept: list[Tensor | None] = []
    gradients.reverse()
    for weight, factor in zip(weights, factors, strict=True):
        steps.append(weight.make_step(gradients.pop(), factor))
        # Fira's residual needs the projected gradient again; all others are freed once there are directions.
        kept.append(steps[-1].grad if weight.has_residual else None)
    directions = weights[0].direction.advance(steps, skip)
    del steps
    _apply(weights, directions, kept, skip)


def _apply(
    weights: list[Weight], directions: list[Tensor], gradients: list[Tensor | None], skip: Tensor | None
) -> None:
    """Step 5: project directions back and apply them, to quantized weights without a residual in one call of a kernel.

    gradients: the projected ones of weights with a residual (`qgalore.subspace.fira`), else None.
    """
    layers: list[LowRankLinear] = []
    grouped: list[Weight] = []
    for weight, direction, gradient in zip(weights, directions, gradients, strict=True):
        layer = weight.layer
        if layer is not None and weight.config is not None and weight.config.rounding_feedback:
            apply_with_feedback(layer, weight, direction.to(weight.subspace.dtype), skip)
        elif layer is None or layer.quantized_weight is None or gradient is not None:
            _apply_one(weight, direction.to(weight.subspace.dtype), gradient, skip)
        else:
            grouped.append(weight)
            layers.append(layer)
    found = dict(zip(weights, directions, strict=True))
    bases = grouped_bases([weight.subspace for weight in grouped])
    updates = [
        layer.quantized_update(found[weight].to(weight.subspace.dtype), left, right, weight.step_row)
        for layer, weight, (left, right) in zip(layers, grouped, bases, strict=True)
    ]
    kernels.update_quantized_(updates, skip)
    for layer in layers:
        layer.was_written()


def _apply_one(weight: Weight, direction: Tensor, gradient: Tensor | None, skip: Tensor | None) -> None:
    """Step 5 for a float weight, or for any with a residual.

    That makes the direction, by the full gradient of the last micro-batch, one of the whole weight, without bases.
    """
    left, right = weight.subspace.bases(direction.dtype)
    full = weight.gradient.full_of_last_micro_batch(fit.wide_dtype(direction.dtype))
    if gradient is not None and full is not None:
        direction, left, right = full_direction(direction, gradient, full, left, right), None, None
    if weight.layer is not None:
        weight.layer.update_(direction, left, right, weight.step_row, skip)
    else:
        kernels.update_float_([kernels.FloatUpdate(weight.param.data, direction, left, right, weight.step_row)], skip)


def _update_plain(
    weights: list[Weight], gradients: list[Gradient | None], factors: list[Tensor | None], skip: Tensor | None
) -> None:
    """Steps 4 and 5 for plain weights: small ones at once, or one large one, some of its rows at a time.

    So no float32 copy of a whole embedding is made.
    """
    parts = [
        (weight, gradient, factor, start, stop)
        for weight, gradient, factor in zip(weights, gradients, factors, strict=True)
        if gradient is not None
        for start, stop in moments.row_parts(weight.state, weight.moment_shape or torch.Size((1,)))
    ]
    gradients.clear()
    grouped = len(parts) if len(weights) > 1 else 1
    for first in range(0, len(parts), grouped):
        _update_rows(parts[first : first + grouped], skip)


def _update_rows(parts: Sequence[tuple[Weight, Gradient, Tensor | None, int, int]], skip: Tensor | None) -> None:
    """Steps 4 and 5 for rows of plain weights: (weight, gradient, factor, start, stop) each.

    Nothing that is made for them is there any more when the next ones are made.
    """
    weights = [part[0] for part in parts]
    steps = [_step_of_rows(*part) for part in parts]
    rows = [_rows_of_weight(weight, start, stop) for weight, _, _, start, stop in parts]
    if update := weights[0].direction.update:
        found = zip(weights, rows, steps, strict=True)
        update([RowsOfWeight(each, step, weight.param_group, weight.step) for weight, each, step in found], skip)
        return
    directions = weights[0].direction.advance(steps, skip)
    updates = [
        kernels.FloatUpdate(each, direction, None, None, weight.step_row, row_start=weight.first_row + start)
        for (weight, _, _, start, _), each, direction in zip(parts, rows, directions, strict=True)
    ]
    kernels.update_float_(updates, skip)


def _rows_of_weight(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows of a plain weight, numbered as those of its moments."""
    if weight.kept_rows is not None:
        return kernels.rows_of(weight.kept_rows, start, stop)
    return kernels.rows_of(weight.param.data, weight.first_row + start, weight.first_row + stop)


def _step_of_rows(weight: Weight, gradient: Gradient, factor: Tensor | None, start: int, stop: int) -> Step:
    """The step of rows start:stop of a plain weight.

    Weight decay that is not decoupled (Adam, not AdamW) is added to the gradient here, after the factor.
    """
    grad, l2 = rows_of_gradient(gradient, start, stop), weight.param_group["weight_decay"]
    if l2 and not weight.param_group["decoupled_weight_decay"]:
        grad = kernels.scaled(grad, factor).add(_rows_of_weight(weight, start, stop), alpha=l2)
        factor = None
    return weight.prepare_step(grad, factor, moments.rows_of_state(weight.state, start, stop))
