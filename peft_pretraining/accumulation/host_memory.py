"""Host memory that is free, or is locked for the hidden states of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from peft_pretraining.errors import UserError
from qgalore.offload.page_locked import PageLockError, page_locked


def free_host_bytes() -> int | None:
    """Bytes of host memory that processes can still take without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def locked_for_hidden_states(owner: object, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """`page_locked`; raises UserError where the system does not lock so much memory."""
    try:
        return page_locked(owner, shapes, dtype)
    except PageLockError as error:
        raise UserError(
            f"--accumulate_by layer: {error}, which is to hold hidden states: give a smaller --total_batch_size, or "
            "--accumulate_by micro_batch"
        ) from error
