"""Adam's moments for one weight, in float32 or block-wise 8-bit, as tensors in an optimizer's state.

The arithmetic and its sources are in `qgalore.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.accumulator import Gradient, dense

BLOCK_SIZE = 256
"""Values that share an absmax in an 8-bit state, as in bitsandbytes."""
MIN_8BIT_NUMEL = 4096
"""Smaller weights keep float32 moments, as in bitsandbytes: a norm's 8-bit states would save nothing."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
MOMENT_PART = 1 << 20
"""Values of an 8-bit moment that are read or written at a time."""


class GradientStep(NamedTuple):
    """A gradient that is to move the moments of one weight; arguments as in `adam_step`."""

    state: dict[str, Tensor]
    grad: Gradient
    step: int
    betas: tuple[float, float]
    eps: float
    factor: Tensor | None = None
    dtype: torch.dtype = torch.float32
    numbers: Tensor | None = None


def make_tables(device: torch.device) -> None:
    """Make what reading and writing 8-bit moments keeps on the device, before memory that does not last is in use."""
    for signed in _SIGNED.values():
        kernels.quantize_blocks(torch.zeros(1, device=device), signed, BLOCK_SIZE)


def init_moments(
    state: dict[str, Tensor],
    shape: torch.Size,
    bits: int,
    device: torch.device,
    names: tuple[str, ...] = MOMENTS,
) -> None:
    """Put zero moments for a gradient of `shape` into `state`: those named and, at 8 bits, their absmax."""
    for name in names:
        if bits == 8 and shape.numel() >= MIN_8BIT_NUMEL:
            zero = int(kernels.quantize_blocks(torch.zeros(1), _SIGNED[name], BLOCK_SIZE)[0])
            state[name] = torch.full(shape, zero, dtype=torch.uint8, device=device)
            state[f"{name}_absmax"] = torch.zeros(-(-shape.numel() // BLOCK_SIZE), device=device)
        else:
            state[name] = torch.zeros(shape, device=device)


def read_moment(state: dict[str, Tensor], name: str) -> Tensor:
    """exp_avg or exp_avg_sq in float32; the state's own tensor where that is float32."""
    codes = state[name]
    if f"{name}_absmax" not in state:
        return codes
    value = torch.empty(codes.shape, device=codes.device)
    for part, part_codes, absmax in _flat_parts(value, codes, state[f"{name}_absmax"]):
        part.copy_(kernels.dequantize_blocks(part_codes, absmax, _SIGNED[name], BLOCK_SIZE))
    return value


def write_moment(state: dict[str, Tensor], name: str, value: Tensor, skip: Tensor | None = None) -> None:
    """Replace exp_avg or exp_avg_sq in place by float values of the same shape, unless the flag `skip` is true."""

    def write(place: Tensor, new: Tensor) -> None:
        place.copy_(new if skip is None else torch.where(skip, place, new))

    if f"{name}_absmax" not in state:
        write(state[name], value)
        return
    for part, codes, absmax in _flat_parts(value.contiguous(), state[name], state[f"{name}_absmax"]):
        new_codes, new_absmax = kernels.quantize_blocks(part.float(), _SIGNED[name], BLOCK_SIZE)
        write(codes, new_codes)
        write(absmax, new_absmax)


def _flat_parts(value: Tensor, codes: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flat views of float32 values, their codes and absmax, in parts of whole blocks: a part's copies are small."""
    parts = (tensor.view(-1).split(MOMENT_PART) for tensor in (value, codes))
    return zip(*parts, absmax.split(MOMENT_PART // BLOCK_SIZE), strict=True)


def row_parts(state: dict[str, Tensor], shape: torch.Size) -> list[tuple[int, int]]:
    """Ranges of rows that can be updated one after another: whole blocks of an 8-bit state; one range for a vector."""
    columns = shape[1:].numel()
    if len(shape) < 2 or ("exp_avg_absmax" in state and columns % BLOCK_SIZE):
        return [(0, shape[0])]
    return kernels.row_chunks(shape[0], columns)


def rows_of(state: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Views of the moments of rows start:stop, a range of `row_parts`."""
    moments = {name: torch.atleast_1d(state[name]) for name in MOMENTS}
    columns = moments["exp_avg"].shape[1:].numel()
    views = {name: value[start:stop] for name, value in moments.items()}
    for name in moments:
        if f"{name}_absmax" in state:
            views[f"{name}_absmax"] = state[f"{name}_absmax"][
                start * columns // BLOCK_SIZE : -(-stop * columns // BLOCK_SIZE)
            ]
    return views


def adam_step(
    state: dict[str, Tensor],
    grad: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    numbers: Tensor | None = None,
) -> Tensor:
    """The direction N = m_hat / (sqrt(v_hat) + eps) like grad, in dtype, after moving the moments in place.

    The gradient is factor * grad; step counts from 1. Where the flag `skip` is true the moments stay as they are.
    `numbers` as in `qgalore.kernels.adam_step`.
    """
    return adam_steps([GradientStep(state, grad, step, betas, eps, factor, dtype, numbers)], skip)[0]


def adam_steps(steps: Sequence[GradientStep], skip: Tensor | None = None) -> list[Tensor]:
    """`adam_step` of several weights at once."""
    arguments = []
    for state, grad, step, betas, eps, factor, dtype, numbers in steps:
        moments = (state[name] for name in MOMENTS), (state.get(f"{name}_absmax") for name in MOMENTS)
        (first, second), (first_absmax, second_absmax) = moments
        rates = (step, betas, eps, factor, dtype, numbers)
        arguments.append(kernels.AdamStep(dense(grad), first, first_absmax, second, second_absmax, *rates))
    return kernels.adam_steps(arguments, BLOCK_SIZE, skip)
