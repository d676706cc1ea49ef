"""GaLore with Adafactor instead of Adam: a second moment of rows and columns, in the subspace.

Adafactor (Shazeer and Stern, arXiv 1804.04235) keeps of the squared gradient G (m, n) a moving average of its rows' and
of its columns' means, R (m) and C (n), and divides G by the square root of R Cᵀ / mean(R). What GaLore (arXiv
2403.03507) projects to (rank, n) takes rank + n values of state then, instead of Adam's 2 rank n.

The arguments, their defaults and the order of the operations are those of `transformers.optimization.Adafactor`, from
which galore-torch's optimizer of this name comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from qgalore import kernels
from qgalore.config import FULL, SubspaceConfig
from qgalore.optimizer import LowRankAdamW
from qgalore.optimizer.param_groups import check_common, check_seed, is_finite
from qgalore.seeding import ROUNDING, step_of
from qgalore.subspace import fit
from qgalore.update.directions import Direction
from qgalore.update.step_table import StepTable
from qgalore.update.weight import States, Weight

_WHOLE = SubspaceConfig(rank=FULL, galore_scale=1.0)
"""Of a parameter without a rank. Adafactor needs the whole gradient, not some of its rows at a time."""


class _Step(NamedTuple):
    """What the direction of one weight is made of."""

    grad: Tensor
    state: dict[str, Tensor]
    row: Tensor
    group: dict[str, Any]
    factor: Tensor | None
    dtype: torch.dtype
    size: Tensor | None
    """Of the weight, (), that the rate is relative to; None where it is not."""


def _direction(step: _Step, skip: Tensor | None) -> Tensor:
    """The update of the gradient factor * grad; moves the moments, unless the flag `skip` is true."""
    grad, group, new = kernels.scaled(step.grad, step.factor), step.group, dict[str, Tensor]()
    numbers = kernels.StepNumbers.of(step.row)
    rate, beta2 = numbers.inverse_correction1, numbers.inverse_correction2  # whose places these take
    if step.size is not None:
        share = group["weight_decay"] / group.get("galore_scale", 1.0)
        decay = 1 - numbers.step_size * rate * step.size * share
        numbers.decay.copy_(decay)
        numbers.decay_of_growing.copy_(decay)
        rate = rate * step.size
    square = grad.square().add_(group["eps"][0])
    means = {"exp_avg_sq": square}
    if grad.dim() >= 2:
        means = {"exp_avg_sq_row": square.mean(dim=-1), "exp_avg_sq_col": square.mean(dim=-2)}
    for name, mean in means.items():
        new[name] = step.state[name] * beta2 + mean * (1 - beta2)
    if grad.dim() >= 2:
        rows, columns = new["exp_avg_sq_row"], new["exp_avg_sq_col"]
        update = grad * (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    else:
        update = grad * new["exp_avg_sq"].rsqrt()
    size = update.square().mean().sqrt()
    update *= rate / (size / group["clip_threshold"]).clamp(min=1.0)
    if group["beta1"] is not None:
        update = new["exp_avg"] = step.state["exp_avg"] * group["beta1"] + update * (1 - group["beta1"])
    for name, value in new.items():
        _write(step.state[name], value, None if skip is None else ~skip)
    return update.to(step.dtype)


def _write(moment: Tensor, value: Tensor, wanted: Tensor | None) -> None:
    moment.copy_(value if wanted is None else torch.where(wanted, value, moment))


def _directions(steps: Sequence[Any], skip: Tensor | None) -> list[Tensor]:
    return [_direction(step, skip) for step in steps]


_ADAFACTOR = Direction(_directions, (), batch_values=1 << 20)


class AdafactorWeight(Weight):
    """One parameter that Adafactor updates.

    Its step row has the learning rate and the decay rate of the second moment where Adam's has bias corrections.
    """

    def bind(
        self, group: dict[str, Any], states: States, table: StepTable, index: int, position: int, count: int
    ) -> None:
        """See `Weight`."""
        super().bind(group, states, table, index, position, count)
        self.config = self.config or _WHOLE

    def _direction(self) -> Direction:
        return _ADAFACTOR

    def check(self) -> None:
        """See `Weight`."""
        config = self.config
        self.config = None if config is _WHOLE else config
        try:
            super().check()
        finally:
            self.config = config

    def _check_moments(self) -> None:
        """See `Weight`."""
        if {name: moment.shape for name, moment in self._moments("meta").items()} != {
            name: moment.shape for name, moment in self.state.items() if name.startswith("exp_avg")
        }:
            shape = tuple(self.subspace.gradient_shape)
            raise ValueError(
                f"the state of {self.name} is not that of a gradient of shape {shape} under Adafactor with "
                f"beta1={self.param_group['beta1']}: it was saved for another model or other param groups"
            )

    def _moments(self, device: torch.device | str) -> dict[str, Tensor]:
        """Moments of zero."""
        shape = self.subspace.gradient_shape
        shapes = {"exp_avg_sq": shape}
        if len(shape) >= 2:
            shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        if self.param_group.get("beta1") is not None:
            shapes["exp_avg"] = shape
        return {name: torch.zeros(each, device=device) for name, each in shapes.items()}

    def _init_moments(self) -> None:
        """See `Weight`."""
        self.state.update(self._moments(self.param.device))

    def _add(self, dtype: torch.dtype, parts: Iterable[tuple[str, Tensor]]) -> None:
        super()._add(torch.float32 if self.config is _WHOLE else dtype, parts)

    def update_scalars(self) -> kernels.StepScalars:
        """What the step row of the next update must contain; with scale_parameter its rate and decay are scaled later.

        `_direction` does so, on the device.
        """
        group, step = self.param_group, self.step + 1
        rate = self._rate_of_step(step)
        outside, inside = (rate, 1.0) if group["beta1"] is None else (1.0, rate)  # momentum is one of scaled updates
        decay, beta2 = 1.0 - rate * group["weight_decay"], 1.0 - step ** group["decay_rate"]
        return kernels.StepScalars(
            self._seeds(ROUNDING), outside * float(group.get("galore_scale", 1.0)), decay, inside, beta2
        )

    def rate(self, step: int) -> float:
        """The learning rate of an update: given or by the number of the step, and relative to the weight if asked.

        Then it waits for the weight's device.
        """
        size = self._size()
        return self._rate_of_step(step) * (1.0 if size is None else float(size))

    def _rate_of_step(self, step: int) -> float:
        group = self.param_group
        if group["relative_step"]:
            return min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        return float(group["lr"])

    def _size(self) -> Tensor | None:
        """The root mean square of the weight, (), that scale_parameter multiplies the rate by; None without it."""
        if not self.param_group["scale_parameter"]:
            return None
        weight = self.param if self.layer is None else self.layer.dequantized_weight(torch.float32)
        return weight.detach().float().square().mean().sqrt().clamp(min=self.param_group["eps"][1])

    def prepare_step(  # type: ignore[override]
        self, grad: Tensor, factor: Tensor | None, state: dict[str, Tensor] | None = None
    ) -> _Step:
        """See `Weight`."""
        state = self.state if state is None else state
        return _Step(grad, state, self.step_row, self.param_group, factor, self.subspace.dtype, self._size())

    def rotate_moments(self, change: Tensor, side: str, wanted: Tensor | None) -> None:
        """See `Weight`. Of the second moment the side of the basis alone changes."""
        rotated = {}
        if side == "left":
            rotated["exp_avg_sq_row"] = fit.rotate_moment(self.state["exp_avg_sq_row"][:, None], change, side, 2)[:, 0]
        else:
            rotated["exp_avg_sq_col"] = fit.rotate_moment(self.state["exp_avg_sq_col"][None], change, side, 2)[0]
        if "exp_avg" in self.state:
            rotated["exp_avg"] = fit.rotate_moment(self.state["exp_avg"], change, side, 1)
        for name, value in rotated.items():
            _write(self.state[name], value, wanted)


class GaLoreAdafactor(LowRankAdamW):
    """GaLore with Adafactor's states, as galore-torch has it; a group without a rank is plain Adafactor."""

    weight_type = AdafactorWeight

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        accumulator_dtype: str = "float32",
        norm_growth: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Take the arguments of `transformers.optimization.Adafactor`, then those of `LowRankAdamW`.

        lr is for relative_step=False alone; else the rate is 1 / sqrt(step), at most 1e-2, or with warmup_init 1e-6 *
        step. eps: added to the squared gradient; the least size that scale_parameter takes a weight for, which
        multiplies the rate by the weight's root mean square. clip_threshold: largest root mean square of an update.
        decay_rate: the second moment's beta is 1 - step^decay_rate. beta1: of the momentum; None for none.

        Raises ValueError for a value that makes no sense, here or in a param group.
        """
        check_seed(seed)
        self._seed = seed
        self._reset()
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "accumulator_dtype": accumulator_dtype,
            "norm_growth": norm_growth,
            "state_bits": self.state_bits,
        }
        self.check_rates(defaults)
        Optimizer.__init__(self, params, defaults)

    def _get_lr(self, group: dict[str, Any], state: dict[str, Tensor]) -> float:
        """The learning rate of a group's first parameter, for `transformers.optimization.AdafactorSchedule`."""
        return self._weights[group["params"][0]].rate(max(1, step_of(state)))  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    def check_rates(values: Mapping[str, Any]) -> None:
        """See `LowRankAdamW`."""
        lr, eps, beta1 = values["lr"], values["eps"], values["beta1"]
        if values["relative_step"] and lr is not None:
            raise ValueError(f"lr={lr!r} with relative_step=True, which finds the rate itself: set relative_step=False")
        if not values["relative_step"] and not (is_finite(lr) and lr >= 0):
            raise ValueError(f"lr={lr!r} with relative_step=False must be a finite number, at least 0")
        if values["warmup_init"] and not values["relative_step"]:
            raise ValueError("warmup_init=True is about the rate of relative_step=True: set that, or leave it out")
        pair = isinstance(eps, tuple | list) and len(eps) == 2
        if not pair or not all(is_finite(each) and each >= 0 for each in eps):
            raise ValueError(f"eps={eps!r} must be two finite numbers, each at least 0, such as (1e-30, 1e-3)")
        if beta1 is not None and not (is_finite(beta1) and 0 <= beta1 < 1):
            raise ValueError(f"beta1={beta1!r} must be None or a number, at least 0 and less than 1")
        check_common(values)
        if not (is_finite(values["clip_threshold"]) and values["clip_threshold"] > 0):
            raise ValueError(f"clip_threshold={values['clip_threshold']!r} must be a finite number, more than 0")
        if not (is_finite(values["decay_rate"]) and values["decay_rate"] < 0):
            raise ValueError(f"decay_rate={values['decay_rate']!r} must be a finite number, less than 0")
        if values.get("direction", "adam") != "adam":
            raise ValueError(
                f"direction={values['direction']!r} has no second moment: Adafactor has its own: take "
                "direction='adam', in optimizer_for recipe='paper'"
            )
        if values.get("subspace") == "streaming" and beta1 is None:
            raise ValueError("subspace='streaming' follows the momentum, and beta1=None keeps none: give beta1, or svd")
