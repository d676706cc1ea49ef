"""A gradient summed over micro-batches, in float32, bfloat16 or 8 bits a value."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.quantization import QuantizedTensor, quantize

Gradient = Tensor | QuantizedTensor
"""A gradient in a float dtype, or a sum of gradients in INT8."""

GROUP_SIZE = 256
"""Values that share a scale and a zero point in an INT8 sum."""


def dense(gradient: Gradient) -> Tensor:
    """The gradient in a float dtype."""
    return gradient if isinstance(gradient, Tensor) else gradient.dequantize()


def rows_of_gradient(gradient: Gradient, start: int, stop: int) -> Tensor:
    """Rows start:stop of a gradient, in a float dtype."""
    if isinstance(gradient, QuantizedTensor):
        return gradient.rows(start, stop).dequantize()
    return kernels.rows_of(gradient, start, stop)


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Gradient:
    """A sum of nothing; int8 matrices in groups, what `_is_packed` is not in float32."""
    if not _is_packed(shape, dtype):
        return torch.zeros(shape, dtype=torch.float32 if dtype == torch.int8 else dtype, device=device)
    return quantize(torch.zeros(shape, device=device), bits=8, group_size=GROUP_SIZE)


def _is_packed(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a sum is stored as codes; vectors, what has more dimensions and what has no values are not."""
    return dtype == torch.int8 and len(shape) == 2 and shape.numel() > 0


class GradientSum:
    """The running sum of one gradient matrix or vector; empty until the first `add` of an update."""

    def __init__(self, dtype: torch.dtype = torch.float32, out: Gradient | None = None) -> None:
        """dtype: float32, bfloat16, or int8 for group-quantized sums with stochastic (unbiased) rounding.

        The sum is made in `out` (from `zeros`), if there is one: CUDA graphs need it at one address.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(f"a gradient accumulates in float32, bfloat16 or int8, not in {dtype}")
        self.dtype, self.out = dtype, out
        self._sum: Gradient | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last `take`."""
        return self._sum is None

    def begin(self) -> None:
        """Start from zero in `out`."""
        out = self.out
        assert out is not None
        for part in (out,) if isinstance(out, Tensor) else (out.qdata, out.scale, out.zero_point):
            part.zero_()
        self._sum = out

    def add(self, grad: Tensor, row: Tensor, first_row: int = 0) -> None:
        """Add a gradient; without an `out`, a first one is kept as it is, without a copy.

        row: a step row of step size -1, for the rounding at int8, in which a first gradient has the rows from first_row
        on of the one that the seed belongs to.
        """
        if self._sum is None and self.out is not None:
            self.begin()
        if isinstance(self._sum, QuantizedTensor):
            q = self._sum
            stored = (q.qdata, q.scale, q.zero_point)
            added = kernels.QuantizedUpdate(*stored, grad, None, None, q.columns, q.bits, q.group_size, row)
            kernels.update_quantized_([added])
        elif self._sum is not None and self._sum is self.out:
            self._sum.add_(grad)
        elif self._sum is not None:
            self._sum = self._sum.to(torch.float32 if self.dtype == torch.int8 else self.dtype).add_(grad)
        else:
            packed = _is_packed(grad.shape, self.dtype)
            self._sum = quantize(grad, 8, GROUP_SIZE, row, first_row) if packed else grad

    def own(self, value: Tensor) -> Tensor:
        """A gradient as a sum that begins with it may keep it: in the sum's dtype, of memory that is its own."""
        if _is_packed(value.shape, self.dtype):
            return value  # of which codes are made
        return value.to(torch.float32 if self.dtype == torch.int8 else self.dtype, copy=True)

    def check_(self, squared_norms: Tensor, index: int, skip: Tensor) -> None:
        """`kernels.check_gradients_` of an INT8 sum, which is never whole in float32."""
        total = self.stored
        assert isinstance(total, QuantizedTensor)
        chunks = kernels.row_chunks(*total.shape)
        norms = squared_norms.new_zeros(len(chunks))
        for number, (start, stop) in enumerate(chunks):
            kernels.check_gradients_([total.rows(start, stop).dequantize()], norms, [number], skip)
        squared_norms[index] = norms.sum()

    @property
    def stored(self) -> Gradient:
        """The sum as it is stored."""
        assert self._sum is not None
        return self._sum

    def replace(self, value: Tensor, row: Tensor, first_row: int = 0) -> None:
        """Forget the sum and keep `value` instead, in the sum's dtype; row, first_row as in `add`."""
        value = value.to(self.dtype) if self.dtype == torch.bfloat16 else value
        if isinstance(self.out, Tensor):
            # Which the value may be a view of.
            self._sum = self.out.copy_(value) if self.out.dtype == value.dtype else value
            return
        self._sum = None
        self.add(value, row, first_row)

    def take(self) -> Tensor:
        """The sum, in float32 or the dtype of a gradient that came alone; it is empty afterwards."""
        return dense(self.take_stored())

    def take_to_send(self) -> Tensor:
        """The sum as it goes to other ranks, which is empty afterwards: of one in INT8 in bfloat16.

        The largest of 256 values of both signs may be rounded by half a step of their codes; the root mean square of
        what that changes is a quarter of what the rounding to INT8 does, of values that are distributed normally.
        """
        stored = self.take_stored()
        if self.dtype != torch.int8:
            return dense(stored)
        return stored.to(torch.bfloat16) if isinstance(stored, Tensor) else stored.dequantize(torch.bfloat16)

    def take_stored(self) -> Gradient:
        """The sum as it is stored, which is empty afterwards."""
        stored, self._sum = self.stored, None
        return stored

    def clear(self) -> None:
        """Forget the sum."""
        self._sum = None
