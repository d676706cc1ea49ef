"""Which linear layers of a model are chosen where nobody names them, and what is said of the matrices that are not."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qgalore.layer.linear import LowRankLinear

_PARTS_OF_A_BLOCK = ("self_attn", "mlp")
"""What makes the linear layers of a single block known, where it is in no list: as LLaMA calls them."""
_LONGEST_LIST = 8


def linear_names(model: nn.Module, targets: str | Iterable[str] | None = None) -> list[str]:
    """Dotted names of linear layers, in the order of the model: those of its repeated blocks.

    A linear layer is an `nn.Linear`, a `LowRankLinear` or a `Conv1D` of transformers.

    A block is what an `nn.ModuleList` holds, or an `nn.Sequential` of several modules of one class; what has `mlp` or
    `self_attn` in its path counts, too. So embeddings and heads are not chosen. A warning names other matrices of the
    blocks: they can train in a low-rank group, but only a linear layer can become a `LowRankLinear`.

    targets: take the linear layers whose path has one of these as a whole part instead, such as ("mlp",).

    Raises ValueError where there is no such layer.
    """
    if targets is not None:
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        names = [name for name in linear_layers(model) if any(part in wanted for part in name.split("."))]
        looked_for = f"inside a module called {' or '.join(map(repr, wanted)) or '(no targets are given)'}"
        others: dict[str, str] = {}
    else:
        in_blocks = is_in_blocks(model)
        names = [name for name in linear_layers(model) if in_blocks(name)]
        looked_for = "inside the blocks of an nn.ModuleList, or inside a module called 'self_attn' or 'mlp'"
        others = dict(_other_matrices(model, in_blocks))
    if not names:
        linears = linears_in_words(model)
        raise ValueError(
            f"{type(model).__name__} has no linear layer {looked_for}. Its linear layers: {linears or 'none'}. "
            + (f"Other matrices of its blocks: {in_words(others)}. " if others else "")
            + "Give parts of the paths of those that are to be low-rank as targets, or names to low_rank_param_groups, "
            "which also takes other modules with a float matrix as their weight"
        )
    if others:
        warnings.warn(
            f"linear_names leaves out what is no linear layer in the blocks of {type(model).__name__}: "
            f"{in_words(others)}. With low_rank_param_groups these train at full rank, as under plain "
            "AdamW; optimizer_for takes stacks of matrices, such as experts, too",
            stacklevel=2,
        )
    return names


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of a model by dotted name, but for parts of `nn.MultiheadAttention`."""
    return {name: module for name, module in model.named_modules() if _can_be_chosen(module)}


def is_in_blocks(model: nn.Module) -> Callable[[str], bool]:
    """A function that says whether a module or parameter, given its name, is inside a block (see `linear_names`)."""
    blocks = _blocks(model)

    def is_inside(name: str) -> bool:
        if any(part in _PARTS_OF_A_BLOCK for part in name.split(".")):
            return True
        return any(name[: dot.start()] in blocks for dot in re.finditer(r"\.", name))

    return is_inside


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; raises AttributeError with a sentence where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AttributeError(
            f"{type(model).__name__} has no module {name}: names are those of model.named_modules(), such as "
            f"linear_names finds; its linear layers: {linears_in_words(model)}"
        ) from error


def linears_in_words(model: nn.Module) -> str:
    """The linear layers of a model with their shapes, those that differ in a number alone as one; "" for none."""
    return in_words({name: _shape(shape_of(layer)) for name, layer in linear_layers(model).items()})


def check_replaceable(layer: nn.Module, name: str) -> None:
    """Raise TypeError for a linear layer that nothing can take the place of without a loss.

    That is the model itself, and one whose weight is made of other parameters (`parametrize`, `prune`).
    """
    if not name:
        raise TypeError(
            f"the model is itself a {type(layer).__name__}, and layers are replaced inside a model: put it into one, "
            "such as nn.Sequential(layer), whose layer is called 0"
        )
    if "weight" not in layer._parameters:
        raise TypeError(
            f"the weight of {name} is computed from other parameters, as with torch.nn.utils.parametrize and prune: "
            "make it one parameter first (remove_parametrizations, prune.remove), or give names without it"
        )


def parts_beside_weight(layer: nn.Module) -> list[str]:
    """Names of what a linear layer holds beside weight and bias, such as the factors of LoRA: a `LowRankLinear` cannot.

    Of a `LowRankLinear` itself there are none.
    """
    if isinstance(layer, LowRankLinear):
        return []
    found = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    return [name for name in found if name not in ("weight", "bias")]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a `Conv1D` of transformers: a linear layer with a weight (in_features, out_features)."""
    found = sys.modules.get("transformers.pytorch_utils")  # without which no model has one
    return found is not None and isinstance(module, found.Conv1D)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, however its weight is stored."""
    if isinstance(layer, nn.Linear | LowRankLinear):
        return layer.out_features, layer.in_features
    rows, columns = layer.get_parameter("weight").shape
    return columns, rows


def _can_be_chosen(module: nn.Module) -> bool:
    # The last class is a part of nn.MultiheadAttention, which reads its weight instead of calling it.
    linear = isinstance(module, nn.Linear | LowRankLinear) or is_conv1d(module)
    return linear and not isinstance(module, NonDynamicallyQuantizableLinear)


def _blocks(model: nn.Module) -> set[str]:
    """Names of the modules that are repeated."""
    found = set()
    for name, module in model.named_modules():
        members = list(module.named_children())
        alike = len(members) > 1 and len({type(member) for _, member in members}) == 1
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike):
            found |= {f"{name}.{key}".lstrip(".") for key, _ in members}
    return found


def _other_matrices(model: nn.Module, in_blocks: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if _can_be_chosen(module) or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for key, param in module.named_parameters(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            if param.dim() in (2, 3) and in_blocks(full):
                yield full, f"{_shape(param.shape)} in {type(module).__name__}"


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def in_words(described: dict[str, str]) -> str:
    """Names with their descriptions, those that differ in a number alone as one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, description in described.items():
        alike.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), description), []).append(name)
    texts = [
        f"{pattern} ({len(names)} of {description})" if len(names) > 1 else f"{names[0] or 'itself'} ({description})"
        for (pattern, description), names in alike.items()
    ]
    more = f" and {len(texts) - _LONGEST_LIST} more kinds" if len(texts) > _LONGEST_LIST else ""
    return ", ".join(texts[:_LONGEST_LIST]) + more
