"""Which implementation of the arithmetic runs: `QGALORE_KERNELS` and the device decide."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

_IMPLEMENTATIONS = ("auto", "reference", "triton")


def use_triton(device: torch.device) -> bool:
    """Whether kernels run in Triton on this device; raises ValueError for an unknown `QGALORE_KERNELS`."""
    chosen = os.environ.get("QGALORE_KERNELS", "auto")
    if chosen == "auto":
        return device.type == "cuda" and _triton_is_installed()
    if chosen not in _IMPLEMENTATIONS:
        raise ValueError(f"QGALORE_KERNELS={chosen!r} is unknown: it must be one of {', '.join(_IMPLEMENTATIONS)}")
    return chosen == "triton"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_module(name: str) -> Any:
    """A Triton file of this package; they are imported where they are used, since Triton may be absent."""
    return importlib.import_module(f"qgalore.kernels.triton.{name}")


def triton_or_none(device: torch.device, name: str) -> Any:
    """The Triton file `name` where kernels run in Triton, else None."""
    return _triton_module(name) if use_triton(device) else None


def check_matrix(x: Tensor, name: str) -> None:
    """Raises ValueError for a tensor that is no matrix."""
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, not of shape {tuple(x.shape)}")
