"""The linear layer whose weight is trained through low-rank gradients, over a float or a quantized weight.

The weight is plain state of a module: an integer parameter with its scales and zero points as buffers (or a float
parameter), so `deepcopy`, `.to()`, safetensors and data parallelism need nothing special; a tensor subclass failed at
the last two (docs/log has the trial). Rows of codes end with zeros where kernels want longer ones, and a state dict
has them without, under names of their own: `weight_qdata`, `weight_scale`, `weight_zero_point`, `weight_format`.

In training it is an operator whose backward pass gives the factors of the weight's gradient to a gradient sink, which
the optimizer attaches to the layer (`qgalore.layer.autograd_op`). The operator takes several layers with the same
input, such as those of queries, keys and values: `grouped_linear`.
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
from qgalore.layer.gradient_sink import GradientSink
from qgalore.layer.layout import padded_width
from qgalore.layer.quantization import QuantizedTensor, quantize

GROUPED_WEIGHT_BYTES = 32 << 20
"""Weights that take no more in all are one factor where their outputs' gradients are; larger ones would take memory,
and a product with one of them takes so long that there is nothing to gain."""


class LowRankLinear(nn.Module):
    """`nn.Linear` with a weight in `format` and a sink for its gradient; made by `LowRankLinear.from_linear`."""

    transposed = False
    """Whether it was a `Conv1D` of transformers, whose weight is (in_features, out_features): here it is (out_features,
    in_features) as in every layer, and a float one goes into a state dict, and comes out of it, as Conv1D has it."""

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        format: WeightFormat,
        pads_output: bool = False,
        frees_input: bool = False,
    ) -> None:
        """weight: float, (out_features, in_features), stored as `format` says.

        pads_output: give (..., padded_width(out_features)), with zeros at the end: for a following layer that takes it
        so. frees_input: let the input be freed before its gradient is made; where a compiler computes it again, it
        would otherwise make it together with what follows that gradient, which takes less time and more memory.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.width = padded_width(self.out_features) if pads_output else self.out_features
        """Columns of the output."""
        self._frees_input = frees_input
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
        self._describe_storage()
        self.proxy: Tensor | None = None
        """Stands for the weight in autograd's graph while a gradient sink is attached."""
        self.handle = autograd_op.WeightHandle()
        self._increments_version = True

    def _describe_storage(self) -> None:
        bits = self.format.stored_bits or 0
        self._storage: autograd_op.Storage = self.in_features, bits, self.group_size, self.format.products
        self._stored_as = str(self._storage)
        """As a text, which a compiler compares and guards as one value."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: WeightFormat, **options: bool) -> LowRankLinear:
        """The same layer with its weight in `format`, frozen where it was; the bias is shared. options: `__init__`."""
        layer = cls(linear.weight, linear.bias, format, **options)
        layer.weight.requires_grad_(linear.weight.requires_grad)
        layer.train(linear.training)
        return layer

    @classmethod
    def from_conv1d(cls, conv: nn.Module, format: WeightFormat, **options: bool) -> LowRankLinear:
        """As `from_linear` of a transformers `Conv1D`, a linear layer whose weight is (in_features, out_features)."""
        weight, bias = conv.get_parameter("weight"), conv._parameters["bias"]
        layer = cls(weight.T, bias, format, **options)
        layer.transposed = True
        layer.weight.requires_grad_(weight.requires_grad)
        layer.train(conv.training)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"proxy": None}  # a copy has no optimizer, nor has its handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._describe_storage()  # which a pickle of an older version does not have

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
        if self.transposed and self.quantized_weight is None:
            # safetensors takes no views.
            destination[f"{prefix}{WEIGHT}"] = destination[f"{prefix}{WEIGHT}"].T.contiguous()
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
        if self.transposed and self.quantized_weight is None and key in entries:
            entries[key] = entries[key].T.contiguous()
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
        tensors = (self.weight, self.weight_scale, self.weight_zero_point)
        return QuantizedTensor(*tensors, self.in_features, self.format.bits, self.group_size)

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) in `dtype`; the parameter itself where it already is that."""
        quantized = self.quantized_weight
        return self.weight.to(dtype) if quantized is None else quantized.dequantize(dtype)

    def padded_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype` with zeros up to the padded width on both sides."""
        return autograd_op.padded_weight(self.quantized_weight or self.weight, dtype, self.handle.cached)

    @property
    def cached_weight(self) -> Tensor | None:
        """What `padded_weight` gives in one dtype, made ahead by `qgalore.graphs.dequant_cache`."""
        cached: Tensor | None = self.handle.cached
        return cached

    @cached_weight.setter
    def cached_weight(self, value: Tensor | None) -> None:
        self.handle.cached = value

    @property
    def sink(self) -> GradientSink | None:
        """What takes the gradient."""
        sink: GradientSink | None = self.handle.sink
        return sink

    def attach(self, sink: GradientSink | None) -> Tensor:
        """Give gradients to a sink (None: to none) and return the proxy leaf, whose hook ends the gradient."""
        self.handle.sink = sink
        proxy = torch.zeros((), device=self.weight.device, requires_grad=True)
        self.proxy = None if sink is None else proxy
        return proxy

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), or as wide as it is padded -> (..., out_features) in the dtype of input."""
        return grouped_linear(input, [self])[0]

    @property
    def _trains(self) -> bool:
        """Whether an optimizer wants the gradient."""
        return self.proxy is not None and not self.frozen

    @property
    def _stored(self) -> list[Tensor]:
        if self.weight_scale is None or self.weight_zero_point is None:
            return [self.weight]
        return [self.weight, self.weight_scale, self.weight_zero_point]

    @torch.no_grad()
    def update_(
        self, direction: Tensor, left: Tensor | None, right: Tensor | None, row: Tensor, skip: Tensor | None = None
    ) -> None:
        """W <- round(decay * W - step_size * leftᵀ N right), in place; `qgalore.kernels` has the shapes."""
        if self.quantized_weight is not None:
            kernels.update_quantized_([self.quantized_update(direction, left, right, row)], skip)
        elif self.format.simulate:
            full = kernels.project_back(direction, left, right)
            value = self._to_grid(kernels.stepped(self.weight.float(), full, row), row)
            numbers = kernels.StepNumbers.of(row)
            unchanged = (numbers.step_size == 0) & (numbers.decay == 1)
            skip = unchanged if skip is None else skip | unchanged
            self.weight.copy_(torch.where(skip, self.weight, value))
        else:
            stochastic = self.format.stochastic_rounding
            kernels.update_float_([kernels.FloatUpdate(self.weight, direction, left, right, row, stochastic)], skip)
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
        self.cached_weight = None
        if self._increments_version:
            torch.autograd.graph.increment_version(self.weight)

    def allow_backward_after_update(self) -> None:
        """From now on autograd does not refuse a backward pass through a weight that was updated in between.

        CUDA graphs need it: they keep what a forward pass has saved once, and run its backward pass in every step.
        """
        self._increments_version = False

    def _to_grid(self, value: Tensor, row: Tensor | None) -> Tensor:
        assert self.format.bits is not None
        rounding = row if self.format.stochastic_rounding else None
        return quantize(value, self.format.bits, self.group_size, rounding).dequantize(self.weight.dtype)

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def _multiply_as_one(layers: Sequence[LowRankLinear], dtype: torch.dtype) -> bool:
    weights = sum(padded_width(layer.out_features) * padded_width(layer.in_features) for layer in layers)
    return weights * dtype.itemsize <= GROUPED_WEIGHT_BYTES and not any(layer.format.products for layer in layers)


def _train_as_one(layers: Sequence[LowRankLinear]) -> bool:
    """Whether an optimizer wants the gradients of all, and they are stored alike."""
    first = layers[0]
    # A loop of its own: a compiler at each start traces twice as many instructions of generators within all().
    for layer in layers:
        if not layer._trains or (layer is not first and layer._stored_as != first._stored_as):
            return False
    return True


def product_bytes(format: WeightFormat, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> int:
    """Bytes that multiplying with a weight (out_features, in_features) takes beside factors and result.

    That is the padded weight in dtype where it is quantized, or INT8 codes of both factors and two numbers a token, or
    FP8 ones and a number for each of their rows.
    """
    if format.fp8_products:
        m, n = map(kernels.fp8_width, shape)
        return tokens * (max(m, n) + 4) + m * n + 4 * (m + n)
    rows = -(-shape[0] // 128) * 128
    if format.int8_products:
        return tokens * (rows + 8) + rows * shape[1]
    return 0 if format.stored_bits is None else padded_width(shape[0]) * padded_width(shape[1]) * dtype.itemsize


def fused_product_bytes(shapes: Sequence[tuple[int, int]], tokens: int) -> int:
    """Bytes that the product in FP8 for the gradient of an input takes beside the gradients of outputs and the result.

    shapes: (out_features, in_features) of the weights with that input, whose gradients it adds up.
    """
    rows, columns = sum(kernels.fp8_width(m) for m, _ in shapes), kernels.fp8_width(shapes[0][1])
    return tokens * (rows + 4) + rows * columns + 4 * (rows + columns)


def columns_bytes(shape: tuple[int, int], tokens: int) -> int:
    """Bytes that the gradient of a weight (out_features, in_features) by a product in FP8 takes beside its factors."""
    columns = sum(map(kernels.fp8_width, shape))
    return columns * (kernels.fp8_width(tokens) + 4) + 4 * max(map(kernels.fp8_width, shape))


def grouped_linear(input: Tensor, linears: Sequence[nn.Module], adjacent: int = 1) -> list[Tensor]:
    """What each of `linears` makes of the same input (..., in_features).

    Layers that are trained through low-rank gradients and stored alike are one node of autograd's graph. adjacent: the
    gradients of so many first outputs are likely to be adjacent columns of one matrix. Raises TypeError for an input
    that is not float.
    """
    layers = [linear for linear in linears if isinstance(linear, LowRankLinear)]
    if len(layers) < len(linears):
        return [linear(input) for linear in linears]
    if not input.is_floating_point():
        raise TypeError(
            f"the input of a LowRankLinear is {input.dtype}, not float: a model that casts it to the dtype of a "
            "quantized weight, as T5 does before wo, needs that layer left out of convert_linears"
        )
    device, first = input.device.type, layers[0]
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    trains = _train_as_one(layers)
    if len(layers) > 1 and not trains:
        return [grouped_linear(input, [layer])[0] for layer in layers]
    if trains or (first.quantized_weight is not None and input.requires_grad and torch.is_grad_enabled()):
        # A frozen one, too: through what stores and rounds, autograd would keep a float copy of the weight.
        outputs = autograd_op.grouped_linear(
            input, [tensor for layer in layers for tensor in layer._stored],
            [layer.proxy for layer in layers] if trains else [], [layer.handle for layer in layers],
            first._storage, [layer.width for layer in layers],
            adjacent if adjacent > 1 and _multiply_as_one(layers[:adjacent], input.dtype) else 1,
            True in [layer._frees_input for layer in layers],
        )  # fmt: skip
    else:
        weight = first.quantized_weight or first.weight
        outputs = [autograd_op.linear(input, weight, first.width, first.format.products)]
    return [
        output
        if layer.bias is None
        else output + F.pad(layer.bias.to(output.dtype), (0, layer.width - len(layer.bias)))
        for layer, output in zip(layers, outputs, strict=True)
    ]
