"""Updates of some rows of a matrix at a time, so that no float32 copy of a whole large one is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from qgalore.kernels.arguments import StepNumbers, StepScalars

_CHUNK_ELEMENTS = 1 << 22


def at_least_1d(x: Tensor) -> Tensor:
    """As `torch.atleast_1d` of one tensor, which takes longer on the host than many a launch."""
    return x if x.dim() else x.view(1)


def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
    """A view of rows start:stop of a tensor; the tensor itself where these are all, which takes no time on the host."""
    x = at_least_1d(x)
    return x if start == 0 and stop >= x.shape[0] else x[start:stop]


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about 4 M elements."""
    size = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def decayed(weight: Tensor, direction: Tensor, scalars: StepScalars) -> Tensor:
    """The weight, float32, after its decay, before the direction is subtracted."""
    growing = scalars.decay_of_growing
    if growing is None or growing == scalars.decay:
        return weight * scalars.decay
    return weight * torch.where(weight * direction >= 0, scalars.decay, growing)


def stepped(weight: Tensor, direction: Tensor, row: Tensor) -> Tensor:
    """decay * W - step_size * N by a step row, of float32 tensors, in a new one.

    The scalars are read where the row lies: nothing waits for its device.
    """
    numbers = StepNumbers.of(row)
    decay = torch.where(weight * direction >= 0, numbers.decay, numbers.decay_of_growing)
    return decay.mul_(weight).sub_(direction * numbers.step_size)


def project_back(
    direction: Tensor, left: Tensor | None, right: Tensor | None, start: int = 0, stop: int | None = None
) -> Tensor:
    """leftᵀ N right or its rows start:stop, float32; a basis that is None stands for the identity."""
    if left is None:
        rows = direction[start:stop]
        return rows.float() if right is None else _product(rows, right)
    rows = _product(left[:, start:stop].T, direction)
    return rows if right is None else _product(rows, right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b summed in float32 and left so: of two 16-bit matrices on a GPU's tensor cores, with the same products."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@contextlib.contextmanager
def undone_if(skip: Tensor | None, *tensors: Tensor | None) -> Iterator[None]:
    """Let the body write to tensors, and undo it on the device where the flag is true."""
    if skip is None:
        yield
        return
    before = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]
    yield
    for tensor, copy in before:
        tensor.copy_(torch.where(skip, copy, tensor))
