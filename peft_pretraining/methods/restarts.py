"""ReLoRA: adapters are merged into the matrices and begin anew every few updates (Lialin et al., arXiv 2307.05695).

A restart adds (alpha / rank) B A to the frozen matrix, draws A anew, sets B to zero, and keeps of the adapter's
optimizer states the largest values alone (the paper sets 99 % to zero). The learning rate then grows from 0 again
(`optim.lr_schedule.Restarts`). The sum is made in float32. Matrices of 16 bits are rounded stochastically, which keeps
what is less than the distance to the next bfloat16 number on average.

The paper trains the first part of a run at full rank: here that is a run of its own with `--method full`, and
`--init_from` it. A restart depends on the number of updates alone and is made before the checkpoint after that update
is written, so that a resumed run has it, and each, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.methods.adapters import Adapter, adapters_of, first_factors
from qgalore import kernels
from qgalore.seeding import mix_seed
from qgalore.update.moments import read_moment, write_moment


class HasStates(Protocol):
    """An optimizer."""

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """What it keeps of each parameter."""


class AdapterRestarts:
    """The restarts of a run; none where its method is another."""

    def __init__(self, args: RunArgs, model: nn.Module, optimizer: HasStates) -> None:
        """optimizer: of the model."""
        self._args, self._optimizer = args, optimizer
        relora = args.method.method == "relora"
        self._adapters = list(adapters_of(model)) if relora else []

    @torch.no_grad()
    def after_update(self, update_step: int) -> bool:
        """Make the restart that is due after so many updates, if one is; returns whether it was."""
        every, schedule = self._args.method.relora_every, self._args.schedule
        # After the last update nothing would train the new adapter, but where the run may yet be made longer.
        ends = update_step >= schedule.num_training_steps and schedule.scheduler != "constant"
        if not self._adapters or update_step % every or ends:
            return False
        seed, states = self._args.runtime.seed, self._optimizer.state
        for index, adapter in enumerate(self._adapters):
            merge_(adapter, mix_seed(seed, update_step, index))
            start = first_factors(adapter, seed, restart=update_step // every)
            for factor, value in zip(adapter.factors, start, strict=True):
                factor.copy_(value)
                prune_(states.get(factor, {}), self._args.method.relora_prune)
        return True


def merge_(adapter: Adapter, seed: int) -> None:
    """Add an adapter to the float matrix beside it, in place; seed: of the rounding to 16 bits."""
    first, second = adapter.factors
    weight = adapter.base.weight.data
    # Subtracted minus `scaling` times.
    row = kernels.StepScalars(seed, -adapter.scaling, 1.0).row(weight.device)
    kernels.update_float_([kernels.FloatUpdate(weight, second.data, None, first.data, row)])


def prune_(state: dict[str, Any], share: float) -> None:
    """Set this share of the values of an optimizer's state of one factor to zero, in place.

    Of Adam's moments those whose first moment is of the least magnitude: pruned one by one, a first moment could stay
    without its second, and the next step be thousands of times too long. Others, such as Adafactor's, by themselves.
    """
    values: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and not name.endswith("_absmax"):
            if not (value.is_floating_point() or f"{name}_absmax" in state):
                raise UserError(
                    f"--method relora cannot prune {name}, which this optimizer keeps as {value.dtype} codes."
                )
            values[name] = read_moment(state, name)
    kept = largest(values["exp_avg"], share) if "exp_avg" in values else None
    for name, value in values.items():
        own = kept if kept is not None and kept.shape == value.shape else largest(value, share)
        write_moment(state, name, value * own)


def largest(value: Tensor, share: float) -> Tensor:
    """Where a tensor has the values that are left without this share, those of the least magnitude."""
    count, size = round((1 - share) * value.numel()), value.abs()
    if not count:
        return torch.zeros_like(value, dtype=torch.bool)
    return size >= size.flatten().topk(count).values[-1]
