"""A parameter of an optimizer, with what its updates are made of; `qgalore.update.step` makes them.

While backward passes run it is the gradient sink of its layer: `accumulate` or `accumulate_full` once a micro-batch.
With the last one its gradient is finalized, which sums it over the ranks, and the update may begin: the first to touch
moments, bases or the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.config import subspace_of
from qgalore.layer.linear import LowRankLinear
from qgalore.seeding import ACCUMULATION, ROUNDING, START, Seeds, step_of
from qgalore.subspace import fit
from qgalore.subspace.methods import METHODS, Identity
from qgalore.update import moments
from qgalore.update.directions import ADAM_BY_ROW, DIRECTIONS, Direction, Step, direction_of
from qgalore.update.gradient import WeightGradient
from qgalore.update.gradient_sum import Gradient, dense
from qgalore.update.moment_formats import Given, moment_format
from qgalore.update.momentum_sum import SummedGradient
from qgalore.update.step_table import StepTable, SumRows

HOST_STATE = ("step", "schedule", "similarities")
"""What of a weight's state lives on the CPU."""

States = MutableMapping[Tensor, dict[str, Tensor]]
"""`torch.optim.Optimizer.state`: a weight without state has no entry."""

FromOwner = Callable[[Tensor, int], Tensor]
"""from_owner(value, owner) -> what that rank has, for which `value` has room here."""


def is_of_subspace(key: str) -> bool:
    """Whether an entry of a weight's state is needed to project gradients, and so by every rank."""
    return key in (*HOST_STATE, "failures") or "_basis" in key


