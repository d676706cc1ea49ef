"""What the device finds out about an update while it is made: the gradients' norms, and whether to skip it.

The tensors stay where they are for the whole run and are written in place, so that kernels in CUDA graphs can use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.torch_internals import internal
from qgalore.update.gradient_sum import GradientSum


class UpdateChecks:
    """The checks of one update at a time."""

    def __init__(self, count: int, device: torch.device) -> None:
        """count: the number of weights."""
        self.count = count
        self.squared_norms = torch.zeros(count, device=device)
        """Of the gradient of each weight, as it comes from a scaled loss; zero where there was none."""
        self.inverse_scale: Tensor | None = None
        """What such gradients are to be multiplied by, (); None for 1."""
        self.skip = torch.zeros((), dtype=torch.bool, device=device)
        """Something in the update is not finite."""
        self._written = torch.zeros_like(self.skip)
        """A weight, or momentum, of the update was written when `skip` was false."""

    def clear(self) -> None:
        """Begin another update."""
        for tensor in (self.squared_norms, self.skip, self._written):
            tensor.zero_()

    def check(self, gradients: Mapping[int, GradientSum]) -> None:
        """Look at the final gradients of weights, by their index."""
        whole = {index: total for index, each in gradients.items() if isinstance(total := each.stored, Tensor)}
        kernels.check_gradients_(list(whole.values()), self.squared_norms, list(whole), self.skip)
        for index, gradient in gradients.items():
            if index not in whole:
                gradient.check_(self.squared_norms, index, self.skip)

    def check_micro_batch(self, gradients: Mapping[int, Tensor]) -> None:
        """Look at the gradients of weights in one micro-batch, by their index.

        Of the sum over micro-batches, which is never there, `squared_norms` get the sum of squares: its square where
        gradients are as noise is, and less where they agree.
        """
        found = self.squared_norms.new_zeros(len(gradients))
        kernels.check_gradients_(list(gradients.values()), found, range(len(gradients)), self.skip)
        for index, squared_norm in zip(gradients, found.unbind(), strict=True):
            self.squared_norms[index].add_(squared_norm)

    def norms(self) -> Tensor:
        """The norm of the gradient of each weight, (weights,), without the scale of the loss."""
        norms = self.squared_norms.sqrt()
        return norms if self.inverse_scale is None else norms.mul_(self.inverse_scale)

    def norm(self) -> Tensor:
        """The norm of all gradients together, (), without the scale of the loss."""
        norm = self.squared_norms.sum().sqrt()
        return norm if self.inverse_scale is None else norm.mul_(self.inverse_scale)

    def skip_for_kernels(self) -> Tensor | None:
        """The flag `skip` where kernels have to read it; None on a CPU, where the host can look at it."""
        return None if self.skip.device.type == "cpu" else self.skip

    def note_write(self) -> None:
        """Note that weights, or momenta, are written now, unless `skip` is true; before each time that they are.

        On the device alone: a CUDA graph does it again, and the host would not learn of that.
        """
        torch.ge(self._written, self.skip, out=self._written)  # or not skip: `skip` stays true once it is

    def late_overflow(self) -> Tensor:
        """Whether `skip` became true after the first weight, or momentum, had been written: a bool, ()."""
        return self.skip & self._written


def limit_growth(states: Sequence[dict[str, Tensor]], growth: float, norms: Sequence[Tensor], skip: Tensor) -> Tensor:
    """Factors (weights,) that let the norm of each gradient grow by `growth` at most from update to update.

    After Fira's limiter (Chen et al., arXiv 2410.01623). states: those of the weights, which keep the norms;
    norms, each (), and skip are those of `UpdateChecks`: a skipped update leaves no trace.
    """
    for state in states:
        if "limited_norm" not in state:  # where the limit was set later
            state["limited_norm"] = torch.zeros_like(skip, dtype=torch.float32)
    kept = [state["limited_norm"] for state in states]
    before, now = torch.stack(kept), torch.stack(list(norms))
    limited = torch.where(before > 0, torch.minimum(now, growth * before), now)
    internal("torch._foreach_copy_")(kept, list(torch.where(skip, before, limited).unbind()))
    return limited / now.clamp_min(1e-30)
