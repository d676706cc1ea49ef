"""Turns linear layers of a model into low-rank ones, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qgalore.config import WeightFormat
from qgalore.layer.export import save_floats_too
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.linear_names import check_replaceable, is_conv1d, linears_in_words, module_of, parts_beside_weight


def low_rank_linear(linear: nn.Module, format: WeightFormat, **options: bool) -> LowRankLinear:
    """A `LowRankLinear` instead of an `nn.Linear` or a `Conv1D` of transformers; options as of `LowRankLinear`."""
    if isinstance(linear, nn.Linear):
        return LowRankLinear.from_linear(linear, format, **options)
    return LowRankLinear.from_conv1d(linear, format, **options)


def convert_linears(model: nn.Module, names: Iterable[str], format: WeightFormat) -> None:
    """Replace the named `nn.Linear` modules of a model by `LowRankLinear`, in place, wherever the model uses them.

    A `Conv1D` of transformers, as GPT-2 has it, is taken too: `LowRankLinear.transposed`. A layer that was frozen stays
    so, in every format: `LowRankLinear.frozen`. Raises TypeError for other modules, the model itself, a layer whose
    weight is computed from other parameters and one that holds more than weight and bias, AttributeError for names that
    the model does not have, ValueError for no names at all and for a weight that another module holds, too, such as an
    embedding.

    `save_pretrained` of the model, and of its parts, writes quantized weights as floats beside their codes from then on
    (`qgalore.layer.export.save_floats_too`). So give the whole model, rather than a part of it.
    """
    chosen = list(names)
    if not chosen:
        raise ValueError(
            f"convert_linears got no names: nothing of {type(model).__name__} would be converted; give those of linear "
            f"layers, such as linear_names finds; its linear layers: {linears_in_words(model) or 'none'}"
        )
    # By id: each float weight is freed as soon as its layer is replaced.
    holders = Counter(id(param) for module in model.modules() for param in module._parameters.values())
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            parents.setdefault(id(module), []).append((parent, child))
    for name in chosen:
        linear = module_of(model, name)
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(
                f"{name} is a {type(linear).__name__}: only nn.Linear, and Conv1D of transformers, can become a "
                "LowRankLinear"
            )
        if isinstance(linear, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"{name} is a part of nn.MultiheadAttention, which reads its weight: it cannot be converted"
            )
        check_replaceable(linear, name)
        if parts := parts_beside_weight(linear):
            raise TypeError(
                f"{name} is a {type(linear).__name__} with {', '.join(parts)} beside weight and bias, which a "
                "LowRankLinear would lose: leave its name out"
            )
        if holders[id(linear.weight)] > 1:
            raise ValueError(f"{name}.weight is a parameter of another module, too: a LowRankLinear cannot share it")
        layer = low_rank_linear(linear, format)
        for parent, child in parents[id(linear)]:
            setattr(parent, child, layer)
    if format.stored_bits is not None:
        save_floats_too(model)
