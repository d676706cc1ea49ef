"""What the weights of an optimizer go through in one update, from its first micro-batch to new weights.

1. A backward pass adds its micro-batch to the gradients of weights, and tells `gradients_ready`.
2. With the last micro-batch gradients are made final, summed over the ranks and checked: by `gradients_ready`, and by
   `collect` those that no backward pass has told of.
3. They are clipped or scaled, and the update may be skipped: factors and a flag on the device, which step 4 reads.
4. Weights are written: if that is asked for as soon as step 2 has their gradients, else in `finish`, which ends the
   update.

What is done to one weight is in `qgalore.update.step`, what ranks do for one another in `qgalore.update.ranks`. Whoever
runs layers himself, as CUDA graphs do (`qgalore.graphs`), makes steps 2 and 4 by `finalize` or its parts, with other
work in between.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore.config import scaled_too_late
from qgalore.offload.offload import Offload
from qgalore.update.all_reduce import Bucket
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.loss_scale import LossScale
from qgalore.update.momentum_sum import SummedGradient
from qgalore.update.ranks import Ranks
from qgalore.update.step import (
    Replay,
    add_to_momenta,
    check_gradients,
    finalize_gradients,
    is_small,
    parts_to_sum,
    store_momenta,
    update_weights,
)
from qgalore.update.step_table import StepTable
from qgalore.update.weight import Weight


class UpdateCycle:
    """The update that goes on, of all weights of one optimizer; `finish` or `abandon` begins the next."""

    def __init__(self, weights: Mapping[Tensor, Weight]) -> None:
        """weights: those of the optimizer by parameter, which adds to them; then it calls `bind`."""
        self._weights = weights
        self._groups: Sequence[Mapping[str, Any]] = ()
        self._table = StepTable(0)
        self.offload: Offload | None = None
        """See `qgalore.optimizer.LowRankAdamW`, as for the flags of the same names."""
        self.configure()
        self.accumulates_by_layer, self.is_last_micro_batch = False, True
        self.summed: list[Tensor] = []
        """See `qgalore.optimizer.LowRankAdamW`."""
        self._checks: UpdateChecks | None = None
        self._ended = False
        """Whether `_checks` are those of an update that was finished."""
        self._begin()

    def _begin(self) -> None:
        """Have nothing of an update yet; `_checks` stay until the next one needs them."""
        self._has_sums = self._rows_written = False
        self._finalized: dict[Weight, None] = {}
        """Weights whose gradients of this update were made final, in that order."""
        self._unchecked: list[Weight] = []
        """Those with a final gradient that `_checks` have not seen."""
        self._sent: list[Weight] = []
        """Weights of other ranks, which have got their gradients, and whose updated values are still to be received."""
        self._clip_factor: Tensor | None = None
        self._scale: Tensor | None = None

    def bind(self, groups: Sequence[Mapping[str, Any]], table: StepTable) -> None:
        """Take up the optimizer's param groups, and the step table that its weights have now."""
        self._groups, self._table = groups, table

    def configure(
        self,
        update_in_backward: bool = False,
        ranks: Ranks | None = None,
        loss_scale: LossScale | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Say how updates are made from now on; without arguments as for a model whose gradients come in `.grad`.

        The arguments are those of `LowRankAdamW.attach`; ranks: None for one.
        """
        self.update_in_backward, self.ranks = update_in_backward, ranks or Ranks()
        self.loss_scale, self.replay = loss_scale, replay

    # ---- micro-batches

    @torch.no_grad()
    def gradients_ready(self, weights: Sequence[Weight]) -> None:
        """A backward pass has added all that it has to the gradients of weights."""
        if self.is_last_micro_batch:
            self._finalize(weights, None, check=self.updates_immediately and not all(map(is_small, weights)))
            return
        if self.ranks.owners_sum:
            bucket = self.bucket_of(weights)
            assert bucket is not None
            bucket.start()
            self.gradients_sent(weights, bucket)
            return
        self._has_sums = True
        self._add_to_momenta(weights)
        for weight in weights:
            weight.gradient.end_micro_batch()

    @torch.no_grad()
    def gradients_sent(self, weights: Sequence[Weight], bucket: Bucket) -> None:
        """`gradients_ready` where owners sum each micro-batch, of gradients that are on their way."""
        if self.is_last_micro_batch:
            self._finalize(weights, bucket, check=False)
            return
        self._has_sums, owned = True, _owned(weights)
        for weight, summed in zip(owned, bucket.summed(), strict=True):
            weight.gradient.add_micro_batch(summed)
        self._add_to_momenta(owned)
        for weight in weights:
            weight.gradient.sent += 1
            weight.gradient.end_micro_batch()

    @torch.no_grad()
    def end_layer(self, parameters: Iterable[Tensor]) -> None:
        """See `qgalore.optimizer.LowRankAdamW`."""
        self.is_last_micro_batch = True
        found = (self._weights[param] for param in parameters if param in self._weights)
        weights = [weight for weight in found if weight.gradient.waits]
        for part in [[weight] for weight in weights] if self.ranks.sums_gradients else [weights]:
            if part:
                self._finalize(part, None, self.updates_immediately)

    @property
    def updates_immediately(self) -> bool:
        """Whether each weight is updated as soon as its gradient is final, by the backward pass that goes on."""
        complete = self.is_last_micro_batch if self.accumulates_by_layer else self.takes_whole_gradients
        return self.update_in_backward and complete

    @property
    def keeps_no_gradient(self) -> bool:
        """Whether every gradient is used up, or added to an INT8 sum, as soon as the backward pass has it."""
        return self.updates_immediately or self.sums_in_int8

    @property
    def sums_in_int8(self) -> bool:
        """Whether sums of gradients have 8 bits a value."""
        return all(group["accumulator_dtype"] == "int8" for group in self._groups)

    @property
    def takes_whole_gradients(self) -> bool:
        """Whether the backward pass that goes on, or comes next, is the only one of its update."""
        return self.is_last_micro_batch and not self._has_sums

    @property
    def has_sums(self) -> bool:
        """Whether the update that goes on has had a micro-batch already."""
        return self._has_sums

    @property
    def sums_in_momentum(self) -> bool:
        """See `qgalore.optimizer.LowRankAdamW`."""
        return any(group.get("sum_in_momentum") for group in self._groups)

    @torch.no_grad()
    def _add_to_momenta(self, weights: Sequence[Weight]) -> None:
        """Let the momenta that sum gradients have those of the micro-batch that has ended."""
        if any(weight.sums_in_momentum for weight in weights):
            share = self.ranks.share_of_momenta(self._device)
            add_to_momenta(weights, self._update_checks(), share)

    def write_sum_rows(self) -> None:
        """Let the step rows of sums be those of the gradients that the next micro-batch adds."""
        self._table.write_sums([each.gradient.next_sum_scalars() for each in self._weights.values()], self._device)

    # ---- final gradients

    def bucket_of(self, weights: Sequence[Weight], buffer: Tensor | None = None) -> Bucket | None:
        """The gradients of weights, ready to be summed over the ranks; None on one rank. `buffer` as in `Bucket`."""
        if not self.ranks.sums_gradients:
            return None
        if not self.ranks.deals_weights:
            self._add_to_momenta(weights)
        with torch.no_grad():
            return self.ranks.bucket(weights, self._parts_to_sum(weights), buffer)

    def _parts_to_sum(self, weights: Sequence[Weight]) -> list[list[Tensor]]:
        if not self.ranks.deals_weights and self.sums_in_momentum:
            return [parts_to_sum(weight, self._update_checks()) for weight in weights]
        if self.is_last_micro_batch or not self.ranks.deals_weights:
            return [weight.gradient.parts_to_sum() for weight in weights]
        return [weight.gradient.take_micro_batch_parts() for weight in weights]

    @torch.no_grad()
    def finalize(self, weights: Sequence[Weight], bucket: Bucket | None = None, check: bool = True) -> None:
        """Make gradients final, and update where that is due.

        bucket: that of `bucket_of`, sent already; else on more than one rank one is sent and waited for. check: now,
        and not in `collect`, which checks all that are left at once. Raises RuntimeError for a weight whose gradient of
        this update is final already.
        """
        self._finalize(weights, bucket, check)

    @torch.no_grad()
    def check_final(self, weights: Sequence[Weight], bucket: Bucket | None) -> None:
        """The first part of `finalize` where weights are dealt to ranks; `update_checked` is the second one."""
        self._make_final(weights, bucket)
        self._check(weights)

    @torch.no_grad()
    def collect(self) -> None:
        """See `qgalore.optimizer.LowRankAdamW`."""
        for param, weight in self._weights.items():
            if weight.layer is None:  # others were looked at when they were attached
                weight.check()
            if weight.gradient.is_final:
                continue
            if param.grad is not None:
                weight.accumulate_full(param.grad)
            if weight.gradient.waits:
                self._finalize([weight], None, self.updates_immediately)
        self._check_rest()
        if self.ranks.deals_weights:
            self.ranks.share_checks(self._update_checks())

    def _finalize(self, weights: Sequence[Weight], bucket: Bucket | None, check: bool) -> None:
        self._make_final(weights, bucket)
        if not check:
            self._unchecked += _owned(weights)
            return
        self._check(weights)
        if self.updates_immediately:
            self.agree_on_skip()
            self.update_checked(weights)
            self.publish(weights)

    def _make_final(self, weights: Sequence[Weight], bucket: Bucket | None) -> None:
        """Finalize the gradients of weights, on a mesh those that this rank owns; the others' are sent."""
        if not self.ranks.deals_weights:
            self._add_to_momenta(weights)
        if bucket is None and (bucket := self.bucket_of(weights)) is not None:
            bucket.start()
        for weight in weights:
            if weight in self._finalized:
                raise RuntimeError(
                    f"{weight.name} got another gradient after that of the last micro-batch: before a backward pass "
                    "that is not the last of its update, or that reaches a weight more than once (a layer shared by "
                    "reentrant checkpoints), set is_last_micro_batch = False; step then takes the sums. In a Trainer "
                    "qgalore.integrations.QGaLoreCallback does so, under accelerate qgalore.integrations.connect after "
                    "accelerator.prepare"
                )
            self._finalized[weight] = None
        owned, checks = _owned(weights), self._update_checks()
        if self.ranks.deals_weights:
            self.ranks.note_refreshes(weights)
            self._sent += [weight for weight in weights if not weight.owned]
        finalize_gradients(owned, bucket, not self.updates_immediately)
        for weight in weights:
            weight.gradient.sent = 0
        if self.ranks.deals_weights:
            self._add_to_momenta(owned)
        store_momenta(owned, checks)

    # ---- what is found out about them, and what scales them

    def _check(self, weights: Sequence[Weight]) -> None:
        owned, checks = _owned(weights), self._update_checks()
        if owned:
            check_gradients(owned, checks)
        self.ranks.share_norms_of_rows(owned, checks)

    def _check_rest(self) -> None:
        if self._unchecked:
            self._check(self._unchecked)
            self._unchecked = []

    def _update_checks(self) -> UpdateChecks:
        """The checks of the update that is being made, which the first call clears: none is made without need."""
        if self._checks is None or self._checks.count != len(self._weights):
            self._checks = UpdateChecks(len(self._weights), self._device)
        elif self._ended:
            self._checks.clear()
        self._checks.inverse_scale = self._inverse_scale
        self._ended = False
        return self._checks

    @property
    def _inverse_scale(self) -> Tensor | None:
        """What gradients are multiplied by when they are used, (); None for 1."""
        return None if self.loss_scale is None else self.loss_scale.inverse

    @property
    def _device(self) -> torch.device:
        return next(iter(self._weights.values())).device

    def grad_norm(self) -> Tensor:
        """See `qgalore.optimizer.LowRankAdamW`."""
        self._check_rest()
        return torch.zeros((), device="cpu") if self._checks is None else self._checks.norm()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """See `qgalore.optimizer.LowRankAdamW`."""
        if self.update_in_backward:
            raise RuntimeError("clip_grad_norm_ needs all gradients at once: attach with update_in_backward=False")
        self._check_unscaled("clip_grad_norm_")
        self.collect()
        norm = self.grad_norm()
        self._clip_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def scale_gradients(self, factor: Tensor) -> None:
        """See `qgalore.optimizer.LowRankAdamW`."""
        self._check_unscaled("scale_gradients")
        self._scale = factor

    def _check_unscaled(self, method: str) -> None:
        if self.sums_in_momentum:
            raise RuntimeError(scaled_too_late(method, "sum_in_momentum", "do without"))

    @torch.no_grad()
    def skip_update_if(self, flag: Tensor) -> None:
        """See `qgalore.optimizer.LowRankAdamW`."""
        self._update_checks().skip.logical_or_(flag)

    def skipped(self) -> Tensor:
        """See `qgalore.optimizer.LowRankAdamW`."""
        return torch.zeros((), dtype=torch.bool, device="cpu") if self._checks is None else self._checks.skip.clone()

    def late_overflow(self) -> Tensor:
        """See `qgalore.optimizer.LowRankAdamW`."""
        return torch.zeros((), dtype=torch.bool, device="cpu") if self._checks is None else self._checks.late_overflow()

    # ---- new weights

    def agree_on_skip(self) -> None:
        """Between `check_final` and `update_checked`: let all ranks of a mesh skip what any of them does."""
        if self.ranks.deals_weights:
            self.ranks.agree_on_skip(self._update_checks())

    @torch.no_grad()
    def update_checked(self, weights: Sequence[Weight]) -> None:
        """Update weights in the backward pass, as far as this rank owns them, and count the updates of the others."""
        self._update_checks().note_write()
        self.write_update_rows()
        self._update(weights, self._inverse_scale)

    def publish(self, weights: Sequence[Weight]) -> None:
        """After it: send updated weights to the other ranks of a mesh; `finish` lets later work wait for them."""
        if self.ranks.deals_weights:
            self.ranks.publish(weights, self._update_checks())

    @torch.no_grad()
    def finish(self) -> None:
        """Update every weight that has a gradient and was not updated inside the backward pass; end the update."""
        if self.offload is not None:  # an evaluation, or an update, may have ended with an error
            self.offload.leave_all()
        self.collect()
        sent = set(self._sent)
        waiting = [weight for weight in self._weights.values() if weight.gradient.is_final or weight in sent]
        if waiting:
            if not self.updates_immediately:  # else most weights have been updated
                self.skip_update_if(~self.grad_norm().isfinite())
            self.write_update_rows()
            given = (self._clip_factor, self._scale, self._inverse_scale)
            factors = [factor for factor in given if factor is not None]
            clip = functools.reduce(torch.mul, factors) if factors else None
            self._update(waiting, clip)
            self.publish(waiting)
        self.ranks.finish()
        self.summed = [weight.param for weight in self._finalized]
        self._ended = True
        self._begin()

    def write_update_rows(self) -> None:
        """Let the step rows be those of the update that goes on, if they are not."""
        if not self._rows_written:
            self._table.write_updates([each.update_scalars() for each in self._weights.values()], self._device)
            self._rows_written = True

    def _update(self, weights: Sequence[Weight], clip: Tensor | None) -> None:
        owned = _owned(weights)
        for part in [owned] if self.offload is None else self.offload.by_layer(owned):
            update_weights(part, self._update_checks(), clip, self.replay)
        if others := [weight for weight in weights if not weight.owned]:
            for weight in others:
                weight.count_update()
                weight.clear()
            self._sent = [weight for weight in self._sent if weight not in set(others)]

    # ---- an update that is not made

    @property
    def is_half_made(self) -> bool:
        """Whether some weights have been updated, and others wait for `finish`."""
        # Rows are written with the first weight of an update.
        return self._rows_written and any(weight.gradient.is_final for weight in self._weights.values())

    def check_whole(self, wanted: str) -> None:
        """Raise RuntimeError where momenta have a part of an update's gradients; wanted: what the optimizer is to."""
        if any(
            isinstance(each.gradient, SummedGradient) and each.gradient.additions for each in self._weights.values()
        ):
            raise RuntimeError(
                f"the optimizer cannot {wanted} in the middle of an update: with sum_in_momentum its momenta have the "
                "gradients of some micro-batches already. Make the others and call step first, or load_state_dict of a "
                "state from before the update"
            )

    def abandon(self) -> None:
        """Forget the gradients of the update that goes on, and its checks."""
        self._begin()
        self.ranks.forget()
        if self._checks is not None and not self._ended:
            self._checks.clear()  # after an update has ended `grad_norm` can still be read
        for weight in self._weights.values():
            weight.clear()


def _owned(weights: Sequence[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.owned]
