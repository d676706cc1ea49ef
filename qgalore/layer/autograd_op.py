"""The operator of low-rank linear layers: products with one input, whose gradients go to the layers' taps.

Autograd cannot hand an integer parameter a gradient, nor should it form a full one. So the backward pass gives the two
factors of a weight's gradient, that of the output and the input, to the layer's *tap*, which the optimizer hangs on it.
A scalar leaf, the *anchor*, stands for the weight in autograd's graph: it makes the backward pass run even where the
input needs no gradient, and its post-accumulate hook fires once a backward pass, after every use of the weight.

Layers with the same input are one node, so their factors are there at the same time. Where several taps begin with the
product of the input and a basis, those are one product, which reads the input once: 85 -> 61 us for queries, keys and
values of LLaMA-130M, 69 -> 42 us for gate and up of 60M (H100). And where gradients of outputs lie side by side, as
rotating queries and keys leaves them, one product with both weights makes what they add to the input's gradient, and
one with the input their gradients as a whole, where those are formed.

These are `torch.library` operators, through which `torch.compile` passes without a graph break.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qgalore.layer.gradient_sink import GradientTap
from qgalore.layer.layout import cut_columns, joined, with_padded_columns


class AttachedLayer(Protocol):
    """What the operator needs of a layer (`qgalore.layer.linear.LowRankLinear`)."""

    in_features: int
    weight: nn.Parameter
    number: Tensor
    anchor: Tensor | None
    tap: GradientTap | None
    frees_input: bool

    @property
    def width(self) -> int:
        """Of the outputs, padded where the layer pads them."""

    def product(self, input: Tensor) -> Tensor:
        """input Wᵀ, (..., width of the layer)."""

    def input_gradient(self, grad_output: Tensor, width: int) -> Tensor:
        """grad_output W, (..., width)."""

    def weight_over(self, others: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """The padded weight of this layer and, below it, of others with as many columns."""


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, AttachedLayer] = weakref.WeakValueDictionary()


def new_number(layer: AttachedLayer) -> Tensor:
    """What the operator knows a layer by: a tensor on the CPU, for a compiler would compile a number of Python anew."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def multiply(layers: Sequence[AttachedLayer], input: Tensor, side_by_side: int, trains: bool = True) -> list[Tensor]:
    """`product` of layers with one input, each (..., width of the layer).

    side_by_side: the gradients of so many first outputs are multiplied at once, which pays where they lie so.
    trains: the layers are attached, and their taps get the factors of the gradients; else only the input gets one.
    """
    weights = [layer.weight for layer in layers]
    anchors = [layer.anchor for layer in layers if layer.anchor is not None] if trains else []
    frees_input = any(layer.frees_input for layer in layers)
    outputs: list[Tensor] = torch.ops.qgalore.low_rank_linears(
        input, weights, anchors, [layer.number for layer in layers], frees_input, side_by_side,
        [layer.width for layer in layers],
    )  # fmt: skip
    return outputs


def project_together(taps: Sequence[GradientTap | None], input: Tensor) -> list[Tensor | None]:
    """The input (tokens, in_features) times the basis of each tap, by one product; None where there is nothing to join.

    The products are columns of one matrix.
    """
    found = [None if tap is None else tap.input_basis(input) for tap in taps] if len(taps) > 1 else []
    bases = [basis for basis in found if basis is not None]
    if not bases or len(bases) < len(taps):
        return [None] * len(taps)
    stacked = joined(bases, 0)
    product = input[:, : bases[0].shape[1]] @ (torch.cat(bases) if stacked is None else stacked).T
    return list(product.split([len(basis) for basis in bases], dim=1))


# Defined at the lower level of torch.library: `custom_op` checks each call's tensors for aliases, which costs half a
# millisecond a layer. Another backward pass needs another name of the product: torch keeps compiled ones on disk, and
# finds them by the forward pass alone.
_library = torch.library.Library("qgalore", "DEF")
# Any layout is taken: for a certain one a compiler would make a copy of an input for each layer that reads it.
_FORWARD = """low_rank_linears(
    Tensor input, Tensor[] weights, Tensor[] anchors, Tensor[] layers, bool frees_input, int side_by_side,
    int[] widths) -> Tensor[]"""
# In two, so that the input can be freed before a gradient of its size is made, which then needs what the tap returns.
_TAP = """low_rank_linears_tap(
    Tensor[] grad_outputs, Tensor input, Tensor[] layers, int side_by_side) -> Tensor[]"""
_INPUT_GRADIENT = """low_rank_linears_input_gradient(
    Tensor[] grad_outputs, Tensor[] weights, Tensor[] layers, Tensor[] tapped, int width) -> Tensor"""
for _schema in (_FORWARD, _TAP, _INPUT_GRADIENT):
    _library.define(" ".join(_schema.split()), tags=torch.Tag.flexible_layout)


