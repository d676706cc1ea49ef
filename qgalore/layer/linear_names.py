"""Which linear layers of a model are chosen where nobody names them, and what is said of the matrices that are not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qgalore.layer.linear import LowRankLinear

_PARTS_OF_A_BLOCK = ("self_attn", "mlp")
"""What makes the linear layers of a single block known, where it is in no list: as LLaMA calls them."""
_LONGEST_LIST = 8


def linear_names(model: nn.Module, targets: str | Iterable[str] | None = None) -> list[str]:
    """Dotted names of linear layers, in the order of the model: those of its repeated blocks.

    A block is what an `nn.ModuleList` holds, or an `nn.Sequential` of several modules of one class; what has `mlp` or
    `self_attn` in its path counts, too. So embeddings and heads are not chosen. A warning names other matrices of the
    blocks: they can train in a low-rank group, but only an `nn.Linear` can become a `LowRankLinear`.

    targets: take the linear layers whose path has one of these as a whole part instead, such as ("mlp",).

    Raises ValueError where there is no such layer.
    """
    if targets is not None:
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        names = [name for name, _ in _linears(model) if any(part in wanted for part in name.split("."))]
        looked_for = f"inside a module called {' or '.join(map(repr, wanted)) or '(no targets are given)'}"
        others: dict[str, str] = {}
    else:
        blocks = _blocks(model)
        names = [name for name, _ in _linears(model) if _is_inside(name, blocks)]
        looked_for = "inside the blocks of an nn.ModuleList, or inside a module called 'self_attn' or 'mlp'"
        others = dict(_other_matrices(model, blocks))
    if not names:
        linears = _summary({name: f"{_shape_of(layer)}" for name, layer in _linears(model)})
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear {looked_for}. Its nn.Linear layers: {linears or 'none'}. "
            + (f"Other matrices of its blocks: {_summary(others)}. " if others else "")
            + "Give parts of the paths of those that are to be low-rank as targets, or names to low_rank_param_groups, "
            "which also takes other modules with a float matrix as their weight"
        )
    if others:
        warnings.warn(
            f"linear_names leaves out what is no nn.Linear in the blocks of {type(model).__name__}: "
            f"{_summary(others)}. With low_rank_param_groups these train at full rank, as under plain AdamW",
            stacklevel=2,
        )
    return names


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name; raises AttributeError with a sentence where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AttributeError(
            f"{type(model).__name__} has no module {name}: names are those of model.named_modules(), such as "
            f"linear_names finds; its linear layers: {_summary({n: str(_shape_of(m)) for n, m in _linears(model)})}"
        ) from error


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _can_be_chosen(module):
            yield name, module


def _can_be_chosen(module: nn.Module) -> bool:
    # The last class is a part of nn.MultiheadAttention, which reads its weight instead of calling it.
    return isinstance(module, nn.Linear | LowRankLinear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _blocks(model: nn.Module) -> set[str]:
    """Names of the modules that are repeated."""
    found = set()
    for name, module in model.named_modules():
        members = list(module.named_children())
        alike = len(members) > 1 and len({type(member) for _, member in members}) == 1
        if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike):
            found |= {f"{name}.{key}".lstrip(".") for key, _ in members}
    return found


def _is_inside(name: str, blocks: set[str]) -> bool:
    if any(part in _PARTS_OF_A_BLOCK for part in name.split(".")):
        return True
    return any(name[: dot.start()] in blocks for dot in re.finditer(r"\.", name))


def _other_matrices(model: nn.Module, blocks: set[str]) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if _can_be_chosen(module) or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for key, param in module.named_parameters(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            if param.dim() in (2, 3) and _is_inside(full, blocks):
                yield full, f"{_shape(param)} in {type(module).__name__}"


def _shape_of(layer: nn.Module) -> str:
    return f"{layer.out_features} x {layer.in_features}"


def _shape(param: Tensor) -> str:
    return " x ".join(map(str, param.shape))


def _summary(described: dict[str, str]) -> str:
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
