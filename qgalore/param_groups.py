"""Which parameters of a model are low-rank, and the param groups of an optimizer made of them.

The keys of a low-rank group are those that users of q-galore-torch know:

| key | meaning | default |
| --- | --- | --- |
| rank | dimension of the subspace | |
| update_proj_gap | updates between refreshes of a subspace | 200 |
| scale | multiplier of the low-rank update (galore_scale, alpha) | 0.25 |
| proj_type | std, reverse_std, left, right, full: the side that is projected; full: both | std |
| quant, quant_n_bit, quant_group_size | hold the projection in 4 or 8 bits, in groups | by class, 4, 256 |
| cos_threshold, gamma_proj, queue_size | the lazy layer-wise rule; gamma_proj 1 turns it off | 0.4, 2, 5 |
| direction | adam or orthogonal: `qgalore.update.directions` | adam |
| residual | none, or what the projection leaves out: fira, as in `qgalore.subspace.fira` | none |
| max_update_proj_gap | cap of the lazy interval; 0: 8 times the gap | 0 |
| subspace | svd, or streaming: `qgalore.subspace.fit` has both | svd |
| svd_method | full or randomized | full |
| rotate_moments | rotate Adam's moments into a new basis; None: where streaming | None |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qgalore.layer.linear import LowRankLinear
from qgalore.layer.names import module_of
from qgalore.update.directions import DIRECTIONS

LOW_RANK_DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "quant_n_bit": 4,
    "quant_group_size": 256,
    "cos_threshold": 0.4,
    "gamma_proj": 2,
    "queue_size": 5,
    "subspace": "svd",
    "svd_method": "full",
    "rotate_moments": None,
    "max_update_proj_gap": 0,
    "direction": "adam",
    "residual": "none",
}
_CHOICES = {
    "proj_type": ("std", "reverse_std", "left", "right", "full"),
    "subspace": ("svd", "streaming"),
    "svd_method": ("full", "randomized"),
    "quant_n_bit": (4, 8),
    "direction": tuple(DIRECTIONS),
    "residual": ("none", "fira"),
}


def low_rank_param_groups(model: nn.Module, names: Iterable[str], **low_rank: Any) -> list[dict[str, Any]]:
    """Two param groups: all parameters but the weights of the named linear layers; those weights, with `low_rank`.

    low_rank holds keys of the table above, `rank` among them. Frozen parameters are in neither, nor are layers of a
    quantized weight that were frozen. Raises ValueError where no name is given or all that are named is frozen,
    AttributeError for a name that the model does not have.
    """
    named = list(dict.fromkeys(_weight_of(model, name) for name in names))
    if not named:
        raise ValueError(
            f"low_rank_param_groups got no names: nothing of {type(model).__name__} would be low-rank; give those of "
            "linear layers, such as linear_names finds, or model.parameters() to the optimizer for plain AdamW"
        )
    quantized = {layer.weight for layer in model.modules() if isinstance(layer, LowRankLinear) and not layer.frozen}
    trained = [param for param in model.parameters() if param.requires_grad or param in quantized]
    chosen, free = set(named), set(trained)
    weights = [weight for weight in named if weight in free]
    if not weights:
        raise ValueError(
            f"all that is named of {type(model).__name__} is frozen: nothing would be low-rank; free the layers with "
            "requires_grad_(True), or name others"
        )
    return [{"params": [param for param in trained if param not in chosen]}, {"params": weights, **low_rank}]


def _weight_of(model: nn.Module, name: str) -> Tensor:
    module = module_of(model, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise AttributeError(f"{name} is a {type(module).__name__} without a weight: name linear layers")
    return weight


def complete_low_rank(group: dict[str, Any], quant: bool) -> None:
    """Fill in the keys that a low-rank group lacks, `quant` among them; raises ValueError for what makes no sense.

    A rank of None is no rank.
    """
    if group.get("rank") is None:
        group.pop("rank", None)
        return
    for key, value in (LOW_RANK_DEFAULTS | {"quant": quant}).items():
        group.setdefault(key, value)
    if group["rotate_moments"] is None:
        group["rotate_moments"] = group["subspace"] == "streaming"
    for key, choices in _CHOICES.items():
        if group[key] not in choices:
            raise ValueError(f"{key}={group[key]!r} is unknown: it must be one of {', '.join(map(str, choices))}")
    for key in ("rank", "update_proj_gap", "quant_group_size", "queue_size"):
        if int(group[key]) < 1:
            raise ValueError(f"{key}={group[key]} must be at least 1")
    if group["subspace"] == "streaming" and group["proj_type"] == "full":
        raise ValueError("proj_type='full' needs subspace='svd': a streaming subspace has one side")
    if group["residual"] != "none" and group["proj_type"] == "full":
        raise ValueError(f"residual={group['residual']!r} scales across one projected side: proj_type='full' has two")


def check_low_rank(group: dict[str, Any]) -> None:
    """Raise ValueError for a group that has a rank and, with the optimizer's defaults, makes no sense."""
    if "rank" not in group:
        return
    if not group["params"]:
        raise ValueError(
            f"a param group with rank={group['rank']} has no parameters: nothing would be low-rank; leave the group "
            "out for plain AdamW, or give it matrices"
        )
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            "weight_decay of a group with a rank is decoupled (AdamW): the gradient of an L2 penalty does not lie "
            "in the subspace; leave decoupled_weight_decay=False out or set weight_decay=0"
        )
