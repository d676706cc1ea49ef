"""Which parameters of a model are low-rank, and the param groups of an optimizer made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qgalore.linear import LowRankLinear


def linear_names(model: nn.Module, targets: Iterable[str] = ("self_attn", "mlp")) -> list[str]:
    """Dotted names of the linear layers inside modules whose path has one of `targets`: a LLaMA's attention and MLP."""
    wanted = tuple(targets)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LowRankLinear) and any(part in wanted for part in name.split("."))
    ]


def low_rank_param_groups(model: nn.Module, names: Iterable[str], **low_rank: Any) -> list[dict[str, Any]]:
    """Two param groups: all parameters but the weights of the named linear layers; those weights, with `low_rank`.

    low_rank holds the keys of `qgalore.optimizer`'s table, `rank` among them. A parameter that needs no gradient is
    left out, unless it is the integer weight of a `LowRankLinear`.
    """
    weights: list[Tensor] = [model.get_submodule(name).get_parameter("weight") for name in names]
    chosen = set(weights)
    quantized = {module.weight for module in model.modules() if isinstance(module, LowRankLinear)}
    rest = [p for p in model.parameters() if p not in chosen and (p.requires_grad or p in quantized)]
    return [{"params": rest}, {"params": weights, **low_rank}]
