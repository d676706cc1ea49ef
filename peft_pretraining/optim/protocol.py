"""What the training loop needs of an optimizer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class TrainingOptimizer(Protocol):
    """What the training loop needs of an optimizer."""

    is_last_micro_batch: bool

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their hyperparameters."""

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the update, over all ranks."""

    def clip_grad_norm_(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most max_norm."""

    def step(self) -> Any:
        """Update what the backward pass has not updated already; nothing where the gradient is not finite."""

    def skip_update_if(self, flag: Tensor) -> None:
        """Change nothing in this update where flag, a bool on the device that all ranks share, is true."""

    def skipped(self) -> Tensor:
        """Whether the last update was skipped, as a bool on the device."""

    def late_overflow(self) -> Tensor:
        """Whether it was skipped too late, after some weights had been updated; as a bool on the device."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state up again."""

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """Metrics of the low-rank subspaces, if there are any."""
