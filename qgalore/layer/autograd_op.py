"""The operators of low-rank linear layers: products with one input, whose gradients go to the layers' gradient sinks.

Autograd cannot hand an integer parameter a gradient, nor should it form a full one. So the backward pass gives the two
factors of a weight's gradient, that of the output and the input, to the layer's *gradient sink*, which the optimizer
attaches to it. A scalar leaf, the *proxy leaf*, stands for the weight in autograd's graph: it makes the backward pass
run even where the input needs no gradient, and its post-accumulate hook fires once a backward pass, after every use of
the weight.

The forward operator and that of the input's gradient are functions of tensors: the stored weights and integers that say
how they are stored. The operator of the sinks writes into them. A sink is no tensor (what it adds up and what it reads
changes where a subspace is refreshed), so it comes as an opaque object, a `WeightHandle`, the one operand that may
change. The gradients of the proxy leaves, zeros, are its output: so a compiler can neither drop a call nor make two of
one.

Layers with the same input are one node, so their factors are there at the same time. Where several sinks begin with the
product of the input and a basis, those are one product, which reads the input once: 85 -> 61 us for queries, keys and
values of LLaMA-130M, 69 -> 42 us for gate and up of 60M (H100). And where gradients of outputs are adjacent, as
rotating queries and keys leaves them, one product with both weights makes what they add to the input's gradient, and
one with the input their gradients as a whole, where those are formed.

`torch.compile` passes through all of them without a graph break. Where nothing traces, the same functions are called
without operators around them, since `torch.library` takes longer on the host than all else that a call does there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.config import FP8_GRADIENTS, FP8_PRODUCTS, INT8_PRODUCTS
from qgalore.layer.gradient_sink import GradientSink
from qgalore.layer.layout import as_one_view, cut_columns, padded_width, with_padded_columns
from qgalore.layer.quantization import QuantizedTensor, grouped_dequantize
from qgalore.torch_internals import internal

Weight = Tensor | QuantizedTensor
"""The weight of a layer as it is stored, (out_features, in_features)."""

Storage = tuple[int, int, int, int]
"""How weights with one input are stored: columns, bits (0: float), group size; and `WeightFormat.products` of them."""

_OpaqueBase: Any = internal("torch._opaque_base.OpaqueBase")


class WeightHandle(_OpaqueBase):
    """What the operators use of a weight beside its tensors: an operand that a compiler passes on and does not open."""

    def __init__(self) -> None:
        self.sink: GradientSink | None = None
        """Takes the gradient."""
        self.cached: Tensor | None = None
        """What `padded_weight` gives in one dtype, if that was made ahead: the operators need not make it then."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is of another layer. And torch.compile pickles and copies operands: it would take the optimizer along.
        return WeightHandle, ()


internal("torch._library.opaque_object.register_opaque_type")(WeightHandle, typ="reference")


_is_traced: Callable[[], bool] = internal("torch.utils._python_dispatch.is_in_torch_dispatch_mode")
"""Whether a `TorchDispatchMode`, as selective checkpoints or fake tensors have it, wants to see operators."""


def padded_weight(weight: Weight, dtype: torch.dtype, cached: Tensor | None = None) -> Tensor:
    """The weight in `dtype` with zeros up to the padded width on both sides; `cached` where that is it."""
    if cached is not None and cached.dtype == dtype:
        return cached
    rows, columns = weight.shape
    shape = (padded_width(rows), padded_width(columns))
    if isinstance(weight, QuantizedTensor):
        out = None if shape == (rows, columns) else torch.empty(shape, dtype=dtype, device=weight.qdata.device)
        return weight.dequantize(dtype, out)
    if shape == (rows, columns):
        return weight.to(dtype)
    padded = torch.zeros(shape, dtype=dtype, device=weight.device)
    padded[:rows, :columns].copy_(weight)
    return padded


def linear(input: Tensor, weight: Weight, width: int, products: int, cached: Tensor | None = None) -> Tensor:
    """input (..., in_features), or padded, times Wᵀ: (..., width), which is out_features or that padded.

    products: `WeightFormat.products`.
    """
    if products == INT8_PRODUCTS:
        return _int8(kernels.int8_linear, input, weight, width)
    if products >= FP8_PRODUCTS:
        return _fp8_linears(input, [weight], [width])[0]
    return cut_columns(with_padded_columns(input) @ padded_weight(weight, input.dtype, cached).T, width)


