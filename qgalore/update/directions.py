"""The direction of an update from the gradient, projected where that is low-rank: Adam's, or one that needs less state.

- adam: both moments of each value (`qgalore.update.moments`).
- `ADAM_BY_ROW`, of matrices at full rank: Adam's with one second moment a row, the mean over its values, as Adam-mini
  has it for embeddings and head (Zhang et al., arXiv 2406.16793), and Nesterov's momentum.
- orthogonal: Muon's (Jordan et al., kellerjordan.github.io/posts/muon, 2024), which replaces the momentum M = U S Vᵀ by
  U Vᵀ, so that all directions of the momentum move the weight alike. No second moment.
- normuon: that with each row over the root of its second moment, one number a row (Li et al., arXiv 2510.05491).

How a momentum is orthogonalised, `qgalore.update.newton_schulz` says. All move their moments in place and keep them,
to the bit, where the flag `skip` is true. The gradient is factor * grad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from qgalore import kernels
from qgalore.kernels import AdamStep
from qgalore.torch_internals import internal
from qgalore.update import moments
from qgalore.update.momentum_in_parts import PartsStep
from qgalore.update.momentum_sum import SummedStep
from qgalore.update.newton_schulz import Method, method_of, segments_of

ORTHOGONAL_RMS = 0.2
"""Of an orthogonal direction, about that of Adam's (Liu et al., arXiv 2502.16982)."""


Step = AdamStep | PartsStep | SummedStep


class RowsOfWeight(NamedTuple):
    """Rows of a plain weight, or all of it, in an update."""

    values: Tensor
    """A view of them, which the update writes."""
    step: Step
    """Of their gradient and moments; an `AdamStep` where there is one of each."""
    group: dict[str, Any]
    """The weight's param group."""
    number: int
    """Of the update, from 1."""


class Direction(NamedTuple):
    """How directions are made and what they keep."""

    advance: Callable[[Sequence[Any], Tensor | None], list[Tensor]]
    """advance(steps, skip) -> directions of several weights, whose moments it moves in place.

    steps: `AdamStep`, and with one moment also `PartsStep` and `SummedStep` of the modules of momenta.
    """
    moments: tuple[str, ...]
    """Moments of the gradient's shape, in the order of their powers."""
    batch_values: int
    """Gradients wait until they have more values than so many, and are then made directions of at once.

    That is faster for small matrices; of one large matrix there are enough values to fill a GPU.
    """
    by_row: bool = False
    """Whether there is a second moment of each row of the gradient (`qgalore.update.moments.ROW_MOMENT`)."""
    update: Callable[[Sequence[RowsOfWeight], Tensor | None], None] | None = None
    """update(parts, skip) moves moments and plain weights, in the place of `advance` and what follows it: for a kernel
    of another library that does both. Like them it keeps all, to the bit, where the flag `skip` is true."""


def orthogonal_directions(momenta: list[Tensor], newton_schulz: str = "muon") -> list[Tensor]:
    """Momenta, orthogonalised, of root mean square 0.2; newton_schulz names a method.

    Momenta are replaced in their list, so that the memory of those that nothing else has is free.
    """
    orthogonalized = _orthogonalized(momenta, newton_schulz)
    scaled: list[Tensor] = internal("torch._foreach_mul")(orthogonalized, [_scale(x) for x in orthogonalized])
    return scaled


def made_by_steps(matrices: list[Tensor], method: Method, segments: tuple[int, ...] | None) -> list[Tensor]:
    """What a method's steps make of matrices (m, n) whose shorter sides are equal; segments: None in the plain form."""
    if method.fp8:
        return kernels.orthogonalize_fp8(matrices, method.polynomials, schatten_norm=method.schatten_norm)
    return kernels.orthogonalize(matrices, method.polynomials, segments)


