"""Directions projected back and added to quantized weights, in plain PyTorch, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import QuantizedMatrix, QuantizedUpdate, StepScalars
from qgalore.kernels.reference.group_quantization import dequantize, quantize_chunk
from qgalore.kernels.reference.rows import decayed, project_back, row_chunks, undone_if

__all__ = ["update_quantized_"]


def update_quantized_(updates: Sequence[QuantizedUpdate], skip: Tensor | None) -> None:
    """See `qgalore.kernels.update_quantized_`."""
    for update in updates:
        _update_(update, skip)


def _update_(update: QuantizedUpdate, skip: Tensor | None) -> None:
    columns, bits, group_size = update.columns, update.bits, update.group_size
    seed, step_size, *_ = scalars = StepScalars.unpack(update.row)
    if scalars.changes_nothing:
        return
    for start, stop in row_chunks(len(update.qdata), columns):
        qdata, scale, zero_point = (tensor[start:stop] for tensor in update[:3])
        full = project_back(update.direction, update.left, update.right, start, stop)
        with undone_if(skip, qdata, scale, zero_point):
            stored = QuantizedMatrix(qdata, scale, zero_point, columns, bits, group_size)
            weight = decayed(dequantize([stored], torch.float32)[0], full, scalars).sub_(full * step_size)
            rounding = seed if update.stochastic else None
            codes, scale[:], zero_point[:] = quantize_chunk(weight, bits, group_size, rounding, start)
            qdata[:, : codes.shape[1]] = codes
