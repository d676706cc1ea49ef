"""Directions projected back to the size of a weight, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22


def project_back_rows(direction: Tensor, left: Tensor | None, right: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start:stop of leftᵀ N right, the full-size direction, float32; None stands for the identity."""
    if left is None:
        rows = direction[start:stop]
        return rows.float() if right is None else _product(rows, right)
    rows = _product(left[:, start:stop].T, direction)
    return rows if right is None else _product(rows, right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b summed in float32 and left so: of two bfloat16 matrices on a GPU's tensor cores, with the same products."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about 4 M elements, so that no float32 copy of a whole large matrix is made."""
    size = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
