"""What the ranks of a data-parallel run do for one another in an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.update.all_reduce import AllReduce, Bucket
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.weight import Weight


class Ranks:
    """A run of one rank, for which nothing is to be done; what more ranks do `SummingRanks` and `Shards` override."""

    sums_gradients = False
    """Whether gradients have to be summed over the ranks."""
    deals_weights = False
    """Whether each weight is updated by the one rank that owns it, as of `qgalore.sharding.shards.Shards`."""
    owners_sum = False
    """Whether each micro-batch's gradient is sent to the owner of its weight, which alone has a sum."""

    def bucket(self, weights: Sequence[Weight], parts: list[list[Tensor]], buffer: Tensor | None) -> Bucket:
        """The gradients of weights, some tensors of each, ready to be summed; `buffer` as in `Bucket`."""
        return Bucket(parts, lambda _: None, buffer)

    def share_of_momenta(self, device: torch.device) -> float | None:
        """What of a momentum from before the update each rank has; see `qgalore.update.step.add_to_momenta`."""
        return None

    # ---- beside `Shards` every rank has all that these would give it

    def note_refreshes(self, weights: Sequence[Weight]) -> None:
        """Remember which subspaces the update of these weights is to refresh; before it is made."""

    def share_norms_of_rows(self, weights: Sequence[Weight], checks: UpdateChecks) -> None:
        """Let every rank have the norms of gradients of which each has checked some rows."""

    def share_checks(self, checks: UpdateChecks) -> None:
        """Let every rank have the norms of all gradients and the flag; again after more gradients, if need be."""

    def agree_on_skip(self, checks: UpdateChecks) -> None:
        """Let the flag `checks.skip` be true if it is so on any rank."""

    def publish(self, weights: Sequence[Weight], checks: UpdateChecks) -> None:
        """Send this rank's updated weights, and receive the others'; before anything else is checked."""

    def finish(self) -> None:
        """End an update: let later work wait for what was sent."""

    def forget(self) -> None:
        """Forget the update that goes on."""


class SummingRanks(Ranks):
    """Ranks that each have and update all weights, by gradients that they sum."""

    sums_gradients = True

    def __init__(self, all_reduce: AllReduce) -> None:
        """all_reduce: sums a tensor over the ranks, in place."""
        self._all_reduce = all_reduce
        self._share_of_momenta: float | None = None

    def bucket(self, weights: Sequence[Weight], parts: list[list[Tensor]], buffer: Tensor | None) -> Bucket:
        """See `Ranks`."""
        return Bucket(parts, self._all_reduce, buffer)

    def share_of_momenta(self, device: torch.device) -> float:
        """See `Ranks`. The host waits for it, once."""
        if self._share_of_momenta is None:
            # By what they make of 1: so a function that averages is served, too.
            ranks = torch.ones(1, device=device)
            if (sent := self._all_reduce(ranks)) is not None:
                sent.wait()
            self._share_of_momenta = 1.0 / float(ranks)
        return self._share_of_momenta
