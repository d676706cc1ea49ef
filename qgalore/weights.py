"""One weight followed through an update: its gradient, its moments and its new value.

A `FullRankWeight` takes the gradient as it is. A `LowRankWeight` keeps only the projected gradient, and at a refresh,
for the one weight at the one update, also a sketch of the full one (streaming) or the full one itself (svd).

The order is the same for both: `accumulate` or `accumulate_full` once a micro-batch; `complete` when the last one is
in, which sums over the ranks; then `update`, which is the first to touch moments, basis or weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgalore import adam, kernels, subspace
from qgalore.accumulator import GradientAccumulator
from qgalore.linear import LowRankLinear
from qgalore.quantization import QuantizedTensor, quantize
from qgalore.seeding import mix_seed
from qgalore.subspace_schedule import RefreshSchedule

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all ranks, in place."""

_ROUNDING, _ACCUMULATION, _START, _TEST_MATRIX, _RANGE_FINDER = range(5)


class FullRankWeight:
    """A weight under plain AdamW: embeddings, head, norms, and every weight of an ordinary Adam run."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """seed: that of the run, from which with the step and the index all rounding is seeded."""
        self.param, self.seed = param, seed
        self.layer: LowRankLinear | None = None
        self.name = ""
        self.grad: Tensor | None = None
        self._additions = 0

    def bind(self, group: dict[str, Any], state: dict[str, Tensor], index: int, place: int, count: int) -> None:
        """Take up hyperparameters and state: index numbers the weights, place the low-rank ones among `count`."""
        self.group, self.state, self.index = group, state, index
        self.name = self.name or str(index)
        self._sum = self._accumulator()

    def _accumulator(self) -> GradientAccumulator:
        return GradientAccumulator(getattr(torch, self.group["accumulator_dtype"]))

    def check(self) -> None:
        """Raise ValueError where the weight cannot be trained as its group says."""
        if self.layer is None and not self.param.is_floating_point():
            raise ValueError(
                f"parameter {self.name} is quantized and no LowRankLinear of the model holds it: "
                "call attach(model) with the model whose parameters the optimizer was given"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, whatever its storage."""
        if self.layer is None:
            return self.param.shape
        return torch.Size((self.layer.out_features, self.layer.in_features))

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self.state["step"]) if "step" in self.state else 0

    def _seed(self, purpose: int, *parts: int) -> int:
        return mix_seed(self.seed, self.step, self.index, purpose, *parts)

    def clear(self) -> None:
        """Forget the gradient."""
        self.grad = None
        self._sum.clear()

    def accumulate(self, grad_output: Tensor, input: Tensor) -> None:
        """Add the gradient of one micro-batch, given as factors (`qgalore.linear.GradientTap`)."""
        self._add(self._sum, grad_output.T @ input)

    def accumulate_full(self, grad: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        self._add(self._sum, grad)

    def _add(self, accumulator: GradientAccumulator, grad: Tensor) -> None:
        self._additions = 0 if accumulator.empty else self._additions + 1
        accumulator.add(grad, self._seed(_ACCUMULATION, self._additions))

    @property
    def has_gradient(self) -> bool:
        """Whether any micro-batch of this update has reached the weight."""
        return not self._sum.empty

    def complete(self, all_reduce: AllReduce | None) -> None:
        """Turn the sums of this rank into the gradient of the update, over all ranks, in `self.grad`."""
        self.grad = self._sum.take()
        if all_reduce is not None:
            self.grad = self.grad.float()
            all_reduce(self.grad)

    def _advance(self) -> int:
        if not self.state:
            self._init_state()
        self.state["step"] += 1
        return self.step

    def _init_state(self) -> None:
        self.state["step"] = torch.zeros((), dtype=torch.int64)
        adam.init_moments(self.state, self._gradient_shape(), self.group["state_bits"], self.param.device)

    def _gradient_shape(self) -> torch.Size:
        return self.shape

    def update(self) -> None:
        """One AdamW step on the weight; consumes the gradient."""
        assert self.grad is not None
        rounding = self._seed(_ROUNDING)
        step, group = self._advance(), self.group
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            self.grad = self.grad.add(self.param.float(), alpha=group["weight_decay"])
        if self.layer is not None:
            direction = adam.adam_step(self.state, self.grad, step, group["betas"], group["eps"])
            self.layer.update_(direction, None, None, group["lr"], self._decay, rounding)
        else:
            # In parts, so that no float32 copy of a whole embedding is made.
            for start, stop in adam.row_parts(self.state, self.param.shape):
                state = adam.rows_of(self.state, start, stop)
                direction = adam.adam_step(state, self.grad[start:stop], step, group["betas"], group["eps"])
                rows = self.param.data[start:stop]
                kernels.update_float_(rows, direction, None, None, group["lr"], self._decay, rounding, start)
        self.grad = None

    @property
    def _decay(self) -> float:
        group = self.group
        return 1.0 - group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0


class LowRankWeight(FullRankWeight):
    """A weight matrix whose gradient is projected onto a subspace (GaLore, Q-GaLore)."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """See `FullRankWeight`."""
        super().__init__(param, seed)
        self.similarity: Tensor | None = None
        self._test_matrices: dict[str, Tensor] = {}
        self._next_bases: dict[str, Tensor | QuantizedTensor] | None = None
        self._fit_failed = False

    def bind(self, group: dict[str, Any], state: dict[str, Tensor], index: int, place: int, count: int) -> None:
        """See `FullRankWeight`; the schedule of refreshes is rebuilt from the state."""
        super().bind(group, state, index, place, count)
        self._full = self._accumulator()
        self._sketches: dict[str, GradientAccumulator] = {}
        self.schedule = RefreshSchedule(
            base_interval=group["update_proj_gap"],
            index=place,
            count=count,
            lazy=group["subspace"] == "svd" and group["gamma_proj"] > 1,
            threshold=group["cos_threshold"],
            gamma=group["gamma_proj"],
            queue_size=group["queue_size"],
            max_interval=group["max_update_proj_gap"],
        )
        if "schedule" in state:
            s = self.schedule
            s.interval, s.next_refresh, s.refreshes, s.saved = state["schedule"].tolist()
            s.window = state["similarities"].tolist()

    def check(self) -> None:
        """Raise ValueError for a weight that is no matrix or has a side shorter than the rank."""
        super().check()
        rank, shape = self.group["rank"], tuple(self.shape)
        if len(shape) != 2:
            raise ValueError(f"parameter {self.name} of shape {shape} is not a matrix: it cannot have a rank")
        for side in self.sides:
            if rank > shape[0 if side == "left" else 1]:
                raise ValueError(f"rank={rank} is larger than the {side} side of {self.name}, of shape {shape}")

    # ---- shape and state

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are projected: ("left",), ("right",) or both; `std` takes the shorter side of the weight."""
        m, n = self.shape
        longer, shorter = ("right", "left") if m >= n else ("left", "right")
        proj_type: str = self.group["proj_type"]
        by_type = {"std": (longer,), "reverse_std": (shorter,), "left": ("left",), "right": ("right",)}
        return by_type.get(proj_type, ("left", "right"))

    def _gradient_shape(self) -> torch.Size:
        m, n = self.shape
        rank = self.group["rank"]
        return torch.Size((rank if "left" in self.sides else m, rank if "right" in self.sides else n))

    def _init_state(self) -> None:
        self.check()
        super()._init_state()
        m, n = self.shape
        self.state["failures"] = torch.zeros((), dtype=torch.int64, device=self.param.device)
        for side in self.sides:
            d = m if side == "left" else n
            start = subspace.random_basis(self.group["rank"], d, self._seed(_START, d), self.param.device)
            self._store(side, self._encode(start))
        self._save_schedule()

    def _save_schedule(self) -> None:
        s = self.schedule
        self.state["schedule"] = torch.tensor([s.interval, s.next_refresh, s.refreshes, s.saved], dtype=torch.int64)
        self.state["similarities"] = torch.tensor(s.window, dtype=torch.float64)

    # ---- bases

    def _encode(self, basis: Tensor) -> Tensor | QuantizedTensor:
        group = self.group
        if group["quant"]:
            return quantize(basis, group["quant_n_bit"], group["quant_group_size"])
        return basis.to(self._basis_dtype)

    @property
    def _basis_dtype(self) -> torch.dtype:
        return self.param.dtype if self.param.is_floating_point() else torch.float32

    def _store(self, side: str, basis: Tensor | QuantizedTensor) -> None:
        if isinstance(basis, QuantizedTensor):
            self.state[f"{side}_basis"] = basis.qdata
            self.state[f"{side}_basis_scale"] = basis.scale
            self.state[f"{side}_basis_zero_point"] = basis.zero_point
        else:
            self.state[f"{side}_basis"] = basis

    def _stored(self, side: str) -> Tensor | QuantizedTensor:
        stored, scale = self.state[f"{side}_basis"], self.state.get(f"{side}_basis_scale")
        if scale is None:
            return stored
        d = self.shape[0 if side == "left" else 1]
        bits, group_size = self.group["quant_n_bit"], self.group["quant_group_size"]
        return QuantizedTensor(stored, scale, self.state[f"{side}_basis_zero_point"], d, bits, group_size)

    def basis(self, side: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The basis (rank, d) of a side, dequantized; None where that side is not projected."""
        if side not in self.sides:
            return None
        if not self.state:
            self._init_state()
        stored = self._stored(side)
        return stored.dequantize(dtype) if isinstance(stored, QuantizedTensor) else stored.to(dtype)

    # ---- the gradient

    @property
    def _refresh_due(self) -> bool:
        return self.schedule.due(self.step)

    @property
    def _needs_full_gradient(self) -> bool:
        return self._refresh_due and self.group["subspace"] == "svd" and self.schedule.refreshes > 0

    def accumulate(self, grad_output: Tensor, input: Tensor) -> None:
        """Add the projected gradient of one micro-batch from its factors; the full one only where an SVD is due."""
        if self._needs_full_gradient:
            self._add(self._full, grad_output.T @ input)
            return
        left, right = self.basis("left", grad_output.dtype), self.basis("right", grad_output.dtype)
        self._add(self._sum, subspace.project_factors(grad_output, input, left, right))
        if self._refresh_due:
            for side in self.sides:
                test = self._test_matrix(side).to(grad_output.dtype)
                first, second = (input, grad_output) if side == "left" else (grad_output, input)
                self._add(self._sketch(side), (first @ test.T).T @ second)

    def accumulate_full(self, grad: Tensor) -> None:
        """The same from a full gradient (m, n), which is not kept."""
        if self._needs_full_gradient:
            self._add(self._full, grad)
            return
        self._add(self._sum, subspace.project(grad, self.basis("left", grad.dtype), self.basis("right", grad.dtype)))
        if self._refresh_due:
            for side in self.sides:
                test = self._test_matrix(side).to(grad.dtype)
                self._add(self._sketch(side), test @ (grad.T if side == "left" else grad))

    def _sketch(self, side: str) -> GradientAccumulator:
        return self._sketches.setdefault(side, self._accumulator())

    def _test_matrix(self, side: str) -> Tensor:
        """What the gradient is multiplied with to sketch its range: (rank, other side), float32.

        The momentum, each row scaled to unit length: an average of recent projected gradients, so the sketch is one
        step of subspace iteration on the gradients' covariance. At first, and where both sides are projected, random.
        """
        if side not in self._test_matrices:
            m, n = self.shape
            if self.schedule.refreshes == 0 or len(self.sides) == 2:
                seed, other = self._seed(_TEST_MATRIX, m if side == "left" else n), n if side == "left" else m
                test = subspace.random_matrix(self.group["rank"], other, seed, self.param.device)
            else:
                momentum = adam.read_moments(self.state)[0]
                test = momentum if side == "left" else momentum.T
            self._test_matrices[side] = test / test.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return self._test_matrices[side]

    @property
    def has_gradient(self) -> bool:
        """Whether any micro-batch of this update has reached the weight."""
        return not (self._sum.empty and self._full.empty)

    def clear(self) -> None:
        """Forget the gradient."""
        super().clear()
        self._full.clear()
        self._sketches.clear()
        self._test_matrices.clear()
        self._next_bases = None

    def complete(self, all_reduce: AllReduce | None) -> None:
        """The projected gradient of the update, float32, in `self.grad`; new bases are ready but not yet taken."""
        if self._full.empty:
            super().complete(all_reduce)
        else:
            full = self._full.take()
            if all_reduce is not None:
                all_reduce(full)
            self._next_bases = self._fit(full)
            bases = {side: self._decode(basis) for side, basis in self._next_bases.items()}
            self.grad = subspace.project(full, bases.get("left"), bases.get("right"))
        if all_reduce is not None:
            for sketch in self._sketches.values():
                value = sketch.take()
                all_reduce(value)
                sketch.add(value, 0)

    def _fit(self, full: Tensor) -> dict[str, Tensor | QuantizedTensor]:
        """The SVD bases of a full gradient; the old ones where it fails."""
        bases: dict[str, Tensor | QuantizedTensor] = {}
        self._fit_failed = False
        for side in self.sides:
            seed = self._seed(_RANGE_FINDER) if self.group["svd_method"] == "randomized" else None
            fitted = subspace.fit_svd(full, self.group["rank"], side, seed)
            if fitted is None:
                self._fit_failed = True
                bases[side] = self._stored(side)
            else:
                bases[side] = self._encode(fitted)
        return bases

    def _decode(self, basis: Tensor | QuantizedTensor) -> Tensor:
        return basis.dequantize() if isinstance(basis, QuantizedTensor) else basis.float()

    # ---- the update

    def update(self) -> None:
        """One AdamW step in the subspace, and the refresh where one is due; consumes the gradient."""
        assert self.grad is not None
        rounding, update_step = self._seed(_ROUNDING), self.step
        sketches = {side: sketch.take() for side, sketch in self._sketches.items()}
        if self._next_bases is not None:
            self._take_fitted_bases(self._next_bases, update_step)
        step, group = self._advance(), self.group
        direction = adam.adam_step(self.state, self.grad, step, group["betas"], group["eps"])
        left, right, step_size = self.basis("left"), self.basis("right"), group["lr"] * group["scale"]
        if self.layer is not None:
            self.layer.update_(direction, left, right, step_size, self._decay, rounding)
        else:
            kernels.update_float_(self.param.data, direction, left, right, step_size, self._decay, rounding)
        for side, sketch in sketches.items():
            self._refresh_from_sketch(side, sketch)
        if sketches:
            self._record(update_step)
        self.clear()

    def _take_fitted_bases(self, bases: dict[str, Tensor | QuantizedTensor], update_step: int) -> None:
        similarities = [self._change_basis(side, basis, None) for side, basis in bases.items()]
        self.similarity = torch.stack(similarities).mean()
        self.state["failures"] += self._fit_failed
        self._record(update_step)

    def _refresh_from_sketch(self, side: str, sketch: Tensor) -> None:
        old = self.basis(side)
        assert old is not None
        basis, worked = subspace.orthonormalize(sketch, old)
        self.similarity = self._change_basis(side, self._encode(basis), worked)
        self.state["failures"] += ~worked

    def _change_basis(self, side: str, encoded: Tensor | QuantizedTensor, worked: Tensor | None) -> Tensor:
        """Put a new basis into the state and rotate the moments into it if asked; returns the similarity with the old.

        Where the flag `worked` on the device says no, basis and moments stay as they are, to the bit.
        """
        new, old = self._decode(encoded), self.basis(side)
        assert old is not None
        if self.group["rotate_moments"]:
            moments = adam.read_moments(self.state)
            rotated = subspace.rotate_moments(*moments, new, old, side)
            self._write_where(worked, lambda: adam.write_moments(self.state, *rotated))
        self._write_where(worked, lambda: self._store(side, encoded))
        return subspace.similarity(new, old)

    def _write_where(self, worked: Tensor | None, write: Callable[[], None]) -> None:
        """Let `write` change the state, and take the change back on the device where `worked` is false."""
        if worked is None:
            write()
            return
        before = {key: value.clone() for key, value in self.state.items() if value.device == worked.device}
        write()
        for key, value in before.items():
            self.state[key] = torch.where(worked, self.state[key], value)

    def _record(self, update_step: int) -> None:
        assert self.similarity is not None
        # Only the lazy rule needs the number on the host, and only an SVD, which waits for the device anyway, is lazy.
        known = float(self.similarity) if self.schedule.lazy and self.schedule.refreshes > 0 else None
        self.schedule.record(update_step, None if self._fit_failed else known)
        self._save_schedule()
