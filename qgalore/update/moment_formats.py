"""How the moments of one weight are stored: each as one tensor, a momentum in parts, or one that sums gradients.

A weight asks its format to begin, to be checked and to be read for a step, and does not know which it has.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.config import SubspaceConfig
from qgalore.update import moments, momentum_sum
from qgalore.update.directions import Direction, Step
from qgalore.update.momentum_in_parts import PartsFormat, PartsStep, in_parts
from qgalore.update.momentum_sum import SummedStep


class Given(NamedTuple):
    """What a step has beside gradient and moments; the fields of `qgalore.kernels.AdamStep` of these names."""

    row: Tensor
    betas: tuple[float, float]
    eps: float
    factor: Tensor | None
    dtype: torch.dtype


class MomentFormat(Protocol):
    """How moments are stored in the state of a weight."""

    @property
    def names(self) -> tuple[str, ...]:
        """Moments that are one tensor of this name, with more beside it where it is quantized."""

    def init_state(self, state: dict[str, Tensor], shape: torch.Size, seed: int, device: torch.device) -> None:
        """Put moments of zero of a gradient of this shape into `state`."""

    def misfit(self, state: dict[str, Tensor]) -> str:
        """What a state has in the place of these moments, in words that follow its name; empty where it has these."""

    def step(self, grad: Tensor | None, state: dict[str, Tensor], given: Given) -> Step:
        """The arguments of `Direction.advance`; grad: None where the moments have it. Nothing is changed yet."""


class _Whole(NamedTuple):
    """Each moment as one tensor (`qgalore.update.moments`)."""

    names: tuple[str, ...]
    bits: int

    def init_state(self, state: dict[str, Tensor], shape: torch.Size, seed: int, device: torch.device) -> None:
        moments.init_moments(state, shape, self.bits, device, self.names)

    def misfit(self, state: dict[str, Tensor]) -> str:
        if momentum_sum.only_fits(state):
            return (
                "has a momentum to which gradients were added, and its param group no sum_in_momentum: it was saved "
                "with other param groups"
            )
        if in_parts(state):
            return (
                "has a momentum in parts, and its param group no momentum_rank: it was saved for another model or "
                "other param groups"
            )
        return ""

    def step(self, grad: Tensor | None, state: dict[str, Tensor], given: Given) -> Step:
        assert grad is not None
        read: list[Any] = [state.get(key) for name in moments.MOMENTS for key in (name, f"{name}_absmax")]
        if moments.ROW_MOMENT in state:
            read[2] = state[moments.ROW_MOMENT]
        return kernels.AdamStep(grad, *read, *given)  # type: ignore[call-arg]


class _Summed(NamedTuple):
    """A momentum that gradients are added to (`qgalore.update.momentum_sum`)."""

    names: tuple[str, ...]
    bits: int

    def init_state(self, state: dict[str, Tensor], shape: torch.Size, seed: int, device: torch.device) -> None:
        momentum_sum.init_state(state, shape, self.bits, device)

    def misfit(self, state: dict[str, Tensor]) -> str:
        if momentum_sum.fits(state):
            return ""
        return (
            "has a momentum that gradients cannot be added to: it was saved with other param groups, without "
            "sum_in_momentum"
        )

    def step(self, grad: Tensor | None, state: dict[str, Tensor], given: Given) -> Step:
        return SummedStep(state, state.get(moments.ROW_MOMENT), given.row, given.betas, given.eps)


class _InParts(NamedTuple):
    """A momentum in factors and a rest (`qgalore.update.momentum_in_parts`)."""

    parts: PartsFormat
    names: tuple[str, ...] = ()

    def init_state(self, state: dict[str, Tensor], shape: torch.Size, seed: int, device: torch.device) -> None:
        self.parts.init_state(state, seed, device)

    def misfit(self, state: dict[str, Tensor]) -> str:
        if self.parts.fits(state):
            return ""
        return (
            f"does not have the momentum of {self.parts.shape} in factors of rank {self.parts.rank} and a rest in "
            f"{self.parts.rest_bits} bits: it was saved for another model or other param groups"
        )

    def step(self, grad: Tensor | None, state: dict[str, Tensor], given: Given) -> Step:
        assert grad is not None
        return PartsStep(grad, self.parts, state, state.get(moments.ROW_MOMENT), *given)


def moment_format(config: SubspaceConfig | None, direction: Direction, shape: torch.Size, bits: int) -> MomentFormat:
    """How moments of `direction` of a weight of this shape are stored; bits: 8 or 32; config: None for full rank."""
    if config is not None and config.sum_in_momentum:
        return _Summed(direction.moments, bits)
    rank = config.momentum_dimensions(shape) if config is not None and len(shape) == 2 else 0
    if config is None or not rank or shape.numel() < moments.MIN_8BIT_NUMEL:
        return _Whole(direction.moments, bits)
    return _InParts(PartsFormat((shape[0], shape[1]), rank, config.momentum_rest_bits))
