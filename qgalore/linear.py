"""The linear layer whose weight is trained through low-rank gradients, over a float or a quantized weight.

The weight is plain state of a module: an integer parameter with its scales and zero points as buffers (or a float
parameter), so `deepcopy`, `.to()`, safetensors and data parallelism need nothing special; a tensor subclass failed at
the last two (docs/log.md has the trial). Rows of codes end with zeros where kernels want longer ones, and a state dict
has them without. Autograd cannot hand an integer parameter a gradient, nor should it form a full one. So the layer is
an operator whose backward gives its two factors, the output gradient and the input, to the layer's *tap*; the optimizer
hangs a tap on each layer when it is attached to the model. A scalar leaf, the *anchor*, stands for the weight in the
autograd graph: it makes the backward run even where the input needs no gradient, and its post-accumulate hook fires
once a backward, after every use of the weight.

The operator is a `torch.library` operator, so that `torch.compile` passes through it without a graph break.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgalore import kernels
from qgalore.padding import padded_width, with_padded_columns
from qgalore.quantization import QuantizedTensor, quantize
from qgalore.weight_format import WeightFormat


class GradientTap(Protocol):
    """What receives the factors of a weight gradient during the backward pass."""

    def accumulate(self, grad_output: Tensor, input: Tensor) -> None:
        """Take grad_output (tokens, out_features) and input (tokens, in_features): the gradient is their product.

        Either may be wider, with columns of zeros (`qgalore.padding`).
        """


def changes_nothing(step_size: float, decay: float, numbers: Tensor | None) -> bool:
    """Whether an update leaves every bit, as with a learning rate of 0: requantizing would move the grid."""
    return step_size == 0 and decay == 1 and numbers is None


_layer_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, LowRankLinear] = weakref.WeakValueDictionary()


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
                self.weight.data.copy_(self._to_grid(weight.detach(), seed=None))
        else:
            quantized = quantize(weight.detach(), format.bits, self.group_size).with_aligned_rows()
            self.weight = nn.Parameter(quantized.qdata, requires_grad=False)
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
        """What `padded_weight` gives in one dtype, made ahead by `qgalore.held_matrices`."""
        self._register()

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: WeightFormat) -> LowRankLinear:
        """The same layer with its weight in `format`; the bias is shared."""
        layer = cls(linear.weight, linear.bias, format)
        if layer.weight.is_floating_point():
            layer.weight.requires_grad_(linear.weight.requires_grad)
        layer.train(linear.training)
        return layer

    def _register(self) -> None:
        # A tensor on the CPU, since a compiler would compile a number of Python anew for each layer.
        self._number = torch.tensor(next(_layer_numbers))
        _layers[int(self._number)] = self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another layer: it has its own number and no optimizer.
        return self.__dict__ | {"tap": None, "anchor": None, "_number": None, "held_weight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    @property
    def _row_padding(self) -> int:
        return 0 if self.quantized_weight is None else self.quantized_weight.row_padding

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._row_padding:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"][:, : -self._row_padding].contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = f"{prefix}weight"
        if self._row_padding and key in state_dict:  # of another width than it should be, it is refused
            state_dict = {**state_dict, key: F.pad(state_dict[key], (0, self._row_padding))}
        super()._load_from_state_dict(state_dict, prefix, *rest)

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

    def attach(self, tap: GradientTap | None) -> Tensor:
        """Hang a tap on the layer (None takes it off) and return the anchor, a leaf whose hook ends the gradient."""
        self.tap = tap
        anchor = torch.zeros((), device=self.weight.device, requires_grad=True)
        self.anchor = None if tap is None else anchor
        return anchor

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), or as wide as it is padded -> (..., out_features) in the dtype of input."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if self.anchor is None or self._frozen:
            output = self._product(input)
        else:
            output = torch.ops.qgalore.low_rank_linear_forward(
                input, self.weight, self.weight_scale, self.weight_zero_point, self.anchor, self._number,
                self.frees_input, self._width,
            )  # fmt: skip
        if self.bias is None:
            return output
        return output + F.pad(self.bias.to(output.dtype), (0, self._width - self.out_features))

    @property
    def _frozen(self) -> bool:
        """Whether the weight is to stay as it is; of a quantized one autograd cannot tell."""
        return self.weight.is_floating_point() and not self.weight.requires_grad

    @property
    def _width(self) -> int:
        return padded_width(self.out_features) if self.pads_output else self.out_features

    def _product(self, input: Tensor) -> Tensor:
        if self.format.int8_products:
            return self._int8(kernels.int8_linear, input, self._width)
        output = with_padded_columns(input) @ self.padded_weight(input.dtype).T
        return output if output.shape[-1] == self._width else output[..., : self._width].contiguous()

    def input_gradient(self, grad_output: Tensor, width: int) -> Tensor:
        """grad_output (..., padded out_features) times the weight: (..., width), zeros beyond in_features."""
        if self.format.int8_products:
            return self._int8(kernels.int8_linear_backward, grad_output, width)
        grad_input = grad_output @ self.padded_weight(grad_output.dtype)
        return grad_input if grad_input.shape[-1] == width else grad_input[..., :width].contiguous()

    def _int8(self, product: Callable[..., Tensor], x: Tensor, width: int) -> Tensor:
        weight = (self.weight[:, : self.in_features], self.weight_scale, self.weight_zero_point)
        return product(x.reshape(-1, x.shape[-1]), *weight, width).view(*x.shape[:-1], width)

    @torch.no_grad()
    def update_(
        self,
        direction: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        step_size: float,
        decay: float,
        seed: int,
        skip: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """W <- round(decay * W - step_size * leftᵀ N right), in place; `qgalore.kernels` has the shapes."""
        if changes_nothing(step_size, decay, numbers):
            return
        rounding = seed if self.format.stochastic_rounding else None
        if self.quantized_weight is not None:
            update = self.quantized_update(direction, left, right, step_size, decay, seed, numbers)
            kernels.update_several_quantized_([update], skip)
        elif self.format.simulate:
            full = kernels.project_back(direction, left, right)
            value = self._to_grid(self.weight.float().mul(decay).sub_(full * step_size), rounding)
            self.weight.copy_(value if skip is None else torch.where(skip, self.weight, value))
        else:
            kernels.update_float_(self.weight, direction, left, right, step_size, decay, rounding, 0, skip, numbers)
        self.was_written()

    def quantized_update(
        self,
        direction: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        step_size: float,
        decay: float,
        seed: int,
        numbers: Tensor | None = None,
    ) -> kernels.QuantizedUpdate:
        """`update_` for a kernel that updates several weights, after which `was_written` is due.

        Raises ValueError where the weight is float.
        """
        weight = self.quantized_weight
        if weight is None:
            raise ValueError("the weight of a layer is float: LowRankLinear.update_ updates it")
        return kernels.QuantizedUpdate(
            weight.qdata, weight.scale, weight.zero_point, direction, left, right, weight.columns, weight.bits,
            weight.group_size, step_size, decay, seed if self.format.stochastic_rounding else None, numbers,
        )  # fmt: skip

    def was_written(self) -> None:
        """Forget what was made of the weight before, and tell autograd, behind whose back our kernels write."""
        self.held_weight = None
        if self.checks_version:
            torch.autograd.graph.increment_version(self.weight)

    def _to_grid(self, value: Tensor, seed: int | None) -> Tensor:
        assert self.format.bits is not None
        return quantize(value, self.format.bits, self.group_size, seed).dequantize(self.weight.dtype)

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def convert_linears(model: nn.Module, names: Iterable[str], format: WeightFormat) -> None:
    """Replace the named `nn.Linear` modules of a model by `LowRankLinear`, in place, wherever the model uses them.

    Raises TypeError for other modules, ValueError for a weight that another module holds, too, such as an embedding.
    """
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}: only nn.Linear can become a LowRankLinear")
        modules = list(model.modules())
        if sum(linear.weight is param for module in modules for param in module.parameters(recurse=False)) > 1:
            raise ValueError(f"{name}.weight is a parameter of another module, too: a LowRankLinear cannot share it")
        layer = LowRankLinear.from_linear(linear, format)
        for parent, child in [(p, key) for p in modules for key, module in p._modules.items() if module is linear]:
            setattr(parent, child, layer)


# Defined at the lower level of torch.library: `custom_op` checks each call's tensors for aliases, which costs half a
# millisecond a layer. Another backward pass needs another name of the product: torch keeps compiled ones on disk, and
# finds them by the forward pass alone.
_library = torch.library.Library("qgalore", "DEF")
# Any layout is taken: for a certain one a compiler would make a copy of an input for each layer that reads it.
_FORWARD = """low_rank_linear_forward(
    Tensor input, Tensor weight, Tensor? scale, Tensor? zero_point, Tensor anchor, Tensor layer, bool frees_input,
    int width) -> Tensor"""
# In two, so that the input can be freed before the gradient of its size is made, which then needs what the tap returns.
_TAP = "low_rank_linear_tap(Tensor grad_output, Tensor input, Tensor layer) -> Tensor"
_INPUT_GRADIENT = """low_rank_linear_input_gradient(
    Tensor grad_output, Tensor weight, Tensor? scale, Tensor? zero_point, Tensor layer, Tensor? tapped, int width
    ) -> Tensor"""
for _schema in (_FORWARD, _TAP, _INPUT_GRADIENT):
    _library.define(" ".join(_schema.split()), tags=torch.Tag.flexible_layout)


@torch.library.impl(_library, "low_rank_linear_forward", "CompositeExplicitAutograd")
def _forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    anchor: Tensor,
    layer: Tensor,
    frees_input: bool,
    width: int,
) -> Tensor:
    return _layers[int(layer)]._product(input)


@torch.library.impl(_library, "low_rank_linear_tap", "CompositeExplicitAutograd")
def _tap(grad_output: Tensor, input: Tensor, layer: Tensor) -> Tensor:
    # The anchor's gradient is an output, so that no compiler may drop the call; its value is never read.
    tap, anchor_grad = _layers[int(layer)].tap, grad_output.new_empty((), dtype=torch.float32)
    if tap is not None:
        factors = (with_padded_columns(factor) for factor in (grad_output, input))
        tap.accumulate(*(factor.reshape(-1, factor.shape[-1]) for factor in factors))
    return anchor_grad


@torch.library.impl(_library, "low_rank_linear_input_gradient", "CompositeExplicitAutograd")
def _input_gradient(
    grad_output: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    layer: Tensor,
    tapped: Tensor | None,
    width: int,
) -> Tensor:
    return _layers[int(layer)].input_gradient(with_padded_columns(grad_output), width)


@torch.library.register_fake("qgalore::low_rank_linear_forward")
def _(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], rest[-1])


@torch.library.register_fake("qgalore::low_rank_linear_tap")
def _(grad_output: Tensor, *rest: object) -> Tensor:
    return grad_output.new_empty((), dtype=torch.float32)


@torch.library.register_fake("qgalore::low_rank_linear_input_gradient")
def _(grad_output: Tensor, *rest: Any) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:-1], rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, scale, zero_point, _, layer, ctx.frees_input, _ = inputs
    # The weight is saved too: autograd then refuses a backward through a weight that was changed in between.
    ctx.save_for_backward(input, weight, scale, zero_point, layer)


def _autograd_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, scale, zero_point, layer = ctx.saved_tensors
    anchor_grad, grad = torch.ops.qgalore.low_rank_linear_tap(grad_output, input, layer), None
    if ctx.needs_input_grad[0]:
        tapped = anchor_grad if ctx.frees_input else None
        grad = torch.ops.qgalore.low_rank_linear_input_gradient(
            grad_output, weight, scale, zero_point, layer, tapped, input.shape[-1]
        )
    return grad, None, None, None, anchor_grad, None, None, None


torch.library.register_autograd("qgalore::low_rank_linear_forward", _autograd_backward, setup_context=_setup_context)