def input_gradient(
    grad_output: Tensor, weight: Weight, width: int, products: int, cached: Tensor | None = None
) -> Tensor:
    """grad_output (..., padded out_features) times W: (..., width), zeros beyond in_features."""
    if products == INT8_PRODUCTS:
        return _int8(kernels.int8_linear_backward, grad_output, weight, width)
    if products >= FP8_PRODUCTS:
        return _fp8_input_gradient([grad_output], [weight], width)
    return cut_columns(grad_output @ padded_weight(weight, grad_output.dtype, cached), width)


def _int8(product: Any, x: Tensor, weight: Weight, width: int) -> Tensor:
    assert isinstance(weight, QuantizedTensor)
    operands = (weight.qdata[:, : weight.columns], weight.scale, weight.zero_point)
    out: Tensor = product(x.reshape(-1, x.shape[-1]), *operands, width)
    return out.view(*x.shape[:-1], width)


def _fp8_linears(input: Tensor, weights: Sequence[Weight], widths: Sequence[int]) -> list[Tensor]:
    """`linear` in FP8 of several weights: the input is rounded once."""
    rows, shape = kernels.fp8_rows([input.reshape(-1, input.shape[-1])], [weights[0].shape[1]]), input.shape[:-1]
    found = _fp8_products(rows, weights, widths, input.dtype)
    return [product.view(*shape, width) for product, width in zip(found, widths, strict=True)]


def _fp8_products(
    rows: kernels.Fp8Matrix, weights: Sequence[Weight], widths: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    return [
        kernels.fp8_product(rows, kernels.fp8_weight(_as_stored(weight)), width, dtype)
        for weight, width in zip(weights, widths, strict=True)
    ]


def _fp8_input_gradient(grad_outputs: Sequence[Tensor], weights: Sequence[Weight], width: int) -> Tensor:
    """The sum of all `input_gradient` in FP8, as one product."""
    turned, factors = kernels.fp8_turned_weights([_as_stored(weight) for weight in weights])
    grads, first = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs], grad_outputs[0]
    rows = kernels.fp8_rows(grads, [weight.shape[0] for weight in weights], factors)
    return kernels.fp8_product(rows, turned, width, first.dtype).view(*first.shape[:-1], width)


def _as_stored(weight: Weight) -> kernels.QuantizedMatrix | Tensor:
    return weight.stored() if isinstance(weight, QuantizedTensor) else weight


def stacked_weights(weights: Sequence[Weight], dtype: torch.dtype, cached: Sequence[Tensor | None]) -> Tensor:
    """`padded_weight` of weights with as many columns, one below the other."""
    stored = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if cached[0] is None and len(stored) == len(weights):
        shapes = [(padded_width(rows), padded_width(columns)) for rows, columns in (weight.shape for weight in stored)]
        padded = grouped_dequantize(stored, dtype, shapes)
    else:
        padded = [
            padded_weight(weight, dtype, cached_weight) for weight, cached_weight in zip(weights, cached, strict=True)
        ]
    whole = as_one_view(padded, 0)
    return torch.cat(padded) if whole is None else whole


def project_grouped(sinks: Sequence[GradientSink | None], input: Tensor) -> list[Tensor | None]:
    """The input (tokens, in_features) times the basis of each sink, by one product; None where there are not several.

    The products are columns of one matrix.
    """
    found = [None if sink is None else sink.input_basis(input) for sink in sinks] if len(sinks) > 1 else []
    bases = [basis for basis in found if basis is not None]
    if not bases or len(bases) < len(sinks):
        return [None] * len(sinks)
    stacked = as_one_view(bases, 0)
    product = input[:, : bases[0].shape[1]] @ (torch.cat(bases) if stacked is None else stacked).T
    return list(product.split([len(basis) for basis in bases], dim=1))


# Defined at the lower level of torch.library: `custom_op` checks each call's tensors for aliases, which costs half a
# millisecond a layer. Another backward pass needs another name of the forward operator: torch keeps compiled ones on
# disk, and finds them by the forward pass alone.
_library = torch.library.Library("qgalore", "DEF")
_HANDLES = f"{internal('torch._library.opaque_object.get_opaque_type_name')(WeightHandle)}[] handles"
# stored: of each layer its float weight, or its codes, scales and zero points. proxies: of the layers, none where only
# the input gets a gradient. adjacent: the gradients of so many first outputs are multiplied at once.
_FORWARD = f"""grouped_linear(
    Tensor input, Tensor[] stored, Tensor[] proxies, {_HANDLES}, int[] storage, int[] widths, int adjacent,
    bool frees_input) -> Tensor[]"""
