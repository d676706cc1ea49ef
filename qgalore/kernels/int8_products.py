"""The door to products in INT8: weights in 8 bits with one group a row, activations rounded as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore.kernels import reference
from qgalore.kernels.implementation import check_matrix, triton_or_none

_LONGEST_INT8_SUM = (2**31 - 1) // (127 * 128)


def int8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """x Wᵀ (tokens, width) in the dtype of x, multiplied in INT8; zeros beyond the weight's own outputs.

    x float (tokens, in or more), of which only the weight's columns are read: each row is rounded to the nearest of
    255 symmetric steps, |error| <= its largest magnitude / 254. W in 8 bits with one group a row: qdata uint8
    (out, in), scale and zero point (out, 1). Raises ValueError for other shapes.
    """
    return _int8_linear("int8_linear", x, qdata, scale, zero_point, width, backward=False)


def int8_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """grad W (tokens, width), the gradient of the input of `int8_linear`, in the dtype of grad; zeros beyond in.

    grad float (tokens, out or more). Each of its rows, times the scales of the weight's rows, is rounded to the nearest
    of 255 symmetric steps: not stochastically, so that a backward pass needs no seed. Rounding to nearest is biased for
    one value but not for values that spread over many steps; how a gradient's smallest values fare has to be seen in
    training. Raises ValueError for other shapes.
    """
    return _int8_linear("int8_linear_backward", grad, qdata, scale, zero_point, width, backward=True)


def _int8_linear(
    name: str, x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int, backward: bool
) -> Tensor:
    check_matrix(x, "grad" if backward else "x")
    check_matrix(qdata, "qdata")
    read, given = qdata.shape if backward else reversed(qdata.shape)
    if scale.shape != (qdata.shape[0], 1) or zero_point.shape != scale.shape:
        raise ValueError(
            f"scale and zero_point must be {(qdata.shape[0], 1)}, one group a row, not {tuple(scale.shape)}"
        )
    if x.shape[1] < read or width < given:
        raise ValueError(f"{tuple(x.shape)} -> {width} columns do not fit a weight of shape {tuple(qdata.shape)}")
    if read > _LONGEST_INT8_SUM:
        raise ValueError(f"a sum of {read} products in INT8 may overflow: at most {_LONGEST_INT8_SUM}")
    triton = triton_or_none(x.device, "int8_matmul")
    if triton is not None and triton.can_handle(*qdata.shape) and x.shape[0]:
        return getattr(triton, name)(x, qdata, scale, zero_point, width)  # type: ignore[no-any-return]
    value: Tensor = getattr(reference, name)(x[:, :read], qdata, scale, zero_point).to(x.dtype)
    return value if width == given else torch.nn.functional.pad(value, (0, width - given))
