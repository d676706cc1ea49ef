"""The matrices of a model that can be low-rank, and which of their layers can hold a quantized weight.

Chosen by themselves are the linear layers of the repeated blocks (`qgalore.layer.linear_names`) but the model's head,
and the stacks of matrices there, such as experts.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgalore.layer.linear import LowRankLinear
from qgalore.layer.linear_names import (
    check_replaceable,
    in_words,
    is_in_blocks,
    linear_layers,
    linears_in_words,
    module_of,
    parts_beside_weight,
    shape_of,
)
from qgalore.layer.stacks import matrices_of, stack_names


@dataclass(frozen=True)
class Choice:
    """The chosen matrices of a model by name, with their shapes; nothing is changed yet."""

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Linear layers: (out_features, in_features)."""
    stacks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """3-D parameters: (matrices, rows, columns)."""
    float_only: dict[str, str] = field(default_factory=dict)
    """Of the linear layers those that cannot be converted, and why."""


def choose_matrices(model: nn.Module, names: Iterable[str] | None = None) -> Choice:
    """Choose matrices of a model: all linear layers and stacks of its blocks, or those that are named.

    names: of linear layers, of 3-D parameters, or of modules that hold some of those themselves, such as experts.
    Raises ValueError where nothing is chosen, with the linear layers that there are; for a weight that is not float;
    AttributeError for a name that the model does not have; TypeError for one of another module, and for a layer that
    cannot be replaced (`check_replaceable`).
    """
    stacks = {name: _stack_shape(model, name) for name in stack_names(model)}
    modules = dict(model.named_modules())
    if names is None:
        heads = [head for head in (_head_of(module) for module in modules.values()) if head is not None]
        in_blocks, layers = is_in_blocks(model), linear_layers(model)
        linears = [x for x in layers if in_blocks(x) and not any(layers[x] is head for head in heads)]
        chosen = [name for name in stacks if in_blocks(name)]
        problem = "none of its linear layers is in a repeated block: give names"
    else:
        linears, chosen = _named(model, [names] if isinstance(names, str) else list(names), list(stacks))
        problem = "names is empty"
    if not linears and not chosen:
        found = linears_in_words(model) or "none"
        if stacks:
            found += f"; its stacks of matrices: {in_words({n: ' x '.join(map(str, s)) for n, s in stacks.items()})}"
        raise ValueError(f"nothing of {type(model).__name__} would be low-rank: {problem}. Its linear layers: {found}")
    for name in linears:
        check_replaceable(modules[name], name)
        weight = modules[name].get_parameter("weight")
        if not weight.is_floating_point() and not isinstance(modules[name], LowRankLinear):
            raise ValueError(
                f"the weight of {name} is {weight.dtype}, quantized by another library: load the model in float"
            )
    shapes = {name: shape_of(modules[name]) for name in linears}
    return Choice(shapes, {name: stacks[name] for name in chosen}, why_float(model, linears))


def _named(model: nn.Module, names: list[str], stacks: list[str]) -> tuple[list[str], list[str]]:
    """Given names as those of linear layers and those of stacks, each once."""
    linears: dict[str, None] = {}
    chosen: dict[str, None] = {}
    known = linear_layers(model)
    for name in names:
        own = [stack for stack in stacks if stack == name or stack.rpartition(".")[0] == name]
        if own:
            chosen |= dict.fromkeys(own)
        elif name in known:
            linears[name] = None
        else:
            kind = type(module_of(model, name)).__name__
            raise TypeError(
                f"{name} is a {kind}: name linear layers, which are {linears_in_words(model) or 'none'}, or parameters "
                "that are stacks of matrices"
            )
    return list(linears), list(chosen)


def _stack_shape(model: nn.Module, name: str) -> tuple[int, int, int]:
    matrices = list(matrices_of(model, name).values())
    count, rows, columns = (len(matrices), *matrices[0].shape) if matrices else model.get_parameter(name).shape
    return count, rows, columns


def _head_of(module: nn.Module) -> object:
    """The head of a model of transformers; None for other modules."""
    ask = getattr(type(module), "get_output_embeddings", None)
    return None if ask is None else ask(module)


def why_float(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of linear layers, by name, those that cannot hold a quantized weight, and why."""
    holders = Counter(id(param) for module in model.modules() for param in module._parameters.values())
    return {name: why for name in names if (why := _why_float(model, name, holders))}


def _why_float(model: nn.Module, name: str, holders: Counter[int]) -> str:
    """holders: how many modules hold the parameter of an id."""
    layer, (path, _, child) = model.get_submodule(name), name.rpartition(".")
    if isinstance(layer, LowRankLinear):
        return ""
    parent: Any = type(model.get_submodule(path))
    if not child.isdigit() and re.search(rf"\bself\.{child}\.weight\b", _source(parent)):
        return f"code of {parent.__name__} reads the weight"
    if parts_beside_weight(layer):  # which may compute the same only as long as they are at their initial values
        return f"{type(layer).__name__} holds more than weight and bias"
    if isinstance(layer, nn.Linear) and not _computes_as_linear(layer):
        return f"{type(layer).__name__} computes more than a linear layer"
    return "another module has the weight, too" if holders[id(layer.weight)] > 1 else ""


@torch.no_grad()
def _computes_as_linear(layer: nn.Linear) -> bool:
    """Whether a layer gives what `nn.Linear` would, tried where its class has a forward of its own, as a router has."""
    if type(layer).forward is nn.Linear.forward:
        return True
    x = torch.ones(2, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        found = type(layer).forward(layer, x)
    except Exception:  # of code that is not ours
        return False
    expected = F.linear(x, layer.weight, layer.bias)
    alike = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return alike and (found.is_meta or torch.allclose(found, expected, rtol=1e-2, atol=1e-3))


@cache
def _source(kind: Any) -> str:
    """The source of a class and of those that it inherits from, as far as there is any."""
    texts = []
    for each in inspect.getmro(kind):
        if each is not nn.Module and issubclass(each, nn.Module):
            try:
                texts.append(inspect.getsource(each))
            except (OSError, TypeError):
                continue
    return "\n".join(texts)
