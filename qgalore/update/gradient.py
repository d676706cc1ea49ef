"""What a weight sums over the micro-batches of an update, and the final gradient that is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore.kernels import StepScalars
from qgalore.subspace.methods import FULL, GRADIENT, Identity
from qgalore.update.gradient_sum import GradientSum, zeros
from qgalore.update.step_table import SumRows


class WeightGradient:
    """The sums of one weight by name (`qgalore.subspace.methods`), then its final gradient until that is taken.

    Where a residual is asked for, also the full gradient of the last micro-batch.
    """

    def __init__(self, subspace: Identity, dtype: torch.dtype, rows: SumRows) -> None:
        """dtype: of the sums; rows: for the rounding of those in INT8."""
        self._subspace, self._dtype, self._rows = subspace, dtype, rows
        self.final = GradientSum(dtype)
        """Summed over micro-batches and ranks, ready for the update."""
        self._sums = {GRADIENT: GradientSum(dtype)}
        self._additions = 0
        self.first_row = 0
        """The row of the weight to which the first one of the final gradient belongs: of one that is dealt by rows."""
        self.sent = 0
        """Micro-batches of this update that the owner of the weight has been sent one by one."""
        self._totals: dict[str, GradientSum] = {}
        """Of these, summed over ranks; on the owner's rank alone."""
        self._last_full: Tensor | None = None
        self._full_was_sent = False
        """Whether the last of `parts_to_sum` was `_last_full`, which `finalize` is to be given back."""
        self._ended, self._micro_batches = True, 0
        """Whether the micro-batch of `_last_full` has ended, and those with a full gradient."""

    @property
    def is_final(self) -> bool:
        """Whether there is a final gradient."""
        return not self.final.empty

    @property
    def waits(self) -> bool:
        """Whether a micro-batch has reached the weight since the last final gradient."""
        return self.sent > 0 or not all(each.empty for each in self._sums.values())

    def sum_for_owner(self) -> None:
        """Keep no sum here: each micro-batch is sent to the owner as it is, with `take_micro_batch_parts`."""
        # In its own dtype: it is added up in that of sums there.
        self._sums = {GRADIENT: GradientSum(torch.float32)}

    def add(self, name: str, value: Tensor) -> None:
        """Add this micro-batch's contribution to the sum `name`."""
        total = self._sums.setdefault(name, GradientSum(self._sums[GRADIENT].dtype))
        self._additions = 0 if total.empty else self._additions + 1
        total.add(value, self._rows.write(self._additions, total.dtype))

    def keep_full(self, grad: Tensor) -> None:
        """Keep the full gradient (m, n) of a micro-batch, summed over all uses of the weight; not of the one before."""
        if self._ended or self._last_full is None:
            self._last_full, self._ended, self._micro_batches = grad, False, self._micro_batches + 1
        else:
            self._last_full = self._last_full + grad

    def end_micro_batch(self) -> None:
        """A backward pass has added all that it has, and another one follows."""
        self._ended = True

    def full_of_last_micro_batch(self, dtype: torch.dtype) -> Tensor | None:
        """The full gradient (m, n) of the last micro-batch times their number; None where none is kept.

        So it has the size of the sum of all.
        """
        if self._last_full is None:
            return None
        full = self._last_full.to(dtype)
        return full if self._micro_batches <= 1 else full * self._micro_batches

    def parts_to_sum(self) -> list[Tensor]:
        """What `finalize` needs the sums of over the ranks, in the dtype it has (INT8: bfloat16); not kept here."""
        parts = self.take_micro_batch_parts() if self.sent else self._take_sums()
        if self._last_full is None:
            return parts
        full, self._last_full, self._full_was_sent = self._last_full, None, True
        return [*parts, full]

    def take_micro_batch_parts(self) -> list[Tensor]:
        """What `add_micro_batch` needs the sums of over the ranks; zeros where only earlier micro-batches had any."""
        zeros_of = self._subspace.sums().values()
        return self._take_sums() or [torch.zeros(shape, device=self._rows.device) for shape in zeros_of]

    def _take_sums(self) -> list[Tensor]:
        return [each.take_to_send() for each in self._sums.values() if not each.empty]

    def add_micro_batch(self, summed: list[Tensor]) -> None:
        """Add `take_micro_batch_parts`, summed over the ranks, to what the owner keeps until the update."""
        for name, value in zip(self._subspace.sums(), summed, strict=True):
            total = self._totals.setdefault(name, GradientSum(self._dtype))
            if total.empty:  # not with a view of what was sent, which has all that others own
                value = total.own(value)
            total.add(value, self._rows.write(self.sent, self._dtype), self.first_row)

    def finalize(self, summed: list[Tensor] | None = None, waits: bool = False) -> None:
        """Make the final gradient, of this rank's sums or of `parts_to_sum` summed over the ranks.

        waits: whether it stays until others are there. A view of a message would then keep all that was sent with it.
        """
        full = None
        if summed is not None:
            if self._full_was_sent:
                *summed, full = summed
                # With sums in a float dtype these are views of the same message, which stays anyway.
                self._last_full = full.clone() if waits and self._dtype == torch.int8 else full
                self._full_was_sent = False
            if self.sent:
                self.add_micro_batch(summed)
                self._finalize_totals()
                return
            full, *sketches = summed
            full = self.final.own(full) if waits and full.dim() < 2 else full
            for name, value in zip(
                [name for name in self._sums if name in self._subspace.sides], sketches, strict=True
            ):
                self._sums[name].add(value, self._rows.write(-2, self._dtype))
        if self._subspace.needs_full_gradient:
            full = self._subspace.finish(self._sums[FULL].take() if full is None else full)
        if full is None:
            self._sums[GRADIENT], self.final = self.final, self._sums[GRADIENT]
        else:
            self.final.replace(full, self._rows.write(-1, self._dtype), self.first_row)

    def _finalize_totals(self) -> None:
        totals, self._totals = self._totals, {}
        if self._subspace.needs_full_gradient:
            full = self._subspace.finish(totals.pop(FULL).take())
            self.final.replace(full, self._rows.write(-1, self._dtype), self.first_row)
        else:
            self.final = totals.pop(GRADIENT)
        self._sums |= totals

    def take_sketches(self) -> dict[str, Tensor]:
        """The sketches of the update by side; none where no subspace is refreshed."""
        return {side: self._sums[side].take() for side in self._subspace.sides if side in self._sums}

    def clear(self) -> None:
        """Forget everything."""
        self.final.clear()
        self._sums[GRADIENT].clear()
        self._sums = {GRADIENT: self._sums[GRADIENT]}
        self._totals, self.sent = {}, 0
        self._last_full, self._full_was_sent, self._ended, self._micro_batches = None, False, True, 0

    # ---- under CUDA graphs

    def fix_addresses(self, alone: torch.dtype | None) -> None:
        """Give the sum of gradients, and the final one, a buffer each.

        alone: the dtype of gradients that come alone, which is kept but where sums are in INT8. From then on every
        update begins with `begin`.
        """
        dtype = self._dtype if alone is None or self._dtype == torch.int8 else alone
        device = self._rows.device
        self._sums[GRADIENT].out = self.final.out = zeros(self._subspace.gradient_shape, dtype, device)

    def begin(self) -> None:
        """Start the sums of an update from zero, those of a refresh in buffers of their own."""
        self._additions = -1
        for name, shape in self._subspace.sums().items():
            if name == GRADIENT:
                self._sums[name].begin()
            else:
                self._sums[name] = GradientSum(self._dtype, zeros(shape, self._dtype, self._rows.device))

    def next_sum_scalars(self) -> StepScalars:
        """What the step row of the next gradient that is added must contain."""
        return self._rows.scalars(self._additions + 1)

    def count_replayed(self) -> None:
        """Keep the host's account of a gradient that a CUDA graph has added."""
        self._additions += 1
