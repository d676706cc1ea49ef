"""A tensor times a number that only the device knows, in place, in Triton.

PyTorch loads one value at a time where a float32 number of the device meets 16-bit values, which is far slower than
memory; here a thread moves several neighbours. The product is made in the wider of both dtypes and rounded once, as
PyTorch's, so the bits are the same.

values: contiguous, any float dtype. factor: one float32 or float64 value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div

_BLOCK = 2048


@triton.jit
def _scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(values + at, mask=at < count, other=0.0) * tl.load(factor)
    tl.store(values + at, scaled.to(values.dtype.element_ty), mask=at < count)


def scale_(values: Tensor, factor: Tensor) -> None:
    """See `peft_pretraining.models.ops.linear_cross_entropy.scale_`."""
    if values.numel():
        _scale_kernel[(ceil_div(values.numel(), _BLOCK),)](values, factor, values.numel(), BLOCK=_BLOCK)