# Apart from the input's gradient, so that the input can be freed before a gradient of its size is made, which then
# needs what this one returns: (layers,) zeros, the gradients of the proxy leaves. They have an element each, since
# inductor drops what makes tensors without elements, once those of a layer that is used twice are added up.
_ACCUMULATE = f"""grouped_linear_accumulate(
    Tensor[] grad_outputs, Tensor input, {_HANDLES}, int columns, int adjacent, int products=0) -> Tensor"""
_INPUT_GRADIENT = f"""grouped_linear_input_gradient(
    Tensor[] grad_outputs, Tensor[] stored, {_HANDLES}, int[] storage, int width, Tensor? after) -> Tensor"""
# In FP8 for a compiler, which rounds the input (tokens, in_features) by itself, with what it comes from.
_OF_CODES = """grouped_linear_of_codes(
    Tensor codes, Tensor scale, Tensor[] stored, int[] storage, int[] widths, ScalarType dtype) -> Tensor[]"""
# Any layout is taken: for a certain one a compiler would make a copy of an input for each layer that reads it.
for _schema in (_FORWARD, _ACCUMULATE, _INPUT_GRADIENT, _OF_CODES):
    _library.define(" ".join(_schema.split()), tags=torch.Tag.flexible_layout)


def _weights(stored: Sequence[Tensor], storage: Sequence[int]) -> list[Weight]:
    columns, bits, group_size, _ = storage
    if bits == 0:
        return list(stored)
    parts = zip(stored[::3], stored[1::3], stored[2::3], strict=True)
    return [QuantizedTensor(*tensors, columns, bits, group_size) for tensors in parts]


def _rows(factor: Tensor) -> Tensor:
    padded = with_padded_columns(factor)
    return padded.reshape(-1, padded.shape[-1])


@torch.library.impl(_library, "grouped_linear", "CompositeExplicitAutograd")
def _forward(
    input: Tensor,
    stored: list[Tensor],
    proxies: list[Tensor],
    handles: list[WeightHandle],
    storage: list[int],
    widths: list[int],
    adjacent: int,
    frees_input: bool,
) -> list[Tensor]:
    weights = _weights(stored, storage)
    if storage[3] >= FP8_PRODUCTS:
        return _fp8_linears(input, weights, widths)
    return [
        linear(input, weight, width, storage[3], handle.cached)
        for weight, width, handle in zip(weights, widths, handles, strict=True)
    ]


@torch.library.impl(_library, "grouped_linear_of_codes", "CompositeExplicitAutograd")
def _forward_of_codes(
    codes: Tensor, scale: Tensor, stored: list[Tensor], storage: list[int], widths: list[int], dtype: torch.dtype
) -> list[Tensor]:
    return _fp8_products(kernels.Fp8Matrix(codes, scale), _weights(stored, storage), widths, dtype)


@torch.library.impl(_library, "grouped_linear_accumulate", "CompositeExplicitAutograd")
def _accumulate(
    grad_outputs: list[Tensor],
    input: Tensor,
    handles: list[WeightHandle],
    columns: int,
    adjacent: int,
    products: int = 0,
) -> Tensor:
    sinks, grads, factor = [handle.sink for handle in handles], list(map(_rows, grad_outputs)), _rows(input)
    if products == FP8_GRADIENTS:
        sinks = _accumulate_in_fp8(sinks, grads, factor, columns)
    done = _accumulate_whole(sinks[:adjacent], grads[:adjacent], factor[:, :columns]) if adjacent > 1 else 0
    sinks, grads = sinks[done:], grads[done:]
    for sink, grad, projected in zip(sinks, grads, project_grouped(sinks, factor), strict=True):
        if sink is not None:
            sink.accumulate(grad, factor, projected)
    return input.new_zeros(len(handles), dtype=torch.float32)


