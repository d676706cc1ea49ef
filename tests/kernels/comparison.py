"""What the checks of kernels against their reference have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(run: Callable[[], object]) -> Iterator[object]:
    """What `run` gives with the reference and with Triton."""
    before = os.environ.get("QGALORE_KERNELS")
    try:
        for implementation in ("reference", "triton"):
            os.environ["QGALORE_KERNELS"] = implementation
            yield run()
    finally:
        os.environ.pop("QGALORE_KERNELS", None)
        if before is not None:
            os.environ["QGALORE_KERNELS"] = before


def same(expected: object, found: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and expected.dtype == found.dtype and torch.equal(expected, found)
    assert isinstance(expected, tuple) and isinstance(found, tuple)
    return all(same(a, b) for a, b in zip(expected, found, strict=True))


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: their products and sums are exact in float32 whatever the order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def operand_types(device: torch.device) -> tuple[torch.dtype, ...]:
    # The interpreter multiplies the bit patterns of bfloat16.
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