def _orthogonalized(momenta: list[Tensor], newton_schulz: str) -> list[Tensor]:
    """The list of momenta, with each replaced by one of singular values of about 1; those alike are made at once."""
    in_fp8 = partial(kernels.runs_in_fp8, device=momenta[0].device)
    alike: dict[tuple[Method, int, tuple[int, ...] | None], list[int]] = {}
    for index, momentum in enumerate(momenta):
        rows = min(momentum.shape)
        method = method_of(newton_schulz, rows, in_fp8)
        form = segments_of(momentum.shape, len(method.polynomials)) if method.segmented else None
        alike.setdefault((method, rows, form), []).append(index)
    for (method, _, form), indices in alike.items():
        given = [momenta[index] for index in indices]
        made = made_by_steps(given, method, form)
        del given
        for index, each in zip(indices, made, strict=True):
            momenta[index] = each
    return momenta


def _scale(orthogonalized: Tensor) -> float:
    """What makes of an orthogonal matrix one of root mean square 0.2."""
    return ORTHOGONAL_RMS * math.sqrt(max(orthogonalized.shape))


def _momenta(steps: Sequence[Step], skip: Tensor | None) -> list[Tensor]:
    """`kernels.momentum_steps`, in bfloat16 on a GPU that has it; momenta that are not whole one after the other."""
    dtype = kernels.product_dtype(steps[0].grad.device)
    whole = {index: step._replace(dtype=dtype) for index, step in enumerate(steps) if isinstance(step, AdamStep)}
    moved = kernels.momentum_steps(list(whole.values()), moments.BLOCK_SIZE, skip) if whole else []
    found = dict(zip(whole, moved, strict=True))
    found |= {index: x.advance(dtype, skip) for index, x in enumerate(steps) if not isinstance(x, AdamStep)}
    return [found[index] for index in range(len(steps))]


def _orthogonal(steps: Sequence[Step], skip: Tensor | None, newton_schulz: str = "muon") -> list[Tensor]:
    """Muon's directions."""
    return orthogonal_directions(_momenta(steps, skip), newton_schulz)


def _adam_by_row(steps: Sequence[AdamStep], skip: Tensor | None) -> list[Tensor]:
    """exp_avg_sq of the steps: (rows,)."""
    return kernels.row_adam_steps(steps, moments.BLOCK_SIZE, skip)


def _normuon(steps: Sequence[Step], skip: Tensor | None, newton_schulz: str = "muon") -> list[Tensor]:
    """Orthogonalised momenta whose rows are alike in size; as a whole of the size of `_orthogonal`."""
    found = _orthogonalized(_momenta(steps, skip), newton_schulz)
    return kernels.normalize_rows([_rows_of(step, x) for step, x in zip(steps, found, strict=True)], skip)


def _rows_of(step: Step, direction: Tensor) -> kernels.RowNormalization:
    assert step.exp_avg_sq is not None
    return kernels.RowNormalization(
        direction, _scale(direction), step.exp_avg_sq, step.row, beta=step.betas[1], eps=step.eps
    )


ADAM_BY_ROW = Direction(_adam_by_row, moments.MOMENTS[:1], batch_values=3 << 20, by_row=True)
DIRECTIONS = {
    "adam": Direction(
        lambda steps, skip: kernels.adam_steps(steps, moments.BLOCK_SIZE, skip), moments.MOMENTS, batch_values=3 << 20
    ),
    "orthogonal": Direction(_orthogonal, moments.MOMENTS[:1], batch_values=1 << 24),
    "normuon": Direction(_normuon, moments.MOMENTS[:1], batch_values=1 << 24, by_row=True),
}


def direction_of(name: str, newton_schulz: str) -> Direction:
    """The direction of a name; where it is orthogonalised, by that method of `qgalore.update.newton_schulz`.

    Equal arguments give equal directions, by which weights are batched.
    """
    direction = DIRECTIONS[name]
    return direction if newton_schulz == "muon" or name == "adam" else _by_method(name, direction, newton_schulz)


@cache
def _by_method(name: str, direction: Direction, newton_schulz: str) -> Direction:
    advance = {"orthogonal": _orthogonal, "normuon": _normuon}[name]
    return direction._replace(advance=partial(advance, newton_schulz=newton_schulz))
