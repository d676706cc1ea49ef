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

from peft_pretraining.config.flag_groups import AUTO, SubspaceArgs
from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.parse import parse_args
from qgalore import GaLoreAdamW8bit, QGaLoreAdamW8bit, low_rank_param_groups
from qgalore.config import SubspaceConfig, complete_group, limits_of, subspace_of
from qgalore.update.directions import DIRECTIONS

THEIRS = {"rank": 4, "scale": 0.5, "quant": True, "quant_n_bit": 8, "quant_group_size": 64}
OURS = {"rank": 4, "galore_scale": 0.5, "proj_quant": True, "proj_bits": 8, "proj_group_size": 64}


def optimizer_of(**group: Any) -> QGaLoreAdamW8bit:
    return QGaLoreAdamW8bit([{"params": [nn.Parameter(torch.ones(8, 8))], **group}], lr=0.1)


@pytest.mark.parametrize("group", [THEIRS, OURS, dataclasses.asdict(SubspaceConfig(**OURS))])
def test_options_are_taken_under_either_name_and_kept_under_ours(group: dict[str, Any]) -> None:
    found = optimizer_of(**group).param_groups[0]
    assert subspace_of(found) == SubspaceConfig(**OURS)
    assert not found.keys() & (THEIRS.keys() - OURS.keys())


def test_groups_are_made_of_a_whole_configuration() -> None:
    config = SubspaceConfig(rank=4, subspace="streaming")
    groups = low_rank_param_groups(nn.Sequential(nn.Linear(8, 8)), ["0"], config, lr=0.5)
    group = GaLoreAdamW8bit(groups).param_groups[1]
    assert subspace_of(group) == config and group["lr"] == 0.5


def test_a_configuration_means_what_its_options_mean_one_by_one() -> None:
    groups = []
    for given in ({"config": SubspaceConfig(rank=4)}, {"rank": 4}, {"config": SubspaceConfig(rank=4, proj_quant=True)}):
        net = nn.Sequential(nn.Linear(8, 8))
        groups.append(QGaLoreAdamW8bit(low_rank_param_groups(net, ["0"], **given)).param_groups[1])  # type: ignore[arg-type]
    assert [subspace_of(group) for group in groups] == [SubspaceConfig(rank=4, proj_quant=True)] * 3
    with pytest.raises(ValueError, match="galore_scale, rank beside a SubspaceConfig"):
        low_rank_param_groups(nn.Sequential(nn.Linear(8, 8)), ["0"], SubspaceConfig(rank=4), rank=8, scale=1.0)


def test_the_whole_space_takes_no_options_of_projections() -> None:
    group = optimizer_of(rank="full", direction="orthogonal").param_groups[0]
    assert subspace_of(group) == SubspaceConfig(rank="full", direction="orthogonal"), "their class stores bases in INT4"
    assert complete_group(group) == group
    for option, value in {"subspace": "streaming", "quant": True, "update_proj_gap": 3, "residual": "fira"}.items():
        with pytest.raises(
            ValueError, match=f"rank='full' projects nothing, so that {option}={value!r} has no meaning"
        ):
            optimizer_of(rank="full", **{option: value})
    for rank in ("half", 0, 2.5, True):
        with pytest.raises(ValueError, match=f"rank={rank!r} must be .*'full'|rank={rank!r} must be at least 1"):
            optimizer_of(rank=rank)


def test_a_param_group_is_the_dict_that_the_caller_has() -> None:
    group = {"params": [nn.Parameter(torch.ones(8, 8))], **THEIRS}
    optimizer = QGaLoreAdamW8bit([group], lr=0.1)
    assert optimizer.param_groups[0] is group and group["galore_scale"] == 0.5 and "scale" not in group


def test_a_state_dict_loads_without_pickle() -> None:
    optimizer = optimizer_of(**THEIRS)
    (group,) = optimizer.state_dict()["param_groups"]
    assert {name: group[name] for name in OURS} == OURS
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = optimizer_of(rank=4, scale=1.0, quant_n_bit=8, quant_group_size=64)
    other.load_state_dict(torch.load(file, weights_only=True))
    (weight,) = other.low_rank_weights()
    assert weight.config == subspace_of(other.param_groups[0]) == SubspaceConfig(**OURS)