@torch.library.impl(_library, "low_rank_linears", "CompositeExplicitAutograd")
def _forward(
    input: Tensor,
    weights: list[Tensor],
    anchors: list[Tensor],
    layers: list[Tensor],
    frees_input: bool,
    side_by_side: int,
    widths: list[int],
) -> list[Tensor]:
    return [_layers[int(layer)].product(input) for layer in layers]


@torch.library.impl(_library, "low_rank_linears_tap", "CompositeExplicitAutograd")
def _tap(grad_outputs: list[Tensor], input: Tensor, layers: list[Tensor], side_by_side: int) -> list[Tensor]:
    modules, grads, factor = [_layers[int(layer)] for layer in layers], list(map(_rows, grad_outputs)), _rows(input)
    taps, columns = [module.tap for module in modules], modules[0].in_features
    done = 0
    if side_by_side > 1:
        done = _accumulate_whole(taps[:side_by_side], grads[:side_by_side], factor[:, :columns])
    taps, grads = taps[done:], grads[done:]
    for tap, grad, projected in zip(taps, grads, project_together(taps, factor), strict=True):
        if tap is not None:
            tap.accumulate(grad, factor, projected)
    # The anchors' gradients are outputs, so that no compiler may drop the call; their values are never read.
    return [input.new_empty((), dtype=torch.float32) for _ in layers]


def _accumulate_whole(taps: Sequence[GradientTap | None], grads: Sequence[Tensor], input: Tensor) -> int:
    """Give all taps their whole gradients by one product, if that can be, and return how many have theirs now."""
    if not all(tap is not None and tap.forms_gradient(input) for tap in taps):
        return 0
    whole = joined(grads, 1)
    if whole is None:
        return 0
    for tap, grad in zip(taps, (whole.T @ input).split([grad.shape[1] for grad in grads]), strict=True):
        assert tap is not None
        tap.accumulate_full(grad)
    return len(taps)


def _rows(factor: Tensor) -> Tensor:
    padded = with_padded_columns(factor)
    return padded.reshape(-1, padded.shape[-1])


@torch.library.impl(_library, "low_rank_linears_input_gradient", "CompositeExplicitAutograd")
def _input_gradient(
    grad_outputs: list[Tensor], weights: list[Tensor], layers: list[Tensor], tapped: list[Tensor], width: int
) -> Tensor:
    first, *others = (_layers[int(layer)] for layer in layers)
    grads = [with_padded_columns(grad) for grad in grad_outputs]
    whole = joined([_rows(grad) for grad in grads], 1) if others else None
    if whole is not None:
        return cut_columns(whole @ first.weight_over(others, whole.dtype), width).view(*grads[0].shape[:-1], width)
    total = first.input_gradient(grads[0], width)
    for layer, grad in zip(others, grads[1:], strict=True):
        total += layer.input_gradient(grad, width)
    return total


@torch.library.register_fake("qgalore::low_rank_linears")
def _(input: Tensor, *rest: Any) -> list[Tensor]:
    return [input.new_empty(*input.shape[:-1], width) for width in rest[-1]]


@torch.library.register_fake("qgalore::low_rank_linears_tap")
def _(grad_outputs: list[Tensor], input: Tensor, layers: list[Tensor], side_by_side: int) -> list[Tensor]:
    return [input.new_empty((), dtype=torch.float32) for _ in layers]


@torch.library.register_fake("qgalore::low_rank_linears_input_gradient")
def _(grad_outputs: list[Tensor], *rest: Any) -> Tensor:
    return grad_outputs[0].new_empty(*grad_outputs[0].shape[:-1], rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, weights, anchors, layers, ctx.frees_input, ctx.side_by_side, _ = inputs
    ctx.trains, ctx.width = len(anchors) > 0, input.shape[-1]
    # The weights are saved too: autograd then refuses a backward through a weight that was changed in between.
    ctx.save_for_backward(*([input] if ctx.trains else []), *weights, *layers)


def _backward(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    input, tapped, grad = saved.pop(0) if ctx.trains else None, [], None
    count = len(saved) // 2
    weights, layers = saved[:count], saved[count:]
    if ctx.trains:
        tapped = torch.ops.qgalore.low_rank_linears_tap(grad_outputs, input, layers, ctx.side_by_side)
    if ctx.needs_input_grad[0]:
        for start, stop in itertools.pairwise((0, *range(ctx.side_by_side, count + 1))):
            part = torch.ops.qgalore.low_rank_linears_input_gradient(
                grad_outputs[start:stop], weights[start:stop], layers[start:stop],
                tapped[start:stop] if ctx.frees_input else [], ctx.width,
            )  # fmt: skip
            grad = part if grad is None else grad + part
    nothing = [None] * count
    return grad, nothing, tapped, nothing, None, None, None


torch.library.register_autograd("qgalore::low_rank_linears", _backward, setup_context=_setup_context)
