"""One configuration of a subspace: param groups, state dicts and the command line take its options from one class."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.groups import SubspaceArgs
from peft_pretraining.config.parse import parse_args
from qgalore import QGaLoreAdamW8bit
from qgalore.config import GROUP_KEY, SubspaceConfig, limits_of, spread_subspace, take_subspace
from qgalore.update.directions import DIRECTIONS

THEIRS = {"rank": 4, "scale": 0.5, "quant": True, "quant_n_bit": 8, "quant_group_size": 64}
OURS = {"rank": 4, "galore_scale": 0.5, "proj_quant": True, "proj_bits": 8, "proj_group_size": 64}


def optimizer_of(**group: Any) -> QGaLoreAdamW8bit:
    return QGaLoreAdamW8bit([{"params": [nn.Parameter(torch.ones(8, 8))], **group}], lr=0.1)


@pytest.mark.parametrize("group", [THEIRS, OURS, {GROUP_KEY: SubspaceConfig(**OURS)}])
def test_options_are_taken_under_any_of_their_names(group: dict[str, Any]) -> None:
    assert optimizer_of(**group).param_groups[0][GROUP_KEY] == SubspaceConfig(**OURS)


def test_a_param_group_that_a_caller_keeps_is_not_changed() -> None:
    group = {"params": [nn.Parameter(torch.ones(8, 8))], **THEIRS}
    before = dict(group)
    QGaLoreAdamW8bit([group], lr=0.1)
    assert group == before


def test_a_state_dict_has_plain_values_and_loads_without_pickle() -> None:
    optimizer = optimizer_of(**THEIRS)
    (group,) = optimizer.state_dict()["param_groups"]
    assert {name: group[name] for name in OURS} == OURS and GROUP_KEY not in group
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = optimizer_of(rank=4, scale=1.0, quant_n_bit=8, quant_group_size=64)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0][GROUP_KEY] == SubspaceConfig(**OURS)


def test_groups_of_checkpoints_of_version_0_1_are_read() -> None:
    optimizer = optimizer_of(**THEIRS)
    state = optimizer.state_dict()
    old = {**state["param_groups"][0], "rotate_moments": False}
    for theirs, ours in zip(THEIRS, OURS, strict=True):
        old[theirs] = old.pop(ours)
    optimizer.load_state_dict({**state, "param_groups": [old]})
    assert optimizer.param_groups[0][GROUP_KEY] == SubspaceConfig(**OURS, rotate_moments=False)


def test_a_copy_keeps_its_options() -> None:
    optimizer = copy.deepcopy(optimizer_of(**THEIRS))
    assert optimizer.param_groups[0][GROUP_KEY] == SubspaceConfig(**OURS)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8, 8)
    optimizer.step()


def test_options_can_be_exchanged_during_a_run_and_nothing_else_can() -> None:
    optimizer = optimizer_of(**OURS)
    group = optimizer.param_groups[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        group[GROUP_KEY].galore_scale = 1.0
    (weight,) = optimizer.low_rank_weights()
    before = weight._step_size
    group[GROUP_KEY] = dataclasses.replace(group[GROUP_KEY], galore_scale=1.0)
    assert weight._step_size == 2 * before


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"quant_n_bit": 3, "rank": 4}, "quant_n_bit=3 is unknown: it must be one of 4, 8"),
        ({"proj_bits": 3, "rank": 4}, "proj_bits=3 is unknown"),
        ({"scale": -1.0, "rank": 4}, "scale=-1.0 must be more than 0"),
        ({"scale": 0.5}, "a param group has scale and no rank"),
        ({"scale": 0.5, GROUP_KEY: SubspaceConfig(rank=4)}, "scale beside subspace_config"),
        ({"rank": 4, "residual": "fira", "proj_type": "full"}, "residual='fira' scales across one projected side"),
        ({"rank": 4, "max_update_proj_gap": 5}, "max_update_proj_gap=5 is less than update_proj_gap=200"),
    ],
)
def test_what_makes_no_sense_is_named_as_it_was_given(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        take_subspace(group)


def test_choices_are_those_that_there_are() -> None:
    assert limits_of(SubspaceConfig)["direction"].choices == tuple(DIRECTIONS)


def test_every_option_is_a_flag_with_its_limits_and_help() -> None:
    specs = {spec.name: spec for spec in read_specs(SubspaceArgs)}
    for field in dataclasses.fields(SubspaceConfig):
        spec = specs[field.name]
        assert spec.help, field.name
        if field.name in limits_of(SubspaceConfig):
            of_flag, of_option = vars(spec.flag) | {"parse": None}, vars(limits_of(SubspaceConfig)[field.name])
            assert of_flag == of_option | {"parse": None}
        if field.name not in ("rank", "galore_scale", "update_proj_gap"):  # the official command line's own
            assert spec.default == field.default


def test_a_command_line_gives_the_options(root: Path) -> None:
    argv = ["--model_config", str(root / "configs/llama_9m.json"), "--batch_size", "2", "--dataset", "pydocs"]
    argv += ["--optimizer", "q_galore_adamw8bit", "--recipe", "paper", "--rank", "8", "--galore_scale", "0.5"]
    config = parse_args([*argv, "--proj_bits", "8"]).subspace.config()
    assert config == SubspaceConfig(rank=8, galore_scale=0.5, proj_bits=8, update_proj_gap=50, max_update_proj_gap=400)
    assert type(config) is SubspaceConfig


def test_plain_values_and_options_are_inverses() -> None:
    group = take_subspace({"lr": 1.0, **THEIRS})
    assert take_subspace(spread_subspace(group)) == group and spread_subspace({"lr": 1.0}) == {"lr": 1.0}