def test_groups_of_checkpoints_of_version_0_1_are_read() -> None:
    optimizer = optimizer_of(**THEIRS)
    state = optimizer.state_dict()
    old = {**state["param_groups"][0], "rotate_moments": False}
    for theirs, ours in zip(THEIRS, OURS, strict=True):
        old[theirs] = old.pop(ours)
    optimizer.load_state_dict({**state, "param_groups": [old]})
    assert subspace_of(optimizer.param_groups[0]) == SubspaceConfig(**OURS, rotate_moments=False)


def test_a_copy_keeps_its_options() -> None:
    optimizer = copy.deepcopy(optimizer_of(**THEIRS))
    (weight,) = optimizer.low_rank_weights()
    assert weight.config == SubspaceConfig(**OURS)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8, 8)
    optimizer.step()


def test_the_scale_can_be_scheduled_like_a_learning_rate() -> None:
    steps = []
    for scale in (0.5, 1.0):
        optimizer = optimizer_of(rank=4, galore_scale=0.5)
        param = optimizer.param_groups[0]["params"][0]
        optimizer.param_groups[0]["galore_scale"] = scale
        param.grad = torch.arange(64.0).view(8, 8)
        optimizer.step()
        steps.append(1 - param.detach())
    torch.testing.assert_close(steps[1], 2 * steps[0])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"quant_n_bit": 3, "rank": 4}, "quant_n_bit=3 is unknown: it must be one of 4, 8"),
        ({"proj_bits": 3, "rank": 4}, "proj_bits=3 is unknown"),
        ({"scale": -1.0, "rank": 4}, "scale=-1.0 must be more than 0"),
        ({"scale": 0.5}, "a param group has scale and no rank"),
        ({"scale": 0.5, "galore_scale": 0.25, "rank": 4}, "a param group has scale=0.5 and galore_scale=0.25"),
        ({"rank": 4, "residual": "fira", "proj_type": "full"}, "residual='fira' scales across one projected side"),
        ({"rank": 4, "max_update_proj_gap": 5}, "max_update_proj_gap=5 is less than update_proj_gap=200"),
    ],
)
def test_what_makes_no_sense_is_named_as_it_was_given(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        complete_group(group)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SubspaceConfig(rank=4).rank = 5  # type: ignore[misc]


def test_choices_are_those_that_there_are() -> None:
    assert limits_of(SubspaceConfig)["direction"].choices == tuple(DIRECTIONS)


def test_every_option_is_a_flag_with_its_limits_and_help() -> None:
    specs = {spec.name: spec for spec in read_specs(SubspaceArgs)}
    for field in dataclasses.fields(SubspaceConfig):
        spec = specs[field.name]
        assert spec.help, field.name
        if limits := limits_of(SubspaceConfig).get(field.name):
            own = vars(spec.flag)
            if field.name == "rank":  # several of which are text: its parser has the limit
                assert set(own["words"]) == {*limits.words, AUTO}  # which a command line alone deals
                own = own | {"at_least": 1, "words": limits.words}
                with pytest.raises(ValueError, match="at least 1"):
                    spec.flag.parse("8,0")
            assert all(own[key] == value for key, value in vars(limits).items() if key != "auto" or value)
        if field.name not in ("rank", "galore_scale", "update_proj_gap"):  # the official command line's own
            assert spec.default == field.default


def test_a_command_line_gives_the_options(root: Path) -> None:
    argv = ["--model_config", str(root / "configs/llama_9m.json"), "--batch_size", "2", "--dataset", "pydocs"]
    argv += ["--optimizer", "q_galore_adamw8bit", "--recipe", "paper", "--rank", "8", "--galore_scale", "0.5"]
    config = parse_args([*argv, "--no-proj_quant", "--proj_bits", "8"]).subspace.config()
    assert config == SubspaceConfig(rank=8, galore_scale=0.5, proj_bits=8, update_proj_gap=50, max_update_proj_gap=400)
    assert type(config) is SubspaceConfig
