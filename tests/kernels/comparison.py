"""What the tests of kernels against their reference have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update import moments


def each(name: str, values: Iterable[object]) -> pytest.MarkDecorator:
    """A parameter of a test, whose values are read in the ids of the cases: `5x512x256`, `bfloat16`, `bits8`."""

    def named(value: object) -> str:
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else f"{name}{value}"

    return pytest.mark.parametrize(name, list(values), ids=named)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def both(run: Callable[[], object]) -> Iterator[Any]:
    """What `run` gives with the reference and with Triton."""
    for implementation in ("reference", "triton"):
        with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
            found = run()
        yield found


def agreed(run: Callable[[], object]) -> Any:
    """What `run` gives with Triton, which must be what the reference gives, to the bit."""
    expected, found = both(run)
    assert same(expected, found)
    return found


def same(expected: object, found: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and expected.dtype == found.dtype and torch.equal(expected, found)
    assert isinstance(expected, tuple) and isinstance(found, tuple)
    return all(same(a, b) for a, b in zip(expected, found, strict=True))


def copied(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: their products and sums are exact in float32 whatever the order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed), device="cpu").float()


WIDE_TILES = ((16, 32, 32, 4, 3), (16, 32, 32, 4, 3), (16, 64, 32, 4, 3))
"""Of gram, square and apply: wider than high, so that they reach over the diagonal."""


def use_tiles(
    monkeypatch: pytest.MonkeyPatch, module: Any, tiles: Sequence[Sequence[int]], whole: bool = False
) -> None:
    """For all matrices of Newton-Schulz; whole: through descriptors, of every dtype, where rows allow it."""
    matrix_groups = import_module("qgalore.kernels.triton.matrix_groups")
    table = {1 << 30: matrix_groups.Tiles(*[matrix_groups.Tile(*tile) for tile in tiles], whole=whole)}
    monkeypatch.setattr(module, "WHOLE_TILES" if whole else "TILES", table)
    monkeypatch.setattr(matrix_groups, "takes_descriptors", lambda dtype, device: whole)


# The interpreter multiplies the bit patterns of bfloat16.
OPERAND_TYPES = (torch.float16, torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,)


def step_row(
    step_size: float = 1.0, decay: float = 1.0, seed: int | None = 0, step: int = 1,
    betas: tuple[float, float] = (0.9, 0.99), device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The step row of an update with these numbers."""
    corrections = [1.0 / (1.0 - beta**step) for beta in betas]
    return kernels.StepScalars(seed or 0, step_size, decay, *corrections).row(device)


def update_quantized_(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, direction: Tensor, left: Tensor | None, right: Tensor | None,
    columns: int, bits: int, group_size: int, step_size: float, decay: float, seed: int | None,
    skip: Tensor | None = None,
) -> None:  # fmt: skip
    """`kernels.update_quantized_` of one weight; nearest rounding without a seed."""
    row = step_row(step_size, decay, seed, device=qdata.device)
    stored = (qdata, scale, zero_point, direction, left, right, columns, bits, group_size)
    kernels.update_quantized_([kernels.QuantizedUpdate(*stored, row, seed is not None)], skip)


def updated(stored: tuple[Tensor, ...], *how: Any) -> tuple[Tensor, ...]:
    """Codes, scale and zero point after `update_quantized_` of a copy."""
    weight = copied(stored)
    update_quantized_(*weight, *how)
    return weight


def update_float_(
    weight: Tensor, direction: Tensor, left: Tensor | None, right: Tensor | None, step_size: float, decay: float,
    seed: int | None, row_start: int = 0, skip: Tensor | None = None,
) -> None:  # fmt: skip
    """`kernels.update_float_` with these numbers; nearest rounding without a seed."""
    row = step_row(step_size, decay, seed, device=weight.device)
    update = kernels.FloatUpdate(weight, direction, left, right, row, seed is not None, row_start)
    kernels.update_float_([update], skip)


def adam_step(
    state: dict[str, Tensor], grad: Tensor, step: int, betas: tuple[float, float], eps: float,
    factor: Tensor | None = None, skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.adam_steps` of one state, with the bias corrections of a step, which counts from 1."""
    row = step_row(step=step, betas=betas, device=grad.device)
    read: list[Any] = [state.get(key) for name in moments.MOMENTS for key in (name, f"{name}_absmax")]
    return kernels.adam_steps([kernels.AdamStep(grad, *read, row, betas, eps, factor)], moments.BLOCK_SIZE, skip)[0]


def quantize(x: Tensor, bits: int, group_size: int, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.quantize`, stochastic with a seed."""
    return kernels.quantize(x, bits, group_size, None if seed is None else step_row(seed=seed, device=x.device))


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, columns: int, bits: int, group_size: int,
    dtype: torch.dtype = torch.float32, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.dequantize` of one matrix."""
    stored = kernels.QuantizedMatrix(qdata, scale, zero_point, columns, bits, group_size, out)
    return kernels.dequantize([stored], dtype)[0]
