"""The loss scale of training in float16, kept and moved on the device.

A float16 holds nothing below 6e-8, and most gradients of a mean loss are smaller. So the loss is multiplied by a large
number before the backward pass (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740), and its gradients
are divided by it again where they leave float16. Where one of them overflows the update is skipped.

The rule and the constants are those of `torch.amp.GradScaler`: start at 2^16, halve after an update that was skipped,
double after 2,000 in a row that were not. Two things differ. The scale does not fall below 1, as in DeepSpeed: what
overflows there does so without a scale. And nothing is read by the host, which `GradScaler.step` waits for: kernels
skip the update by the flag that they have anyway (`qgalore.update.finite_checks`), and the scale is a tensor whose
address stays, as CUDA graphs need it.

What is multiplied by a power of two keeps its digits, and everything up to the update of a weight is linear in the
gradient: its projection, sums over micro-batches and ranks, in INT8, too, sketches. So gradients stay scaled until
then, in 16 bits where they come alone, and are divided inside the kernels of the moments, in float32. Their norms are
divided wherever they are looked at. `tests/test_loss_scale.py` holds a scaled run in float32 to the bits of one without
a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INITIAL = 2.0**16
LOWEST = 1.0
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000
"""Updates in a row without an overflow after which the scale grows."""


class LossScale:
    """A number that the loss is multiplied by: one that follows the overflows, or a fixed one."""

    def __init__(self, device: torch.device | str, fixed: float | None = None) -> None:
        """fixed: a scale that stays as it is; None for one that moves.

        Raises ValueError for a fixed scale below 1 or above 2^24, beyond which float16 holds no gradient of a loss.
        """
        if fixed is not None and not 1.0 <= fixed <= 2.0**24:
            raise ValueError(f"a fixed loss scale is from 1 to 2^24 = 16777216, not {fixed!r}")
        self.moves = fixed is None
        """Whether it follows the overflows."""
        self.value = torch.full((), INITIAL if fixed is None else fixed, dtype=torch.float32, device=device)
        """The scale of the update that goes on, ()."""
        self.inverse = 1.0 / self.value
        """What gradients are multiplied by, ()."""
        self._made = torch.zeros((), dtype=torch.int32, device=device)  # in a row, since the scale has moved

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss, (), to make the backward pass of, float32."""
        return loss * self.value

    def can_fall(self) -> Tensor:
        """Whether an overflow makes it smaller: a bool, ()."""
        return self.value > LOWEST if self.moves else torch.zeros_like(self.value, dtype=torch.bool)

    @torch.no_grad()
    def update_(self, skipped: Tensor) -> None:
        """Move on after an update, of which `skipped`, a bool (), says that it was not made."""
        if not self.moves:
            return
        self._made.add_(1).mul_(~skipped)
        grows = self._made >= GROWTH_INTERVAL
        larger = self.value * GROWTH
        grown = torch.where(grows & larger.isfinite(), larger, self.value)
        self.value.copy_(torch.where(skipped, (self.value * BACKOFF).clamp_min(LOWEST), grown))
        self._made.mul_(~grows)
        torch.reciprocal(self.value, out=self.inverse)

    def state_dict(self) -> dict[str, Any]:
        """The state of one that moves, as plain numbers, which waits for the device; empty for a fixed one."""
        return {"scale": self.value.item(), "updates_since": int(self._made)} if self.moves else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a fixed one stays what it is, and one that was fixed starts anew."""
        if self.moves and state:
            self.value.fill_(state["scale"])
            self._made.fill_(state["updates_since"])
            torch.reciprocal(self.value, out=self.inverse)
