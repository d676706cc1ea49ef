"""Products in FP8 in plain PyTorch.

Each row of both factors is scaled so that its largest magnitude is that of the format, 448, and rounded to e4m3: to the
nearest of its values, ties to even, of which a quarter of a power of two holds two. A product of two such matrices is
summed in float32 and multiplied with the scales of its row and its column. A weight is read as it is stored; the bound
of a row, which the scales and zero points of its groups give, stands for its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qgalore.kernels.arguments import Fp8Matrix, QuantizedMatrix, fp8_width
from qgalore.kernels.reference.group_quantization import dequantize_groups, unpack_int4

__all__ = ["fp8_columns", "fp8_product", "fp8_rows", "fp8_turned_weights", "fp8_weight"]

_LARGEST = 448.0
_SMALLEST_ROW = 2.0**-110  # 448 over a smaller number, or a smaller number over 448, may leave float32


def fp8_rows(parts: Sequence[Tensor], columns: Sequence[int], factors: Sequence[Tensor] | None) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_rows`."""
    read = []
    for index, (part, count) in enumerate(zip(parts, columns, strict=True)):
        values = part[:, :count].float()
        values = values if factors is None else values * factors[index][:count]
        read.append(F.pad(values, (0, fp8_width(count) - count)))
    whole = torch.cat(read, dim=1)
    return _rounded(whole, whole.abs().amax(dim=1) if whole.shape[1] else whole.sum(dim=1))


def fp8_weight(weight: QuantizedMatrix | Tensor) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_weight`."""
    if isinstance(weight, Tensor):
        matrix = fp8_rows([weight], [weight.shape[1]], None)
    else:
        stored = unpack_int4(weight.qdata, weight.columns) if weight.bits == 4 else weight.qdata[:, : weight.columns]
        values = dequantize_groups(stored, weight.scale, weight.zero_point, weight.group_size, torch.float32)
        first, step = weight.zero_point.float(), weight.scale.float()
        last = step * (2.0**weight.bits - 1) + first
        matrix = _rounded(values, torch.maximum(first.abs(), last.abs()).amax(dim=1))
    return with_padded_rows(matrix)


def fp8_turned_weights(weights: Sequence[QuantizedMatrix | Tensor]) -> tuple[Fp8Matrix, list[Tensor]]:
    """See `qgalore.kernels.fp8_turned_weights`."""
    return turned([fp8_weight(weight) for weight in weights])


def with_padded_rows(matrix: Fp8Matrix) -> Fp8Matrix:
    """A factor with rows of zeros up to a multiple of 16; itself where it has so many."""
    codes, scale = matrix
    missing = fp8_width(len(codes)) - len(codes)
    if not missing:
        return matrix
    return Fp8Matrix(F.pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(codes.dtype), F.pad(scale, (0, missing)))


def turned(matrices: Sequence[Fp8Matrix]) -> tuple[Fp8Matrix, list[Tensor]]:
    """What `fp8_turned_weights` gives of weights that are in FP8 already, one below the other and turned."""
    codes = torch.cat([matrix.codes.view(torch.uint8) for matrix in matrices]).T.contiguous()
    scales = [matrix.scale for matrix in matrices]
    return Fp8Matrix(codes.view(torch.float8_e4m3fn), scales[0].new_ones(len(codes))), scales


def fp8_columns(x: Tensor, columns: int) -> Fp8Matrix:
    """See `qgalore.kernels.fp8_columns`."""
    values = F.pad(x[:, :columns].float().T, (0, 0, 0, fp8_width(columns) - columns))
    return _rounded(values, values.abs().amax(dim=1) if len(x) else values.sum(dim=1))


def fp8_product(a: Fp8Matrix, b: Fp8Matrix, width: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """See `qgalore.kernels.fp8_product`."""
    with torch.autocast(a.codes.device.type, enabled=False):
        value = (a.codes.float() @ b.codes.float().T).mul_(a.scale[:, None]).mul_(b.scale)
    return with_columns(value.to(torch.bfloat16), width).to(dtype)


def with_columns(x: Tensor, width: int) -> Tensor:
    """x (rows, n) itself, cut or with zeros at the end, of so many columns."""
    if width <= x.shape[1]:
        return x if width == x.shape[1] else x[:, :width].contiguous()
    return F.pad(x, (0, width - x.shape[1]))


def _rounded(values: Tensor, largest: Tensor) -> Fp8Matrix:
    """The matrix values (rows, columns) float32 in FP8, with the largest magnitude, or a bound of it, of each row."""
    # A tensor of 448, since PyTorch divides a number by a tensor in two steps.
    inverse = torch.where(largest >= _SMALLEST_ROW, torch.full_like(largest, _LARGEST) / largest, 0.0)
    scale = torch.where(largest < _SMALLEST_ROW, 0.0, largest * (1.0 / _LARGEST))
    codes = (values * inverse[:, None]).clamp_(-_LARGEST, _LARGEST)  # by a last bit a product may be above
    codes = F.pad(codes, (0, fp8_width(values.shape[1]) - values.shape[1]))
    return Fp8Matrix(codes.to(torch.float8_e4m3fn), scale)
