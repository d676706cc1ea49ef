"""Group quantization: one value type for weights and projections in 8 or 4 bits.

The format and its bounds are described in `qgalore.kernels.reference`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qgalore import kernels
from qgalore.layer.layout import new_stack

_ALIGNMENT = 16


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row's codes."""
    return -(-columns * bits // 8)


def aligned_row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of which the next one begins at a multiple of 16 bytes, so that kernels move 16 codes at once."""
    return -(-row_bytes(columns, bits) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class QuantizedTensor:
    """A float matrix held as codes with a scale and a zero point for each group of a row."""

    qdata: Tensor
    """uint8, (rows, columns) at 8 bits, (rows, ceil(columns / 2)) at 4; or more, with zeros at the end of each row."""
    scale: Tensor
    """bfloat16, (rows, ceil(columns / group_size))."""
    zero_point: Tensor
    """bfloat16, like scale: the value of code 0."""
    columns: int
    """Columns of the matrix."""
    bits: int
    """8 or 4."""
    group_size: int
    """Values of a row that share a scale."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.qdata.shape[0], self.columns

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """A view of rows start:stop."""
        parts = (self.qdata[start:stop], self.scale[start:stop], self.zero_point[start:stop])
        return QuantizedTensor(*parts, self.columns, self.bits, self.group_size)

    @property
    def row_padding(self) -> int:
        """Bytes at the end of a row that hold no codes."""
        return self.qdata.shape[1] - row_bytes(self.columns, self.bits)

    def with_aligned_rows(self) -> QuantizedTensor:
        """The same matrix in rows of `aligned_row_bytes`; itself where it has such."""
        missing = aligned_row_bytes(self.columns, self.bits) - self.qdata.shape[1]
        return dataclasses.replace(self, qdata=F.pad(self.qdata, (0, missing))) if missing else self

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.qdata, self.scale, self.zero_point))

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The matrix (rows, columns) in `dtype`, in `out` where that is given, with zeros where that is larger."""
        return kernels.dequantize([self.stored(out)], dtype)[0]

    def stored(self, out: Tensor | None = None) -> kernels.QuantizedMatrix:
        """As an argument of `qgalore.kernels.dequantize`, which writes to `out` where that is given."""
        return kernels.QuantizedMatrix(
            self.qdata, self.scale, self.zero_point, self.columns, self.bits, self.group_size, out
        )


def quantize(
    x: Tensor, bits: int = 8, group_size: int = 256, row: Tensor | None = None, row_start: int = 0
) -> QuantizedTensor:
    """Quantize a float matrix to `bits` in groups of `group_size` along its rows.

    Without a step row to the nearest code: |dequantized - x| <= scale / 2. With one (`qgalore.kernels.StepScalars`)
    stochastically: unbiased, |dequantized - x| < scale, the same bits for the same seed on every device, of rows
    row_start: as when the whole matrix is quantized. On the meta device the result has shapes alone.
    """
    if x.is_meta:
        scale = x.new_empty(x.shape[0], -(-x.shape[1] // group_size), dtype=torch.bfloat16)
        qdata = x.new_empty(x.shape[0], row_bytes(x.shape[1], bits), dtype=torch.uint8)
        return QuantizedTensor(qdata, scale, scale.new_empty(scale.shape), x.shape[1], bits, group_size)
    qdata, scale, zero_point = kernels.quantize(x, bits, group_size, row, row_start)
    return QuantizedTensor(qdata, scale, zero_point, x.shape[1], bits, group_size)


def grouped_dequantize(
    matrices: Sequence[QuantizedTensor], dtype: torch.dtype, shapes: Sequence[tuple[int, int]] | None = None
) -> list[Tensor]:
    """`QuantizedTensor.dequantize` of a group of matrices, on a GPU one launch for those that are stored alike.

    The results lie one behind the other (`qgalore.layer.layout`). shapes: of the results, where zeros are to follow.
    """
    if not matrices:
        return []
    outs = new_stack(matrices[0].scale, [m.shape for m in matrices] if shapes is None else shapes, dtype)
    return kernels.dequantize([m.stored(out) for m, out in zip(matrices, outs, strict=True)], dtype)
