"""One weight matrix under projection: GaLore's and Q-GaLore's update, followed through.

Only the projected gradient is kept between micro-batches, and at a refresh, for the one weight at the one update, also
a sketch of the full gradient (streaming) or the full gradient itself (svd).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.grouped_update import LayerUpdate
from qgalore.subspace import fit
from qgalore.subspace.fira import full_direction
from qgalore.subspace.fit import projects_directly
from qgalore.subspace.schedule import RefreshSchedule
from qgalore.update import moments
from qgalore.update.directions import DIRECTIONS, Direction
from qgalore.update.full_rank import States
from qgalore.update.gradient_sum import Gradient, GradientAccumulator, dense, zeros
from qgalore.update.moments import GradientStep
from qgalore.update.step_table import StepTable
from qgalore.update.stored_bases import Basis, WeightWithBases

JOINED_BASIS_BYTES = 4 << 20
"""Up to this size a basis is multiplied with the input together with those of the weights that have the same input.

All of 1B's are; at 7B a product takes longer than reading its input, and three bases would take 25 MB.
"""
_START, _TEST_MATRIX, _RANGE_FINDER = range(2, 5)


class _BegunUpdate(NamedTuple):
    """What an update has to know again when its direction is there."""

    step: int
    projected: Tensor | None
    sketches: dict[str, Tensor]
    skip: Tensor | None


class LowRankWeight(WeightWithBases):
    """A weight matrix whose gradient is projected onto a subspace (GaLore, Q-GaLore)."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """See `FullRankWeight`."""
        super().__init__(param, seed)
        self.similarity: Tensor | None = None
        self._next_bases: dict[str, Basis] | None = None
        self._last_full: Tensor | None = None
        self._fulls = 0
        self._fit_failed = False
        self._begun: _BegunUpdate | None = None
        self._factor_dtype = torch.float32

    def bind(self, group: dict[str, Any], states: States, table: StepTable, index: int, place: int, count: int) -> None:
        """See `FullRankWeight`; the schedule of refreshes is rebuilt from the state."""
        super().bind(group, states, table, index, place, count)
        self._full = self._accumulator()
        # A place of its own: what a refresh allocates may be memory that CUDA graphs write over.
        self._newest_similarity = torch.zeros((), device=self.param.device)
        self._sketches: dict[str, GradientAccumulator] = {}
        self.schedule = RefreshSchedule(self.subspace, place, count)
        if "schedule" in self.state:
            s = self.schedule
            s.interval, s.next_refresh, s.refreshes, s.saved = self.state["schedule"].tolist()
            s.window = self.state["similarities"].tolist()

    def check(self) -> None:
        """Raise ValueError for a weight that is no matrix or has a side shorter than the rank."""
        super().check()
        rank, shape = self.subspace.rank, tuple(self.shape)
        if len(shape) != 2:
            raise ValueError(f"parameter {self.name} of shape {shape} is not a matrix: it cannot have a rank")
        for side in self.sides:
            if rank > shape[0 if side == "left" else 1]:
                raise ValueError(f"rank={rank} is larger than the {side} side of {self.name}, of shape {shape}")

    # ---- shape and state

    @property
    def gradient_shape(self) -> torch.Size:
        """See `FullRankWeight`."""
        return torch.Size(self.subspace.gradient_shape(self.shape))

    @property
    def values_to_sum(self) -> int:
        """See `FullRankWeight`."""
        return super().values_to_sum + (self.shape.numel() if self._has_residual else 0)

    @property
    def direction(self) -> Direction:
        """See `FullRankWeight`."""
        return DIRECTIONS[self.subspace.direction]

    @property
    def _has_residual(self) -> bool:
        return self.subspace.residual != "none"

    def _init_state(self) -> None:
        self.check()
        super()._init_state()
        m, n = self.shape
        self.state["failures"] = torch.zeros((), dtype=torch.int64, device=self.param.device)
        for side in self.sides:
            d = m if side == "left" else n
            start = fit.random_basis(self.subspace.rank, d, self._seed(_START, d), self.param.device)
            self._store(side, self._encode(start))
        self._save_schedule()

    def _save_schedule(self) -> None:
        s = self.schedule
        self.state["schedule"] = torch.tensor([s.interval, s.next_refresh, s.refreshes, s.saved], dtype=torch.int64)
        self.state["similarities"] = torch.tensor(s.window, dtype=torch.float64)

    # ---- the gradient

    @property
    def changes_subspace(self) -> bool:
        """See `FullRankWeight`."""
        return self.schedule.due(self.step)

    @property
    def _step_size(self) -> float:
        return float(self.group["lr"] * self.group["galore_scale"])

    @property
    def _needs_full_gradient(self) -> bool:
        return self.changes_subspace and self.subspace.subspace == "svd" and self.schedule.refreshes > 0

    def forms_gradient(self, input: Tensor) -> bool:
        """See `qgalore.layer.gradient_sink.GradientSink`."""
        side = "right" if "right" in self.sides else "left"
        return (
            self._needs_full_gradient
            or self._has_residual
            or not projects_directly(len(input), *self._matrix_shape, self.subspace.rank, side)
        )

    def input_basis(self, input: Tensor) -> Tensor | None:
        """See `qgalore.layer.gradient_sink.GradientSink`; None for a large one: several would take much memory."""
        large = self.subspace.rank * self._matrix_shape[1] * input.itemsize > JOINED_BASIS_BYTES
        if large or self.sides != ("right",) or self.forms_gradient(input):
            return None
        return self.basis("right", input.dtype)

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        """Add the projected gradient of one micro-batch from its factors; the full one only where an SVD is due."""
        self._factor_dtype = grad_output.dtype
        if projected is None and self.forms_gradient(input):
            self.accumulate_full(fit.gradient(grad_output, input, self._matrix_shape))
            return
        if projected is not None:
            gradient = fit.gradient(grad_output, projected, (self._matrix_shape[0], projected.shape[1]))
        else:
            left, right = self.basis("left", grad_output.dtype), self.basis("right", grad_output.dtype)
            gradient = fit.project_factors(grad_output, input, self._matrix_shape, left, right)
        self._add(self._sum, gradient)
        if self.changes_subspace:
            for side in self.sides:
                test = self._test_matrix(side, grad_output.dtype)
                d = self._matrix_shape[0 if side == "left" else 1]
                first, second = (input, grad_output) if side == "left" else (grad_output, input)
                first = first[:, : test.shape[1]] @ test.T
                self._add(self._sketch(side), fit.gradient(first, second, (test.shape[0], d)))

    def accumulate_full(self, grad: Tensor) -> None:
        """The same from a full gradient (m, n), which is kept only for a residual, and then the last one."""
        self._factor_dtype = grad.dtype
        if self._has_residual:
            self._last_full, self._fulls = grad, self._fulls + 1
        if self._needs_full_gradient:
            self._add(self._full, grad)
            return
        self._add(self._sum, fit.project(grad, self.basis("left", grad.dtype), self.basis("right", grad.dtype)))
        if self.changes_subspace:
            for side in self.sides:
                test = self._test_matrix(side, grad.dtype)
                self._add(self._sketch(side), test @ (grad.T if side == "left" else grad))

    def begin_sum(self) -> None:
        """See `FullRankWeight`; what a refresh sums beside the gradient has a place then, too."""
        super().begin_sum()
        if not self.changes_subspace:
            return
        device = self.param.device
        if self._needs_full_gradient:
            self._full.place = zeros(self.shape, self._sum_dtype, device)
            return
        for side in self.sides:
            shape = torch.Size((self.subspace.rank, self.shape[0 if side == "left" else 1]))
            self._sketches[side] = GradientAccumulator(self._sum_dtype, zeros(shape, self._sum_dtype, device))

    def _sketch(self, side: str) -> GradientAccumulator:
        return self._sketches.setdefault(side, self._accumulator())

    def _test_matrix(self, side: str, dtype: torch.dtype) -> Tensor:
        """What the gradient is multiplied with to sketch its range: (rank, other side) in dtype.

        The momentum, each row scaled to unit length: an average of recent projected gradients, so the sketch is one
        step of subspace iteration on the gradients' covariance. At first, and where both sides are projected, random.
        """
        m, n = self.shape
        if self.schedule.refreshes == 0 or len(self.sides) == 2:
            seed, other = self._seed(_TEST_MATRIX, m if side == "left" else n), n if side == "left" else m
            test = fit.random_matrix(self.subspace.rank, other, seed, self.param.device)
        else:
            momentum = moments.read_moment(self.state, "exp_avg")
            test = momentum if side == "left" else momentum.T
        norms, scaled = test.norm(dim=1, keepdim=True).clamp_min(1e-30), torch.empty_like(test, dtype=dtype)
        return torch.div(test, norms, out=scaled)  # rounded once

    @property
    def accumulates(self) -> bool:
        """Whether a micro-batch has reached the weight since the last complete gradient."""
        return not (self._sum.empty and self._full.empty)

    def clear(self) -> None:
        """Forget the gradient."""
        super().clear()
        self._full.clear()
        self._full.place = self._last_full = None
        self._fulls = 0
        self._sketches.clear()
        self._next_bases = None

    def parts_to_sum(self) -> list[Tensor]:
        """See `FullRankWeight`: the projected or full gradient, then the sketches, and what a residual is made of."""
        gradient = self._full if self._needs_full_gradient else self._sum
        parts = [part.take() for part in (gradient, *self._sketches.values())]
        return parts if self._last_full is None else [*parts, self._last_full]

    def complete(self, summed: list[Tensor] | None = None) -> None:
        """See `FullRankWeight`; of a full gradient the projection is held, and new bases are ready but not taken."""
        if self._needs_full_gradient:
            full = self._full.take() if summed is None else summed[0]
            self._next_bases = self._fit(full)
            bases = {side: self._decode(basis) for side, basis in self._next_bases.items()}
            grad = fit.project(full.float(), bases.get("left"), bases.get("right"))
            self._held.replace(grad, self._sum_row(-1))
        else:
            super().complete(summed)
        if summed is not None:
            if self._has_residual:
                *summed, self._last_full = summed
            for sketch, value in zip(self._sketches.values(), summed[1:], strict=True):
                sketch.add(value, self._sum_row(-2))

    def _fit(self, full: Tensor) -> dict[str, Basis]:
        """The SVD bases of a full gradient; the old ones where it fails."""
        bases: dict[str, Basis] = {}
        self._fit_failed = False
        for side in self.sides:
            seed = self._seed(_RANGE_FINDER) if self.subspace.svd_method == "randomized" else None
            fitted = fit.fit_svd(full, self.subspace.rank, side, seed)
            self._fit_failed |= fitted is None
            stored = self._stored(side)
            bases[side] = stored if fitted is None else self._encode(fit.with_signs_of(fitted, self._decode(stored)))
        return bases

    # ---- the update

    def _update(self, grad: Gradient, factor: Tensor | None, skip: Tensor | None) -> GradientStep | None:
        """The step in the subspace, up to what its direction is made of: several weights' are made together."""
        update_step = self.step
        sketches = {side: sketch.take() for side, sketch in self._sketches.items()}
        if self._next_bases is not None:
            self._take_fitted_bases(self._next_bases, update_step, skip)
        projected = None if self._last_full is None else dense(grad)  # a residual is made of both
        self._begun = _BegunUpdate(update_step, projected, sketches, skip)
        self._advance()
        given = grad if projected is None else projected
        betas, eps = self.group["betas"], self.group["eps"]
        return GradientStep(self.state, given, self._row, betas, eps, factor, self._factor_dtype)

    def apply_direction(self, direction: Tensor) -> LayerUpdate | None:
        """Project the direction back and add it; of a quantized weight without a residual that is left to do.

        It happens in the dtype of the layer's activations, with products summed in float32.
        """
        begun, dtype = self._begun_update(), self._factor_dtype
        direction, left, right = direction.to(dtype), self.basis("left", dtype), self.basis("right", dtype)
        if self._last_full is not None and begun.projected is not None:
            full = self._last_full.to(dtype)
            full = full if self._fulls <= 1 else full * self._fulls
            direction = full_direction(direction, begun.projected, full, left, right)
            left = right = None
        elif self.layer is not None and self.layer.quantized_weight is not None:
            return LayerUpdate(self.layer, direction, left, right, self._row)
        if self.layer is not None:
            self.layer.update_(direction, left, right, self._row, begun.skip)
        else:
            kernels.update_float_(self.param.data, direction, left, right, self._row, skip=begun.skip)
        return None

    def end_update(self) -> None:
        """The refresh where one is due."""
        begun, self._begun = self._begun_update(), None
        for side, sketch in begun.sketches.items():
            self._refresh_from_sketch(side, sketch, begun.skip)
        if begun.sketches and self.schedule.refreshes == 0 and not self._found_gradient(begun):
            self.schedule.put_off(begun.step)
            self.similarity = None
            self._save_schedule()
        elif begun.sketches:
            self._record(begun.step)
        self.clear()

    def _found_gradient(self, begun: _BegunUpdate) -> bool:
        """Whether the sketches of an update that was made are of a gradient other than zero: it waits for the device.

        Only a first refresh asks, so that the steady step waits for nothing.
        """
        found = torch.stack([sketch.any() for sketch in begun.sketches.values()]).all()
        return bool(found if begun.skip is None else found & ~begun.skip)

    def _begun_update(self) -> _BegunUpdate:
        assert self._begun is not None, f"no update of {self.name} waits for a direction"
        return self._begun

    def _take_fitted_bases(self, bases: dict[str, Basis], update_step: int, skip: Tensor | None) -> None:
        wanted = None if skip is None else ~skip
        similarities = [self._change_basis(side, basis, wanted) for side, basis in bases.items()]
        self.similarity = self._newest_similarity.copy_(torch.stack(similarities).mean())
        self.state["failures"] += self._fit_failed
        self._record(update_step)

    def _refresh_from_sketch(self, side: str, sketch: Tensor, skip: Tensor | None = None) -> None:
        basis, worked = fit.orthonormalize(sketch, self._decode(self._stored(side), self._factor_dtype))
        wanted = worked if skip is None else worked & ~skip
        self.similarity = self._newest_similarity.copy_(self._change_basis(side, self._encode(basis), wanted))
        self.state["failures"] += ~worked if skip is None else ~worked & ~skip

    def _change_basis(self, side: str, encoded: Basis, wanted: Tensor | None) -> Tensor:
        """Put a new basis into the state and rotate the moments into it if asked; returns the similarity with the old.

        Where the flag `wanted` on the device says no, basis and moments stay as they are, to the bit.
        """
        new, old = (self._decode(basis, self._factor_dtype) for basis in (encoded, self._stored(side)))
        change = new @ old.T
        similarity = fit.similarity(new, old, change)
        del new, old
        if self.subspace.rotates_moments:
            # One after the other: the second is read when the first has been written.
            for power, name in enumerate(self.direction.moments, start=1):
                rotated = fit.rotate_moment(moments.read_moment(self.state, name, change.dtype), change, side, power)
                moments.write_moment(self.state, name, rotated, None if wanted is None else ~wanted)
                del rotated
        self._store(side, encoded, wanted)
        return similarity

    def _record(self, update_step: int) -> None:
        assert self.similarity is not None
        # Only the lazy rule needs the number on the host, and only an SVD, which waits for the device anyway, is lazy.
        known = float(self.similarity) if self.schedule.lazy and self.schedule.refreshes > 0 else None
        self.schedule.record(update_step, None if self._fit_failed else known)
        self._save_schedule()
