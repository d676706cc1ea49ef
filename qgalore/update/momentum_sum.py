"""A momentum to which the gradients of an update are added one micro-batch after the other: nothing else sums them.

Without Nesterov a momentum is linear in the gradients g_1, ..., g_n of an update's micro-batches, so that

    M <- beta M + (1 - beta) g_1 with the first one,    M <- M + (1 - beta) g_i with each later one

is the momentum of their sum. The direction is then made of M itself, and not, as elsewhere here, of Nesterov's
momentum beta M + (1 - beta) g, for which g would have to be kept. An Adam that integrates its micro-batches (AdamA,
arXiv 2305.19982) is an approximation, because of its second moment; this is exact.

In 8 bits M is rounded with every micro-batch. So it is stored as sums of gradients in INT8 are
(`qgalore.update.gradient_sum`) and not as other 8-bit moments: in groups along rows with a scale and a zero point,
whose stochastic rounding is unbiased. The step rows of sums give decay, step size and seed.

Over W ranks each rank decays by beta / W and adds its own gradients. The sum over ranks, made with the last
micro-batch, is the momentum, which all store. Where weights are dealt to ranks (`qgalore.sharding`) only the owner has
a momentum, and adds to it the gradient of each micro-batch, summed over the ranks: as one rank would of larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.quantization import QuantizedTensor, row_bytes
from qgalore.subspace.methods import GRADIENT, Identity
from qgalore.update.gradient import WeightGradient
from qgalore.update.gradient_sum import GROUP_SIZE
from qgalore.update.moments import MIN_8BIT_NUMEL
from qgalore.update.step_table import SumRows

_CODES, _SCALE, _ZERO_POINT = "exp_avg", "exp_avg_scale", "exp_avg_zero_point"


class Addition(NamedTuple):
    """What is added to one momentum."""

    state: dict[str, Tensor]
    """Of the weight."""
    grad: Tensor
    """(m, n), of any float dtype."""
    row: Tensor
    """A step row: M <- decay M - step_size grad, rounded by its seed in 8 bits."""


class SummedStep(NamedTuple):
    """As `qgalore.kernels.AdamStep`, of a weight whose momentum has the gradients of the update already."""

    state: dict[str, Tensor]
    """Of the weight."""
    exp_avg_sq: Tensor | None
    """A second moment of each row of the direction, (m,), where there is one."""
    row: Tensor
    betas: tuple[float, float]
    eps: float

    @property
    def grad(self) -> Tensor:
        """What stands for the gradient where only its device is asked for."""
        return self.state[_CODES]

    def advance(self, dtype: torch.dtype, skip: Tensor | None) -> Tensor:
        """The momentum (m, n) in dtype as it is, without Nesterov's look ahead."""
        return read(self.state, dtype)


def init_state(state: dict[str, Tensor], shape: torch.Size, bits: int, device: torch.device) -> None:
    """Put a momentum of zero into `state`: of a large matrix (m, n) in 8 bits where bits is 8, else in float32."""
    if bits != 8 or shape.numel() < MIN_8BIT_NUMEL:
        state[_CODES] = torch.zeros(shape, device=device)
        return
    rows, columns = shape
    state[_CODES] = torch.zeros(rows, row_bytes(columns, 8), dtype=torch.uint8, device=device)
    state[_SCALE] = torch.zeros(rows, -(-columns // GROUP_SIZE), dtype=torch.bfloat16, device=device)
    state[_ZERO_POINT] = torch.zeros_like(state[_SCALE])


def fits(state: dict[str, Tensor]) -> bool:
    """Whether a state has a momentum as `init_state` makes it, and none in another format."""
    return _CODES in state and (state[_CODES].dtype == torch.float32 or _SCALE in state)


def only_fits(state: dict[str, Tensor]) -> bool:
    """Whether a state's momentum is stored in the 8 bits of `init_state`, which nothing else reads."""
    return _CODES in state and _SCALE in state


def read(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The momentum (m, n) in dtype; the state's own tensor where that is of this dtype."""
    return _stored(state).dequantize(dtype) if _SCALE in state else state[_CODES].to(dtype)


def add_(additions: Sequence[Addition], skip: Tensor | None) -> None:
    """Decay momenta and add to them, in place, unless the flag `skip` is true."""
    updates, floats = [], []
    for state, grad, row in additions:
        if _SCALE in state:
            q = _stored(state)
            sizes = (q.columns, q.bits, q.group_size)
            updates.append(kernels.QuantizedUpdate(q.qdata, q.scale, q.zero_point, grad, None, None, *sizes, row))
        else:
            floats.append(kernels.FloatUpdate(state[_CODES], grad.contiguous(), None, None, row))
    if updates:
        kernels.update_quantized_(updates, skip)
    if floats:
        kernels.update_float_(floats, skip)


def _stored(state: dict[str, Tensor]) -> QuantizedTensor:
    codes = state[_CODES]
    return QuantizedTensor(codes, state[_SCALE], state[_ZERO_POINT], codes.shape[1], 8, GROUP_SIZE)


class SummedGradient(WeightGradient):
    """A `WeightGradient` that has the gradient of one micro-batch alone, until that is added to the momentum."""

    def __init__(self, subspace: Identity, rows: SumRows) -> None:
        # A gradient is kept as it comes; those of a weight that is used more than once are added in float32.
        super().__init__(subspace, torch.float32, rows)
        self.additions = 0
        """Micro-batches of this update that the momentum has."""
        self.of_ranks: tuple[Tensor, Tensor] | None = None
        """What `qgalore.update.step.parts_to_sum` gave, summed over the ranks: the momentum (m, n), a norm (1,)."""
        self._final = self._for_owner = False

    @property
    def has_micro_batch(self) -> bool:
        """Whether the gradient of a micro-batch waits to be added."""
        return not self._sums[GRADIENT].empty

    @property
    def is_final(self) -> bool:
        """Whether the momentum has all gradients of the update."""
        return self._final

    @property
    def waits(self) -> bool:
        """See `WeightGradient`; what the momentum has also waits for the update."""
        # Of what owners add all ranks have to say the same.
        added = self.sent if self._for_owner else self.additions
        return not self._final and (self.has_micro_batch or added > 0)

    def sum_for_owner(self) -> None:
        """See `WeightGradient`."""
        self._for_owner = True

    def take_micro_batch(self) -> Tensor:
        """The gradient (m, n) of the micro-batch that waits, which counts as added."""
        self.additions += 1
        return self._sums[GRADIENT].take()

    def parts_to_sum(self) -> list[Tensor]:
        """For an owner the last gradient; else `qgalore.update.step.parts_to_sum` has what is summed, the momentum."""
        if not self._for_owner:
            raise RuntimeError("a momentum that sums its gradients is summed over the ranks itself")
        return self.take_micro_batch_parts()

    def add_micro_batch(self, summed: list[Tensor]) -> None:
        """Let a micro-batch's gradient, summed over the ranks, be the one that is added to the owner's momentum."""
        self._sums[GRADIENT].replace(summed[0], self._rows.write(0, torch.float32))

    def finalize(self, summed: list[Tensor] | None = None, waits: bool = False) -> None:
        """Let the update begin; summed: None for one rank, `of_ranks`, or for the owner the last one's gradient."""
        if summed is not None and self._for_owner:
            self.add_micro_batch(summed)
        elif summed is not None:
            self.of_ranks = summed[0], summed[1]
        self._final = True

    def clear(self) -> None:
        """Forget everything; what the momentum has stays there."""
        super().clear()
        self.additions, self.of_ranks, self._final = 0, None, False
