"""The protocol of an optimizer in the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from qgalore.update.loss_scale import LossScale


class TrainingOptimizer(Protocol):
    """An optimizer as the training loop uses it."""

    is_last_micro_batch: bool
    """Set before each backward pass: in the last one of an update gradients are summed, and may be applied."""

    @property
    def loss_scale(self) -> LossScale | None:
        """What each loss is multiplied by before its backward pass; None: by nothing."""

    @property
    def sums_in_momentum(self) -> bool:
        """Whether an update that has begun must be made, since gradients are added to momenta as they come."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their hyperparameters."""

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """What is kept of each parameter; loading a state replaces it."""

    @property
    def owners(self) -> Mapping[Tensor, int]:
        """The rank that keeps the state of each parameter and updates it; empty where every rank does."""

    @property
    def summed(self) -> Sequence[Tensor]:
        """The parameters whose gradients were summed over the ranks in the last update, in that order."""

    def is_elsewhere(self, param: Tensor) -> bool:
        """Whether another rank owns a parameter, which this one does not have for good."""

    def kept_rows(self, param: Tensor) -> tuple[int, Tensor] | None:
        """The first row that this rank has of a parameter, and all rows that it has; None where that is all or none."""

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the update, over all ranks."""

    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Scale the gradients so that their norm is at most max_norm."""

    def step(self) -> Any:
        """Update the weights that the backward pass has not updated already; none if the gradient is not finite."""

    def skip_update_if(self, flag: Tensor) -> None:
        """Make this update change nothing if flag, a 0-dim bool on the device and equal on all ranks, is true.

        Of several flags in an update one is enough.
        """

    def skipped(self) -> Tensor:
        """Whether the last update was skipped, as a 0-dim bool on the device."""

    def late_overflow(self) -> Tensor:
        """Whether it was skipped too late, after some weights had been updated; as a 0-dim bool on the device."""

    def zero_grad(self) -> None:
        """Clear the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """Metrics of the low-rank subspaces by name; empty without any."""

    accumulates_by_layer: bool
    """Set where each layer has the backward passes of all micro-batches at once, with `end_layer` after the last."""

    def end_layer(self, parameters: Iterable[Tensor]) -> None:
        """All micro-batches of the update have reached these parameters; those updated per layer are updated now."""