class Weight:
    """One parameter: its hyperparameters and state, its gradient, its subspace and how steps in it are made."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """seed: that of the run, from which with the step and the index all rounding is seeded."""
        self.param, self._seed = param, seed
        self.layer: LowRankLinear | None = None
        self.name = ""
        self.home: torch.device | None = None
        """Where the weight is when it is used, if it waits elsewhere (`qgalore.offload`); None for where it is now."""
        self.owner, self.owned = 0, True
        """The rank that keeps the moments and makes the updates, and whether it is this one."""
        self.rows: tuple[int, int] | None = None
        """Of a weight that is dealt by rows those start:stop whose moments are here; None for all."""
        self.kept_rows: Tensor | None = None
        """Of these the values, where the parameter has memory in passes alone (`qgalore.sharding.tables`)."""
        self._from_owner: FromOwner | None = None
        self._sums_for_owner = False

    def bind(
        self, group: dict[str, Any], states: States, table: StepTable, index: int, position: int, count: int
    ) -> None:
        """Take up hyperparameters and state: `index` numbers the weights, `position` the low-rank ones among `count`.

        states: those of all weights, into which that of this one goes as soon as it has any; table: of all weights.
        """
        self.param_group, self.index, self._states, self._table = group, index, states, table
        self.config = subspace_of(group) if "rank" in group else None
        self.direction = self._direction()
        self.state, self.name = states.get(self.param, {}), self.name or str(index)
        self._seeds, self._position, self._count = Seeds(self._seed, index, self.state), position, count
        self._compose()

    def _direction(self) -> Direction:
        if self.config is not None:
            return direction_of(self.config.direction, self.config.newton_schulz)
        by_row = self.param_group.get("second_moment") == "row" and self.param.dim() == 2
        return ADAM_BY_ROW if by_row else DIRECTIONS["adam"]

    def attach_to(self, layer: LowRankLinear, name: str) -> None:
        """Belong to a layer: of a quantized weight it alone knows the shape."""
        before, self.layer, self.name = self.shape, layer, name
        if self.shape != before:
            self._compose()

    def give_to(self, owner: int, owned: bool, from_owner: FromOwner, rows: tuple[int, int] | None = None) -> None:
        """Let one of several ranks keep the moments; `owned`: this one, or of some rows. Others are dropped."""
        self.owner, self.owned, self._from_owner, self.rows = owner, owned, from_owner, rows
        for key, value in list(self.state.items()):
            part = self.part_of_state(key, value)
            if part is None:
                del self.state[key]
            elif part is not value:
                self.state[key] = part.clone()
        self.gradient.first_row = self.first_row

    def take_back(self) -> None:
        """Own the whole weight again: its state, of which this rank may have had a part, has to be loaded after it."""
        self.owner, self.owned, self._from_owner, self.rows, self._sums_for_owner = 0, True, None, None, False
        self.kept_rows = None
        self._compose()

    def sum_for_owner(self) -> None:
        """Keep no sum over micro-batches on this rank, but for that of the owner."""
        self._sums_for_owner = True
        self.gradient.sum_for_owner()

    def part_of_state(self, key: str, value: Tensor) -> Tensor | None:
        """What this rank keeps of an entry of the whole state: all, a view of some rows, or None for nothing."""
        if not self.owned and not is_of_subspace(key):
            return None
        if self.rows is None or not value.dim():
            return value
        start, stop = self.rows
        if key.endswith("_absmax"):
            columns = self.shape[1:].numel()
            start, stop = start * columns // moments.BLOCK_SIZE, -(-stop * columns // moments.BLOCK_SIZE)
        return value[start:stop]

    @property
    def moment_shape(self) -> torch.Size:
        """The shape of each moment on this rank."""
        shape = self.subspace.gradient_shape
        return shape if self.rows is None else torch.Size((self.rows[1] - self.rows[0], *shape[1:]))

    @property
    def first_row(self) -> int:
        """The row of the weight to which the first one of the moments belongs."""
        return 0 if self.rows is None else self.rows[0]

    def _compose(self) -> None:
        subspace, shape, config = Identity(self.shape), self.shape, self.config
        if config is not None and len(shape) == 2 and config.sides(shape):
            like = self.param.new_empty(0, device=self.device)
            rest = (like, shape, self.state, self._seeds, self._position, self._count)
            subspace = METHODS[config.subspace](config, *rest)
        self.subspace = subspace
        self.moments = moment_format(config, self.direction, shape, self.param_group["state_bits"])
        name: Any = self.param_group["accumulator_dtype"]
        dtype: torch.dtype = getattr(torch, name, name)
        rows = SumRows(self._table, self._seeds, self.device)
        self.gradient = (
            SummedGradient(subspace, rows) if self.sums_in_momentum else WeightGradient(subspace, dtype, rows)
        )
        self.gradient.first_row = self.first_row
        if self._sums_for_owner:
            self.gradient.sum_for_owner()

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, whatever its storage."""
        if self.layer is None:
            return self.param.shape
        return torch.Size((self.layer.out_features, self.layer.in_features))

    @property
    def device(self) -> torch.device:
        """Where the weight is updated."""
        return self.home or self.param.device

    @property
    def sums_in_momentum(self) -> bool:
        """Whether each micro-batch's gradient is added to the momentum (`qgalore.update.momentum_sum`)."""
        return self.config is not None and self.config.sum_in_momentum

    @property
    def step(self) -> int:
        """Updates made so far."""
        return step_of(self.state)

    def check(self) -> None:
        """Raise ValueError where the weight cannot be trained as its group says."""
        if self.layer is None and not self.param.is_floating_point():
            raise ValueError(
                f"parameter {self.name} is quantized and no LowRankLinear of the model holds it: "
                "call attach(model) with the model whose parameters the optimizer was given"
            )
        if self.param.dtype == torch.float64:
            raise ValueError(f"parameter {self.name} is float64: updates are made in float32; convert the model to it")
        # One that another rank owns may have no memory, and then no strides.
        if self.layer is None and not self.param.is_contiguous() and any(self.param.stride()):
            raise ValueError(f"parameter {self.name} is not contiguous in memory: give the optimizer one that is")
        if "exp_avg" in self.state and self.state["exp_avg"].shape != self.moment_shape:
            shapes = tuple(self.state["exp_avg"].shape), tuple(self.moment_shape)
            raise ValueError(
                f"the state of {self.name} is that of a gradient of shape {shapes[0]}, not {shapes[1]}: it was saved "
                "for another model or other param groups"
            )
        if (
            self.layer is not None
            and self.param_group["weight_decay"]
            and not self.param_group["decoupled_weight_decay"]
        ):
            raise ValueError(
                f"weight_decay of {self.name}, the weight of a LowRankLinear, is decoupled (AdamW): leave "
                "decoupled_weight_decay=False out or set weight_decay=0"
            )
        if self.config is not None:
            self.config.check_shape(tuple(self.shape), self.name)
            self._check_feedback(self.config.rounding_feedback)
        if self.state and self.owned:
            self._check_moments()

    def _check_moments(self) -> None:
        """Raise ValueError where the state's moments are not those that the weight's group asks for, as these store
        them."""
        problem = self.moments.misfit(self.state)
        wanted = {*self.moments.names, *([moments.ROW_MOMENT] if self.direction.by_row else [])}
        found = {*(*moments.MOMENTS, moments.ROW_MOMENT)} & self.state.keys()
        if not problem and found != wanted:
            problem = (
                f"has the moments {', '.join(sorted(found))}, and an update needs {', '.join(sorted(wanted))}: it was "
                "saved with other param groups, of another direction or second moment"
            )
        if problem:
            raise ValueError(f"the state of {self.name} {problem}")

    def _check_feedback(self, share: float) -> None:
        """Raise ValueError where no rounding error can be fed into the momentum, and is to be."""
        if not share:
            return
        # Integers that are attached to no layer yet are codes.
        floats = self.param.is_floating_point() if self.layer is None else self.layer.format.bits is None
        if floats:
            raise ValueError(
                f"rounding_feedback={share!r} is about quantized weights, and {self.name} is float: leave it out, or "
                "convert the layer to a WeightFormat with bits"
            )
        if self.param_group.get("betas", (0.9,))[0] <= 0:
            raise ValueError(f"rounding_feedback={share!r} needs a momentum, and betas[0] is 0: give 0.9 or the like")

    def init_state(self) -> None:
        """Put the state of a weight without updates into the optimizer's, unless it has one."""
        if self.state:
            return
        self.check()
        self._states[self.param] = self.state
        self.state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
        if self.owned:
            self._init_moments()
        self.subspace.init_state()
        if self.owned and self.param_group["norm_growth"]:
            self.state["limited_norm"] = torch.zeros((), device=self.device)

    def _init_moments(self) -> None:
        """Put moments of zero into the state."""
        shape, device = self.moment_shape, self.device
        self.moments.init_state(self.state, shape, self._seeds(START), device)
        if self.direction.by_row:
            self.state[moments.ROW_MOMENT] = torch.zeros(shape[0], device=device)

    # ---- the gradient sink of a layer (`qgalore.layer.gradient_sink`)

    @property
    def out_features(self) -> int:
        """Rows of the gradient."""
        return self.shape[0]

    def forms_gradient(self, input: Tensor) -> bool:
        """Whether the full gradient is formed, and not the projected one from its factors."""
        return self.subspace.forms_gradient(input.shape[0])

    def input_basis(self, input: Tensor) -> Tensor | None:
        """The basis (rank, in_features) that the input is multiplied with, where that is worth a grouped product."""
        if self.forms_gradient(input):
            return None
        self.init_state()
        return self.subspace.input_basis(input.dtype)

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        """Add the gradient of one micro-batch, given as factors."""
        if projected is None and self.forms_gradient(input):
            self.accumulate_full(fit.gradient(grad_output, input, (self.shape[0], self.shape[1])))
        else:
            self._add(grad_output.dtype, self.subspace.project_factors(grad_output, input, projected, self._momentum))

    def accumulate_full(self, grad: Tensor) -> None:
        """Add the gradient of one micro-batch, of the weight's shape."""
        if grad.layout != torch.strided:
            raise ValueError(f"parameter {self.name} has a sparse gradient: use a layer with sparse=False")
        if self.has_residual:
            self.gradient.keep_full(grad)
        self._add(grad.dtype, self.subspace.project(grad, self._momentum))

    def _add(self, dtype: torch.dtype, parts: Iterable[tuple[str, Tensor]]) -> None:
        if self.config is not None:
            self.init_state()
            self.subspace.dtype = dtype
        for name, part in parts:
            self.gradient.add(name, part)

    @property
    def has_residual(self) -> bool:
        """Whether what the projection leaves out of the last gradient is part of the update."""
        return self.config is not None and self.config.residual != "none"

    @property
    def values_to_sum(self) -> int:
        """Values of `gradient.parts_to_sum` in an update without a refresh."""
        return self.subspace.gradient_shape.numel() + (self.shape.numel() if self.has_residual else 0)

    # ---- the update (`qgalore.update.step`)

    def update_scalars(self) -> kernels.StepScalars:
        """What the step row of the next update must contain."""
        group, step = self.param_group, self.step + 1
        decay = 1.0 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
        first, second = (1.0 / (1.0 - beta**step) for beta in group["betas"])
        step_size = float(group["lr"] * group.get("galore_scale", 1))
        growing = 1.0 if group.get("cautious_decay") else None
        return kernels.StepScalars(self._seeds(ROUNDING), step_size, decay, first, second, growing)

    def sum_row(self, scalars: kernels.StepScalars) -> Tensor:
        """The step row of what is added to the sum of gradients next, with these scalars."""
        self._table.write_sum(self.index, scalars, self.device)
        return self._table.sum_rows[self.index]

    def addition_scalars(self, number: int, share: float) -> kernels.StepScalars:
        """Scalars that add micro-batch `number` of an update to the momentum.

        share: 1 / ranks where each rank has a momentum, so that those of all ranks add up to the whole one.
        """
        beta = self.param_group["betas"][0]
        return kernels.StepScalars(self._seeds(ACCUMULATION, number), beta - 1.0, 1.0 if number else beta * share)

    def replacing_scalars(self) -> kernels.StepScalars:
        """Scalars that overwrite the momentum: a decay of 0, and a step of -1 times the new value."""
        return kernels.StepScalars(self._seeds(ACCUMULATION, -1), -1.0, 0.0)

    @property
    def step_row(self) -> Tensor:
        """The step row of the update that is being made."""
        return self._table.update_rows[self.index]

    def count_update(self) -> None:
        """Count an update that is made or skipped, after its step row was written and before its moments move."""
        self.init_state()
        self.state["step"] += 1

    def count_replayed(self) -> None:
        """Keep the host's account of an update that a CUDA graph has made."""
        self.state["step"] += 1

    def take_gradient(self, stored: bool) -> Gradient | None:
        """The final gradient, as it is stored or in a float dtype, which is used up; None where the momentum has it."""
        if self.sums_in_momentum:
            return None
        return self.gradient.final.take_stored() if stored else self.gradient.final.take()

    def make_step(self, grad: Gradient | None, factor: Tensor | None) -> Step:
        """`prepare_step` of a gradient in any form."""
        return self.prepare_step(None if grad is None else dense(grad), factor)

    def prepare_step(self, grad: Tensor | None, factor: Tensor | None, state: dict[str, Tensor] | None = None) -> Step:
        """The arguments of `Direction.advance` for this weight, of which nothing is changed yet.

        grad in a float dtype, which is to be multiplied by `factor`; None where the momentum has it. state: that of the
        weight, or views of some rows.
        """
        group = self.param_group
        given = Given(self.step_row, group["betas"], group["eps"], factor, self.subspace.dtype)
        return self.moments.step(grad, self.state if state is None else state, given)

    def rotate_moments(self, change: Tensor, side: str, wanted: Tensor | None) -> None:
        """Let the moments be those in another basis, by `change` (rank, rank), unless the flag wanted () is false."""
        # One after the other: the second is read when the first has been written.
        for power, name in enumerate(self.direction.moments, start=1):
            rotated = fit.rotate_moment(moments.read_moment(self.state, name, change.dtype), change, side, power)
            moments.write_moment(self.state, name, rotated, None if wanted is None else ~wanted)
            del rotated

    def _momentum(self) -> Tensor:
        if self._from_owner is None:
            return moments.read_moment(self.state, "exp_avg")
        if self.owned:
            value = moments.read_moment(self.state, "exp_avg")
        else:
            value = torch.empty(self.subspace.gradient_shape, device=self.device)
        return self._from_owner(value, self.owner)

    def clear(self) -> None:
        """Forget the gradient, and what was cached or found for the update that goes on."""
        self.gradient.clear()
        self.subspace.clear()
