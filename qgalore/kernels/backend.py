"""Which implementation of an operation runs: `QGALORE_KERNELS`, the device and the sizes decide.

`reference` is plain PyTorch, on any device; `triton` the Triton kernels (on the CPU only with `TRITON_INTERPRET=1`, for
tests); `auto`, the default, Triton on CUDA where it is installed. Both give the same bits for everything that is
stored.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from qgalore.kernels.arguments import QuantizedMatrix, QuantizedUpdate

_IMPLEMENTATIONS = ("auto", "reference", "triton")
Operation = TypeVar("Operation", bound=Callable[..., object])


def use_triton(device: torch.device) -> bool:
    """Whether kernels run in Triton on this device; raises ValueError for an unknown `QGALORE_KERNELS`."""
    chosen = os.environ.get("QGALORE_KERNELS", "auto")
    if chosen == "auto":
        return device.type == "cuda" and _triton_is_installed()
    if chosen not in _IMPLEMENTATIONS:
        raise ValueError(f"QGALORE_KERNELS={chosen!r} is unknown: it must be one of {', '.join(_IMPLEMENTATIONS)}")
    return chosen == "triton"


@functools.cache
def product_dtype(device: torch.device) -> torch.dtype:
    """What products are made of whose factors are no activations: bfloat16 on a GPU that has it, float32 elsewhere.

    Not of float16, whatever the model's: momenta are small, and nothing scales them.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float32


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_file(reference_file: str) -> Any:
    """The file of the same stem; they are imported where they are used, since Triton may be absent."""
    return importlib.import_module(reference_file.replace(".reference.", ".triton."))


def backend(operation: Operation, device: torch.device, *sizes: int | Sequence[int]) -> Operation:
    """An operation of `reference`, or that of the same stem and name in Triton where that runs and takes such sizes.

    What sizes it takes, if not all, the function `can_handle` of its file says.
    """
    if not use_triton(device):
        return operation
    triton = _triton_file(operation.__module__)
    if sizes and not triton.can_handle(*sizes):
        return operation
    found: Operation = getattr(triton, operation.__name__)
    return found


def grouped_by_backend(
    operation: Operation, matrices: Sequence[QuantizedMatrix | QuantizedUpdate]
) -> list[tuple[Operation, list[int]]]:
    """`backend` for matrices that may lie in groups of different sizes: each operation and the indices of its own."""
    by_size: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_size.setdefault(matrix.group_size, []).append(index)
    chosen: dict[Operation, list[int]] = {}
    for group_size, indices in by_size.items():
        chosen.setdefault(backend(operation, matrices[0].qdata.device, group_size), []).extend(indices)
    return [(run, sorted(indices)) for run, indices in chosen.items()]
