"""The linear layer whose weight is trained through low-rank gradients, over a float or a quantized weight.

The weight is plain state of a module: an integer parameter with its scales and zero points as buffers (or a float
parameter), so `deepcopy`, `.to()`, safetensors and data parallelism need nothing special; a tensor subclass failed at
the last two (docs/log has the trial). Rows of codes end with zeros where kernels want longer ones, and a state dict
has them without, under names of their own: `weight_qdata`, `weight_scale`, `weight_zero_point`, `weight_format`.

In training it is an operator whose backward pass gives the factors of the weight's gradient to a tap, which the
optimizer hangs on the layer when it is attached to the model (`qgalore.layer.autograd_op`). The operator takes several
layers with the same input, such as those of queries, keys and values: `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgalore import kernels
from qgalore.config import WeightFormat
from qgalore.layer import autograd_op
from qgalore.layer.codes import Codes
from qgalore.layer.codes_state_dict import CODES, FORMAT, WEIGHT, add_refusal, entries_for
from qgalore.layer.gradient_sink import GradientTap
from qgalore.layer.layout import cut_columns, joined, padded_width, with_padded_columns
from qgalore.layer.quantization import QuantizedTensor, grouped_dequantize, quantize

JOINED_WEIGHT_BYTES = 32 << 20
"""Weights that take no more together are one factor where their outputs' gradients are; larger ones would take memory,
and a product with one of them takes so long that there is nothing to gain."""


class LowRankLinear(nn.Module):
    """`nn.Linear` with a weight in `format` and a tap for its gradient; made by `LowRankLinear.from_linear`."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, format: WeightFormat) -> None:
        """weight: float, (out_features, in_features), stored as `format` says."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.group_size = format, format.group_size_of(weight.shape[1])
        self.bias: nn.Parameter | None
        self.weight_scale: Tensor | None
        self.weight_zero_point: Tensor | None
        self.register_parameter("bias", bias)
        if format.bits is None or format.simulate:
            self.weight = nn.Parameter(weight.detach().contiguous())
            self.register_buffer("weight_scale", None)
            self.register_buffer("weight_zero_point", None)
            if format.simulate:
                self.weight.data.copy_(self._to_grid(weight.detach(), None))
        else:
            quantized = quantize(weight.detach(), format.bits, self.group_size).with_aligned_rows()
            self.weight = Codes(quantized.qdata)
            self.register_buffer("weight_scale", quantized.scale)
            self.register_buffer("weight_zero_point", quantized.zero_point)
        self.tap: GradientTap | None = None
        self.anchor: Tensor | None = None
        self.checks_version = True
        """Let autograd refuse a backward pass through a weight that was updated in between; CUDA graphs need it off."""
        self.frees_input = False
        """Let the input be freed before its gradient is made; where a compiler computes it again, it would otherwise
        make it together with what follows that gradient, which takes less time and more memory."""
        self.pads_output = False
        """Give (..., padded_width(out_features)), with zeros at the end: for a following layer that takes it so."""
        self.held_weight: Tensor | None = None
        """What `padded_weight` gives in one dtype, made ahead by `qgalore.graphs.dequant_cache`."""
        self._register()

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: WeightFormat) -> LowRankLinear:
        """The same layer with its weight in `format`, frozen where it was; the bias is shared."""
        layer = cls(linear.weight, linear.bias, format)
        layer.weight.requires_grad_(linear.weight.requires_grad)
        layer.train(linear.training)
        return layer

    def _register(self) -> None:
        self.number = autograd_op.new_number(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another layer: it has its own number and no optimizer.
        return self.__dict__ | {"tap": None, "anchor": None, "number": None, "held_weight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        frozen = self.frozen
        super()._apply(lambda tensor: fn(tensor.data if isinstance(tensor, Codes) else tensor), recurse)
        self._mark(frozen)  # a parameter that could not stay the same, as on its way to the meta device, is a new one
        return self

    def _mark(self, frozen: bool) -> None:
        """Make integers that torch has put in the place of the weight `Codes` again."""
        if not self.weight.is_floating_point() and not isinstance(self.weight, Codes):
            self.weight = Codes(self.weight.data).requires_grad_(not frozen)

    @property
    def _row_padding(self) -> int:
        return 0 if self.quantized_weight is None else self.quantized_weight.row_padding

    @property
    def weight_qdata(self) -> Tensor | None:
        """The codes (out_features, bytes of a row) as a state dict has them; None where the weight is float."""
        if self.quantized_weight is None:
            return None
        return self.weight[:, : -self._row_padding].contiguous() if self._row_padding else self.weight

    @property
    def weight_format(self) -> Tensor | None:
        """Bits and group size of the codes, (2,), as a state dict has them; None where the weight is float."""
        if self.quantized_weight is None:
            return None
        return torch.tensor([self.format.bits, self.group_size], device=self.weight.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_qdata is not None:
            del destination[f"{prefix}{WEIGHT}"]
            destination[f"{prefix}{CODES}"] = self.weight_qdata if keep_vars else self.weight_qdata.detach()
            destination[f"{prefix}{FORMAT}"] = self.weight_format

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, bits = f"{prefix}{WEIGHT}", self.format.stored_bits
        entries = entries_for(state_dict, prefix, bits, self.group_size, self.in_features)
        if isinstance(entries, str):
            add_refusal(error_msgs, entries)
            return
        if self._row_padding and key in entries:  # of another width than it should be, it is refused
            entries[key] = F.pad(entries[key], (0, self._row_padding))
        frozen, missing = self.frozen, list[str]()
        super()._load_from_state_dict(entries, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        codes = f"{prefix}{CODES}" if self.quantized_weight is not None else key
        missing_keys += [codes if name == key else name for name in missing]
        self._mark(frozen)

    @property
    def frozen(self) -> bool:
        """Whether the weight is not to be trained; `requires_grad_` of the layer, or of a module above it, sets it."""
        if isinstance(self.weight, Codes):
            return self.weight.frozen
        return self.weight.is_floating_point() and not self.weight.requires_grad

    @property
    def quantized_weight(self) -> QuantizedTensor | None:
        """A view of the quantized weight; None where the weight is float."""
        if self.weight_scale is None or self.weight_zero_point is None:
            return None
        assert self.format.bits is not None
        return QuantizedTensor(
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            self.format.bits,
            self.group_size,
        )

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) in `dtype`; the parameter itself where it already is that."""
        quantized = self.quantized_weight
        return self.weight.to(dtype) if quantized is None else quantized.dequantize(dtype)

    def padded_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype` with zeros up to the padded width on both sides."""
        if self.held_weight is not None and self.held_weight.dtype == dtype:
            return self.held_weight
        shape = (self.out_features, self.in_features)
        if tuple(map(padded_width, shape)) == shape:
            return self.dequantized_weight(dtype)
        padded = torch.empty(*map(padded_width, shape), dtype=dtype, device=self.weight.device)
        if self.quantized_weight is not None:
            return self.quantized_weight.dequantize(dtype, padded)
        padded[self.out_features :].zero_()
        padded[:, self.in_features :].zero_()
        padded[: self.out_features, : self.in_features].copy_(self.weight)
        return padded

    def weight_over(self, others: Sequence[LowRankLinear], dtype: torch.dtype) -> Tensor:
        """`padded_weight` of this layer and, below it, of others with as many columns."""
        layers = [self, *others]
        quantized = [layer.quantized_weight for layer in layers]
        stored = [weight for weight in quantized if weight is not None]
        if self.held_weight is None and len(stored) == len(layers):
            shapes = [(padded_width(layer.out_features), padded_width(layer.in_features)) for layer in layers]
            weights = grouped_dequantize(stored, dtype, shapes)
        else:
            weights = [layer.padded_weight(dtype) for layer in layers]
        whole = joined(weights, 0)
        return torch.cat(weights) if whole is None else whole

    def attach(self, tap: GradientTap | None) -> Tensor:
        """Hang a tap on the layer (None takes it off) and return the anchor, a leaf whose hook ends the gradient."""
        self.tap = tap
        anchor = torch.zeros((), device=self.weight.device, requires_grad=True)
        self.anchor = None if tap is None else anchor
        return anchor

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), or as wide as it is padded -> (..., out_features) in the dtype of input."""
        return products(input, [self])[0]

    @property
    def _trains(self) -> bool:
        """Whether an optimizer wants the gradient."""
        return self.anchor is not None and not self.frozen

    @property
    def width(self) -> int:
        """Columns of the output."""
        return padded_width(self.out_features) if self.pads_output else self.out_features

    def product(self, input: Tensor) -> Tensor:
        """input (..., in_features), or padded, times the weight: (..., width), without the bias."""
        if self.format.int8_products:
            return self._int8(kernels.int8_linear, input, self.width)
        return cut_columns(with_padded_columns(input) @ self.padded_weight(input.dtype).T, self.width)

    def padded_bias(self, dtype: torch.dtype) -> Tensor:
        """The bias (width,) in `dtype`, with zeros at the end; there must be one."""
        assert self.bias is not None
        return F.pad(self.bias.to(dtype), (0, self.width - self.out_features))

    def input_gradient(self, grad_output: Tensor, width: int) -> Tensor:
        """grad_output (..., padded out_features) times the weight: (..., width), zeros beyond in_features."""
        if self.format.int8_products:
            return self._int8(kernels.int8_linear_backward, grad_output, width)
        return cut_columns(grad_output @ self.padded_weight(grad_output.dtype), width)

    def _int8(self, product: Callable[..., Tensor], x: Tensor, width: int) -> Tensor:
        weight = (self.weight[:, : self.in_features], self.weight_scale, self.weight_zero_point)
        return product(x.reshape(-1, x.shape[-1]), *weight, width).view(*x.shape[:-1], width)

    @torch.no_grad()
    def update_(
        self, direction: Tensor, left: Tensor | None, right: Tensor | None, row: Tensor, skip: Tensor | None = None
    ) -> None:
        """W <- round(decay * W - step_size * leftᵀ N right), in place; `qgalore.kernels` has the shapes."""
        if self.quantized_weight is not None:
            kernels.update_quantized_([self.quantized_update(direction, left, right, row)], skip)
        elif self.format.simulate:
            # Scalars (), which may lie on a device: nothing waits for them.
            step_size, decay = row.view(torch.float32)[2:4].unbind()
            full = kernels.project_back(direction, left, right)
            value = self._to_grid(self.weight.float().mul(decay).sub_(full * step_size), row)
            unchanged = (step_size == 0) & (decay == 1)
            skip = unchanged if skip is None else skip | unchanged
            self.weight.copy_(torch.where(skip, self.weight, value))
        else:
            kernels.update_float_(self.weight, direction, left, right, row, self.format.stochastic_rounding, skip=skip)
        self.was_written()

    def quantized_update(
        self, direction: Tensor, left: Tensor | None, right: Tensor | None, row: Tensor
    ) -> kernels.QuantizedUpdate:
        """`update_` for a kernel that updates several weights, after which `was_written` is due.

        Raises ValueError where the weight is float.
        """
        weight = self.quantized_weight
        if weight is None:
            raise ValueError("the weight of a layer is float: LowRankLinear.update_ updates it")
        return kernels.QuantizedUpdate(
            weight.qdata, weight.scale, weight.zero_point, direction, left, right, weight.columns, weight.bits,
            weight.group_size, row, self.format.stochastic_rounding,
        )  # fmt: skip

    def was_written(self) -> None:
        """Forget what was made of the weight before, and tell autograd, behind whose back our kernels write."""
        self.held_weight = None
        if self.checks_version:
            torch.autograd.graph.increment_version(self.weight)

    def _to_grid(self, value: Tensor, row: Tensor | None) -> Tensor:
        assert self.format.bits is not None
        rounding = row if self.format.stochastic_rounding else None
        return quantize(value, self.format.bits, self.group_size, rounding).dequantize(self.weight.dtype)

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def _multiply_as_one(layers: Sequence[LowRankLinear], dtype: torch.dtype) -> bool:
    weights = sum(padded_width(layer.out_features) * padded_width(layer.in_features) for layer in layers)
    return weights * dtype.itemsize <= JOINED_WEIGHT_BYTES and not any(layer.format.int8_products for layer in layers)


def product_bytes(format: WeightFormat, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> int:
    """Bytes that multiplying with a weight (out_features, in_features) takes beside factors and result.

    That is the padded weight in dtype where it is quantized, or INT8 codes of both factors and two numbers a token.
    """
    rows = -(-shape[0] // 128) * 128
    if format.int8_products:
        return tokens * (rows + 8) + rows * shape[1]
    return 0 if format.stored_bits is None else padded_width(shape[0]) * padded_width(shape[1]) * dtype.itemsize


def products(input: Tensor, linears: Sequence[nn.Module], side_by_side: int = 1) -> list[Tensor]:
    """What each of `linears` makes of the same input (..., in_features).

    Layers that are trained through low-rank gradients are one node of autograd's graph, where all of them are.
    side_by_side: the gradients of so many first outputs are likely to be neighbouring columns of one matrix. Raises
    TypeError for an input that is not float.
    """
    layers = [linear for linear in linears if isinstance(linear, LowRankLinear)]
    if len(layers) < len(linears):
        return [linear(input) for linear in linears]
    if not input.is_floating_point():
        raise TypeError(
            f"the input of a LowRankLinear is {input.dtype}, not float: a model that casts it to the dtype of a "
            "quantized weight, as T5 does before wo, needs that layer left out of convert_linears"
        )
    if not _multiply_as_one(layers[:side_by_side], input.dtype):
        side_by_side = 1
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    if all(layer._trains for layer in layers):
        outputs = autograd_op.multiply(layers, input, side_by_side)
    elif len(layers) > 1:
        return [products(input, [layer])[0] for layer in layers]
    elif layers[0].quantized_weight is not None and input.requires_grad and torch.is_grad_enabled():
        # Not through what stores and rounds: autograd would keep a float copy of the weight, or find no gradient.
        outputs = autograd_op.multiply(layers, input, 1, trains=False)
    else:
        outputs = [layers[0].product(input)]
    return [
        output if layer.bias is None else output + layer.padded_bias(output.dtype)
        for layer, output in zip(layers, outputs, strict=True)
    ]