def _accumulate_in_fp8(
    sinks: Sequence[GradientSink | None], grads: Sequence[Tensor], input: Tensor, columns: int
) -> list[GradientSink | None]:
    """Give those sinks that want whole gradients products in FP8; None stands for them in what is returned."""
    left, factor = list(sinks), None
    for index, (sink, grad) in enumerate(zip(sinks, grads, strict=True)):
        if sink is not None and sink.forms_gradient(input):
            factor = kernels.fp8_columns(input, columns) if factor is None else factor
            rows = kernels.fp8_columns(grad, sink.out_features)
            # Sums over thousands of tokens: in float32 from time to time.
            sink.accumulate_full(
                kernels.fp8_product(rows, factor, columns, grad.dtype, exact=True)[: sink.out_features]
            )
            left[index] = None
    return left


def _accumulate_whole(sinks: Sequence[GradientSink | None], grads: Sequence[Tensor], input: Tensor) -> int:
    """Give all sinks their whole gradients by one product, if that can be, and return how many have theirs now."""
    if not all(sink is not None and sink.forms_gradient(input) for sink in sinks):
        return 0
    whole = as_one_view(grads, 1)
    if whole is None:
        return 0
    for sink, grad in zip(sinks, (whole.T @ input).split([grad.shape[1] for grad in grads]), strict=True):
        assert sink is not None
        sink.accumulate_full(grad)
    return len(sinks)


@torch.library.impl(_library, "grouped_linear_input_gradient", "CompositeExplicitAutograd")
def _input_gradient(
    grad_outputs: list[Tensor],
    stored: list[Tensor],
    handles: list[WeightHandle],
    storage: list[int],
    width: int,
    after: Tensor | None,
) -> Tensor:
    weights, cached = _weights(stored, storage), [handle.cached for handle in handles]
    if storage[3] >= FP8_PRODUCTS:
        return _fp8_input_gradient(grad_outputs, weights, width)
    grads = [with_padded_columns(grad) for grad in grad_outputs]
    whole = as_one_view([_rows(grad) for grad in grads], 1) if len(grads) > 1 else None
    if whole is not None:
        product = whole @ stacked_weights(weights, whole.dtype, cached)
        return cut_columns(product, width).view(*grads[0].shape[:-1], width)
    total = input_gradient(grads[0], weights[0], width, storage[3], cached[0])
    for grad, weight, cached_weight in zip(grads[1:], weights[1:], cached[1:], strict=True):
        total += input_gradient(grad, weight, width, storage[3], cached_weight)
    return total


@torch.library.register_fake("qgalore::grouped_linear")
def _(input: Tensor, *rest: Any) -> list[Tensor]:
    return [input.new_empty(*input.shape[:-1], width) for width in rest[4]]


@torch.library.register_fake("qgalore::grouped_linear_of_codes")
def _(codes: Tensor, *rest: Any) -> list[Tensor]:
    return [codes.new_empty(len(codes), width, dtype=rest[4]) for width in rest[3]]


@torch.library.register_fake("qgalore::grouped_linear_accumulate")
def _(grad_outputs: list[Tensor], input: Tensor, handles: list[WeightHandle], *rest: Any) -> Tensor:
    return input.new_empty(len(handles), dtype=torch.float32)


