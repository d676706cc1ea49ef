"""Adam's moments for one weight as whole tensors in an optimizer's state, in float32 or block-wise 8-bit.

The arithmetic and its sources are in `qgalore.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore import kernels

BLOCK_SIZE = 256
"""Values that share an absmax in an 8-bit state, as in bitsandbytes."""
MIN_8BIT_NUMEL = 4096
"""Smaller weights keep float32 moments, as in bitsandbytes: a norm's 8-bit states would save nothing."""
MOMENTS = ("exp_avg", "exp_avg_sq")
ROW_MOMENT = "exp_avg_sq_row"
"""A second moment of each row of a matrix, (rows,) float32, in the place of exp_avg_sq."""
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
_CODE_OF_ZERO = {"exp_avg": 127, "exp_avg_sq": 0}  # in the dynamic map


def make_tables(device: torch.device) -> None:
    """Make what reading and writing 8-bit moments keeps on the device, before memory that does not last is in use."""
    codes, absmax = torch.zeros(BLOCK_SIZE, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    for signed in _SIGNED.values():
        value = kernels.dequantize_blocks(codes, absmax, signed, BLOCK_SIZE)
        kernels.quantize_blocks_(codes, absmax, value, signed, BLOCK_SIZE)


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
            state[name] = torch.full(shape, _CODE_OF_ZERO[name], dtype=torch.uint8, device=device)
            state[f"{name}_absmax"] = torch.zeros(-(-shape.numel() // BLOCK_SIZE), device=device)
        else:
            state[name] = torch.zeros(shape, device=device)


def read_moment(state: dict[str, Tensor], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """exp_avg or exp_avg_sq in dtype; the state's own tensor where that is of this dtype."""
    codes = state[name]
    if f"{name}_absmax" not in state:
        return codes.to(dtype)
    return kernels.dequantize_blocks(codes, state[f"{name}_absmax"], _SIGNED[name], BLOCK_SIZE, dtype)


def write_moment(state: dict[str, Tensor], name: str, value: Tensor, skip: Tensor | None = None) -> None:
    """Replace exp_avg or exp_avg_sq in place by float values of the same shape, unless the flag `skip` is true."""
    moment = state[name]
    if f"{name}_absmax" in state:
        kernels.quantize_blocks_(moment, state[f"{name}_absmax"], value, _SIGNED[name], BLOCK_SIZE, skip)
    else:
        moment.copy_(value if skip is None else torch.where(skip, moment, value))


def row_parts(state: dict[str, Tensor], shape: torch.Size) -> list[tuple[int, int]]:
    """Ranges of rows that can be updated one after another: whole blocks of an 8-bit state; one range for a vector."""
    columns = shape[1:].numel()
    if len(shape) < 2 or ("exp_avg_absmax" in state and columns % BLOCK_SIZE):
        return [(0, shape[0])]
    return kernels.row_chunks(shape[0], columns)


def rows_of_state(state: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Views of the moments of rows start:stop, a range of `row_parts`."""
    moments = {name: kernels.at_least_1d(state[name]) for name in (*MOMENTS, ROW_MOMENT) if name in state}
    columns = moments["exp_avg"].shape[1:].numel()
    views = {name: kernels.rows_of(value, start, stop) for name, value in moments.items()}
    for name in moments:
        if (absmax := state.get(f"{name}_absmax")) is not None:
            first, last = start * columns // BLOCK_SIZE, -(-stop * columns // BLOCK_SIZE)
            views[f"{name}_absmax"] = kernels.rows_of(absmax, first, last)
    return views
