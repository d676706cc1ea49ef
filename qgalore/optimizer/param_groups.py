"""Which parameters of a model are low-rank, and the param groups of an optimizer made of them.

The options of a low-rank group are those of `qgalore.config.SubspaceConfig`, as one object or one by one; `scale`,
`quant`, `quant_n_bit` and `quant_group_size`, as users of q-galore-torch know them, are `galore_scale`, `proj_quant`,
`proj_bits` and `proj_group_size`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qgalore.config import SubspaceConfig, complete_group, complete_names, scaled_too_late, subspace_of
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.linear_names import module_of

ACCUMULATOR_DTYPES = ("float32", "bfloat16", "int8")
"""In which gradients are summed over micro-batches."""


def low_rank_param_groups(
    model: nn.Module, names: Iterable[str], config: SubspaceConfig | None = None, **low_rank: Any
) -> list[dict[str, Any]]:
    """Two param groups: all parameters but the weights of the named linear layers; those weights, with `config`.

    names: also those of matrices themselves, as `named_parameters` has them. low_rank: further keys of the second
    group, such as lr, or instead of `config` its options one by one, `rank` among them. Frozen parameters are in
    neither, nor are layers of a quantized weight that were frozen. Raises ValueError where no name is given, all that
    are named is frozen or a weight cannot have the rank, AttributeError for a name that the model does not have.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    named = list(dict.fromkeys(params[name] if name in params else _weight_of(model, name) for name in names))
    if not named:
        raise ValueError(
            f"low_rank_param_groups got no names: nothing of {type(model).__name__} would be low-rank; give those of "
            "linear layers, such as linear_names finds, or model.parameters() to the optimizer for plain AdamW"
        )
    quantized = {layer.weight for layer in _low_rank_linears(model) if not layer.frozen}
    trained = [param for param in model.parameters() if param.requires_grad or param in quantized]
    chosen, free = set(named), set(trained)
    weights = [weight for weight in named if weight in free]
    if not weights:
        raise ValueError(
            f"all that is named of {type(model).__name__} is frozen: nothing would be low-rank; free the layers with "
            "requires_grad_(True), or name others"
        )
    if config is not None:
        if not isinstance(config, SubspaceConfig):
            raise TypeError(f"config={config!r} must be a SubspaceConfig, such as SubspaceConfig(rank=128)")
        twice = sorted({field.name for field in dataclasses.fields(config)} & complete_names(low_rank))
        if twice:
            raise ValueError(f"{', '.join(twice)} beside a SubspaceConfig: put all options of the subspace into it")
        # What is at its default is left to the class of the optimizer, as where options are given one by one.
        low_rank["rank"] = config.rank
        for field in dataclasses.fields(config):
            if getattr(config, field.name) != field.default:
                low_rank[field.name] = getattr(config, field.name)
    _check_rank(model, weights, low_rank)
    return [{"params": [param for param in trained if param not in chosen]}, {"params": weights, **low_rank}]


def _check_rank(model: nn.Module, weights: Iterable[Tensor], options: dict[str, Any]) -> None:
    """Raise ValueError, with its name, for a weight that cannot have the rank among `options`, where there is one."""
    if options.get("rank") is None:
        return
    config = subspace_of(complete_group(options))
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    shapes: dict[Tensor, tuple[int, ...]] = {
        layer.weight: (layer.out_features, layer.in_features) for layer in _low_rank_linears(model)
    }
    for weight in weights:
        config.check_shape(shapes.get(weight, tuple(weight.shape)), names[weight])


def _low_rank_linears(model: nn.Module) -> list[LowRankLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def _weight_of(model: nn.Module, name: str) -> Tensor:
    module = module_of(model, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise AttributeError(f"{name} is a {type(module).__name__} without a weight: name linear layers")
    return weight


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a param group whose subspace, with the optimizer's defaults, makes no sense."""
    if "rank" not in group:
        return
    if not group["params"]:
        raise ValueError(
            f"a param group with rank={group['rank']} has no parameters: nothing would be low-rank; leave it "
            "out for plain AdamW, or give it matrices"
        )
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            "weight_decay of a group with a rank is decoupled (AdamW): the gradient of an L2 penalty does not lie "
            "in the subspace; leave decoupled_weight_decay=False out or set weight_decay=0"
        )
    if group.get("sum_in_momentum") and group["norm_growth"]:
        given, instead = f"norm_growth={group['norm_growth']!r}", "set norm_growth=0 in that group"
        raise ValueError(scaled_too_late(given, "sum_in_momentum", instead))
    for number, param in enumerate(group["params"]):
        if param.is_floating_point():  # of a quantized weight its layer alone knows the shape
            subspace_of(group).check_shape(tuple(param.shape), f"number {number} of its group")


def check_rates(values: Mapping[str, Any]) -> None:
    """Raise ValueError where a hyperparameter of Adam among `values`, by name, is no finite number or out of range."""
    for name in ("lr", "eps"):
        if name in values and not (is_finite(values[name]) and values[name] >= 0):
            raise ValueError(f"{name}={values[name]!r} must be a finite number, at least 0")
    check_common(values)
    if "betas" not in values:
        return
    betas = values["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not pair or not all(is_finite(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas!r} must be two numbers, each at least 0 and less than 1")


def check_common(values: Mapping[str, Any]) -> None:
    """Raise ValueError where a hyperparameter that all optimizers here have makes no sense, if it is among `values`."""
    for name in ("weight_decay", "norm_growth"):
        if name in values and not (is_finite(values[name]) and values[name] >= 0):
            raise ValueError(f"{name}={values[name]!r} must be a finite number, at least 0")
    growth = values.get("norm_growth", 0.0)
    if 0 < growth < 1:
        raise ValueError(
            f"norm_growth={growth!r} must be at least 1, such as 1.01, or 0 for no limit: with less than 1 every "
            "gradient would shrink away"
        )
    for name, known in (
        ("accumulator_dtype", ACCUMULATOR_DTYPES), ("second_moment", ("value", "row")), ("state_bits", (32, 8)),
    ):  # fmt: skip
        if name in values and values[name] not in known:
            raise ValueError(f"{name}={values[name]!r} is unknown: it must be one of {', '.join(map(str, known))}")


def check_seed(seed: object) -> None:
    """Raise ValueError for what is no seed of the stochastic rounding."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed={seed!r} must be a whole number")


def is_finite(value: Any) -> bool:
    """Whether a value is a number, or a tensor of one, and finite."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