@torch.library.register_fake("qgalore::grouped_linear_input_gradient")
def _(grad_outputs: list[Tensor], *rest: Any) -> Tensor:
    return grad_outputs[0].new_empty(*grad_outputs[0].shape[:-1], rest[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, stored, proxies, ctx.handles, ctx.storage, _, ctx.adjacent, ctx.frees_input = inputs
    ctx.trains, ctx.width = len(proxies) > 0, input.shape[-1]
    # The weights are saved: autograd then refuses a backward through one that was changed in between.
    ctx.save_for_backward(*([input] if ctx.trains else []), *stored)


def _backward(
    ctx: Any, grad_outputs: Sequence[Tensor], accumulate: Callable[..., Tensor], input_gradient: Callable[..., Tensor]
) -> tuple[Tensor | None, Sequence[Tensor], int]:
    """The gradients of the input and the proxy leaves, and the number of stored tensors.

    accumulate, input_gradient: the operators, or the functions below them.
    """
    stored, handles = list(ctx.saved_tensors), ctx.handles
    grad, after, count = None, None, len(handles)
    if ctx.trains:
        after = accumulate(grad_outputs, stored.pop(0), handles, ctx.storage[0], ctx.adjacent, ctx.storage[3])
    if ctx.needs_input_grad[0]:
        each = len(stored) // count
        # In FP8 all are one product, which adds them up; else those that are adjacent.
        fused = ctx.storage[3] >= FP8_PRODUCTS and kernels.fp8_joins([grad.shape[-1] for grad in grad_outputs])
        for start, stop in itertools.pairwise((0, *range(count if fused else ctx.adjacent, count + 1))):
            part = input_gradient(
                grad_outputs[start:stop], stored[each * start : each * stop], handles[start:stop], ctx.storage,
                ctx.width, after if ctx.frees_input else None,
            )  # fmt: skip
            grad = part if grad is None else grad + part
    return grad, () if after is None else after.unbind(), len(stored)


def _backward_of_operator(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Any, ...]:
    operators = torch.ops.qgalore
    grad, proxies, stored = _backward(
        ctx, grad_outputs, operators.grouped_linear_accumulate, operators.grouped_linear_input_gradient
    )
    return grad, [None] * stored, list(proxies), None, None, None, None, None


torch.library.register_autograd("qgalore::grouped_linear", _backward_of_operator, setup_context=_setup_context)


class _GroupedLinear(torch.autograd.Function):
    """The operator `grouped_linear` with its backward pass, for when nothing traces."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, stored: list[Tensor], rest: tuple[Any, ...], *proxies: Tensor
    ) -> tuple[Tensor, ...]:
        """rest: the operands of `_forward` behind `proxies`."""
        _setup_context(ctx, (input, stored, proxies, *rest), [])
        return tuple(_forward(input, stored, [], *rest))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """See `_backward`; a frozen layer is a product with a constant, which has a second derivative."""
        # What goes to a sink has none, nor have products of codes, which round: there autograd says so.
        if torch.compiler.is_compiling():  # a backward pass that is compiled by itself
            grad, _, proxies, *_ = _backward_of_operator(ctx, list(grad_outputs))
            return grad, None, None, *proxies
        one_time = ctx.trains or ctx.storage[3]
        return _backward_of_function_once(ctx, *grad_outputs) if one_time else _backward_of_function(ctx, *grad_outputs)


def _backward_of_function(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    grad, proxies, _ = _backward(ctx, grad_outputs, _accumulate, _input_gradient)
    return grad, None, None, *proxies


_backward_of_function_once: Callable[..., tuple[Any, ...]] = torch.autograd.function.once_differentiable(
    _backward_of_function
)


class _GroupedLinearOfCodes(torch.autograd.Function):
    """The same in FP8 where a compiler traces, of an input that is rounded already.

    The forward pass reads the codes alone, the backward pass the input. So a compiler writes the codes where the norm
    or SwiGLU writes its result, for which it would otherwise write and read 16 bits a value, and makes the input in the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: tuple[Tensor, Tensor], rest: tuple[Any, ...], count: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        """rest: as of `_GroupedLinear`; tensors: so many stored ones, then the proxies."""
        stored, proxies = list(tensors[:count]), tensors[count:]
        _setup_context(ctx, (input, stored, proxies, *rest), [])
        _, storage, widths, *_ = rest
        found = torch.ops.qgalore.grouped_linear_of_codes(*rows, stored, storage, widths, input.dtype)
        return tuple(product.view(*input.shape[:-1], width) for product, width in zip(found, widths, strict=True))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """See `_backward`."""
        operators = torch.ops.qgalore
        grad, proxies, stored = _backward(
            ctx, grad_outputs, operators.grouped_linear_accumulate, operators.grouped_linear_input_gradient
        )
        return grad, None, None, None, *[None] * stored, *proxies


def grouped_linear(
    input: Tensor, stored: list[Tensor], proxies: Sequence[Tensor | None], *rest: Any
) -> Sequence[Tensor]:
    """The operator `grouped_linear`, by the shortest way there is."""
    columns, *_, products = rest[1]
    # Of a ragged width a compiler would write float32 values, to pad them.
    whole = input.shape[-1] == kernels.fp8_width(columns)
    if torch.compiler.is_compiling() and products >= FP8_PRODUCTS and proxies and whole:
        rows = kernels.fp8_rows_to_fuse(input.detach().reshape(-1, input.shape[-1]), columns)
        outputs: Sequence[Tensor] = _GroupedLinearOfCodes.apply(
            input, (rows.codes, rows.scale), rest, len(stored), *stored, *proxies
        )
        return outputs
    if torch.compiler.is_compiling() or _is_traced():
        outputs = torch.ops.qgalore.grouped_linear(input, stored, proxies, *rest)
        return outputs
    found: tuple[Tensor, ...] = _GroupedLinear.apply(input, stored, rest, *proxies)
    return found
