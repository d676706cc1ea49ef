"""State dicts of an optimizer: in one order as they are saved, and under its parameters as they are loaded.

`torch.optim.Optimizer.load_state_dict` gives a state to the parameter that stands where its id stands in the param
groups, whatever ids are: numbers, or names as those of `torch.distributed.checkpoint`. It also casts floating state to
the dtype of the parameter, which would round float32 moments of bfloat16 weights; but a state whose key is a parameter
already is taken as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from qgalore.config import SubspaceConfig, complete_group, subspace_of

Group = dict[str, Any]
PartOf = Callable[[Tensor, str, Tensor], Tensor | None]
"""part_of(parameter, name, entry) -> what is kept of an entry of a state; None for nothing."""
HomeOf = Callable[[Tensor, str, Tensor], torch.device]
"""home_of(parameter, name, entry) -> where an entry of a state lies between updates."""

_GROUP_KEYS = (
    "lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "accumulator_dtype", "norm_growth",
    "second_moment", "cautious_decay", "state_bits", "clip_threshold", "decay_rate", "beta1", "scale_parameter",
    "relative_step", "warmup_init",
)  # fmt: skip
"""What every param group needs of Adam or of Adafactor, whichever ours has. Not `Optimizer.defaults`: loading and
copying make torch add keys of its own to it."""
_LATER_KEYS = {"norm_growth": 0.0, "second_moment": "value", "cautious_decay": False}
"""Keys that came later: what states that do not know them were made with. Options of a subspace have their defaults."""


def state_for(groups: list[Group], saved: dict[str, Any], part_of: PartOf | None, home_of: HomeOf) -> dict[str, Any]:
    """`saved`, a state dict, with groups as `groups` need them and the state of each parameter under the parameter.

    Tensors are copies in the dtypes they were saved in, each where `home_of` says; `saved` stays as it is. As torch
    does, the saved hyperparameters are taken; a warning names options of a subspace that were others. part_of: what of
    each entry is copied, if not all. Raises ValueError for the state of another optimizer or model.
    """
    _check_groups(groups, saved["param_groups"])
    loaded = [complete_group(_LATER_KEYS | group) for group in saved["param_groups"]]
    ids = itertools.chain.from_iterable(group["params"] for group in loaded)
    params = itertools.chain.from_iterable(group["params"] for group in groups)
    owners: dict[Any, Tensor] = dict(zip(ids, params, strict=True))
    unknown = [str(key) for key in saved["state"] if key not in owners]
    if unknown:
        raise ValueError(
            f"the state to load has entries of parameters that its param groups do not have: {', '.join(unknown[:3])}"
        )
    _check_codes_have_state(owners, saved["state"])
    _warn_of_other_subspaces(groups, loaded)
    state = {
        owners[key]: _placed(key, entries, owners[key], part_of, home_of)
        for key, entries in saved["state"].items()
        if entries
    }
    return saved | {"state": state, "param_groups": loaded}


def in_order(state_dict: dict[str, Any], owned: Container[int] | None) -> dict[str, Any]:
    """torch's state dict of an optimizer, with states in the order of the groups, and keys of these by the alphabet.

    owned: the numbers of parameters whose states are kept; None for all.
    """
    ids, state = (index for group in state_dict["param_groups"] for index in group["params"]), state_dict["state"]
    groups = [dict(sorted(group.items())) for group in state_dict["param_groups"]]
    if owned is not None:
        state = {index: entries for index, entries in state.items() if index in owned}
    return {"state": {index: state[index] for index in ids if index in state} | state, "param_groups": groups}


def _check_groups(groups: list[Group], loaded: list[Group]) -> None:
    """Raise ValueError where a loaded group is of another kind than ours at its position."""
    other = "it was saved by another optimizer or with other param groups"
    if len(groups) != len(loaded):
        raise ValueError(f"the optimizer has {len(groups)} param groups, the state to load {len(loaded)}: {other}")
    for number, (ours, group) in enumerate(zip(groups, loaded, strict=True)):
        kinds = ["with a rank" if "rank" in each else "without a rank" for each in (ours, group)]
        lacking = sorted({*_GROUP_KEYS} & ours.keys() - group.keys() - _LATER_KEYS.keys())
        if kinds[0] != kinds[1] or lacking:
            lacks = f" and lacks {', '.join(lacking)}" if lacking else ""
            raise ValueError(
                f"param group {number} is {kinds[0]}, that of the state to load is {kinds[1]}{lacks}: {other}"
            )
        counts = len(ours["params"]), len(group["params"])
        if counts[0] != counts[1]:
            raise ValueError(
                f"param group {number} has {counts[0]} parameters, that of the state to load {counts[1]}: {other}"
            )


def _warn_of_other_subspaces(groups: list[Group], loaded: list[Group]) -> None:
    differ: dict[str, str] = {}
    for ours, group in zip(groups, loaded, strict=True):
        if "rank" in ours:
            here, saved = subspace_of(ours), subspace_of(group)
            alike = {"rotate_moments"} if here.rotates_moments == saved.rotates_moments else set()
            fields = {field.name for field in dataclasses.fields(SubspaceConfig)} - alike
            differ |= {x: f"{x}={group[x]!r}, here {ours[x]!r}" for x in sorted(fields) if ours[x] != group[x]}
    if differ:
        warnings.warn(
            f"the state to load was saved with {'; '.join(differ.values())}: training goes on with what was saved; for "
            "other options begin with a fresh optimizer",
            stacklevel=2,
        )


def _check_codes_have_state(owners: Mapping[Any, Tensor], state: Mapping[Any, Any]) -> None:
    """Raise ValueError where a state by names has lost what belongs to quantized weights.

    `set_optimizer_state_dict` of `torch.distributed.checkpoint` drops the state of parameters that need no gradient,
    and an integer parameter cannot need one.
    """
    codes = [key for key, param in owners.items() if not param.is_floating_point()]
    by_name = any(isinstance(key, str) for key in state)
    if by_name and codes and not any(state.get(key) for key in codes):
        raise ValueError(
            f"the state to load has none of the quantized weights ({codes[0]} is one): set_optimizer_state_dict of "
            "torch.distributed.checkpoint leaves out parameters without requires_grad; save and load with "
            "qgalore.integrations.TrainingState, or give what get_optimizer_state_dict returned (not flattened) to "
            "this optimizer's load_state_dict"
        )


def _placed(
    key: Any, entries: Mapping[str, Any], param: Tensor, part_of: PartOf | None, home_of: HomeOf
) -> dict[str, Tensor]:
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the state of parameter {key} has a {type(value).__name__} as {name} where a tensor should be: it was "
                "saved by another optimizer or in part"
            )
    parts = {name: value if part_of is None else part_of(param, name, value) for name, value in entries.items()}
    return {name: part.to(home_of(param, name, part), copy=True) for name, part in parts.items() if part is not None}
