"""‖g‖² of gradients and whether they are finite, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_gradients_"]


def check_gradients_(grads: Sequence[Tensor], squared_norms: Tensor, indices: Sequence[int], skip: Tensor) -> None:
    """See `qgalore.kernels.check_gradients_`."""
    for grad, index in zip(grads, indices, strict=True):
        squared_norms[index] = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        skip.logical_or_(~squared_norms[index].isfinite())
