"""Which parameters are low-rank, and the groups of an optimizer."""

import pytest
import torch
from torch import nn

from qgalore import QGaLoreAdamW8bit, WeightFormat, convert_linears, linear_names, low_rank_param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)


NAMES = [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.0", "mlp.2")]


def test_names_are_the_linear_layers_of_attention_and_mlp() -> None:
    model = Model()
    assert linear_names(model) == NAMES
    assert linear_names(model, targets=("mlp",)) == [name for name in NAMES if "mlp" in name]
    assert linear_names(model, targets=("lm_head",)) == ["lm_head"]
    with pytest.raises(ValueError, match="inside a module called 'self'"):  # a target is a whole part of the path
        linear_names(model, targets=("self",))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_names_stay_when_layers_are_converted(bits: int | None) -> None:
    model = Model()
    convert_linears(model, linear_names(model), WeightFormat(bits=bits))
    assert linear_names(model) == NAMES


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_every_parameter_is_in_one_group_once(bits: int | None) -> None:
    model = Model()
    names = linear_names(model)
    convert_linears(model, names, WeightFormat(bits=bits))
    rest, low_rank = low_rank_param_groups(model, iter(names), rank=4, scale=0.5)
    assert [id(p) for p in low_rank["params"]] == [id(model.get_submodule(name).weight) for name in NAMES]
    assert low_rank["rank"] == 4 and low_rank["scale"] == 0.5
    assert "rank" not in rest
    together = [*rest["params"], *low_rank["params"]]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}
    assert len(together) == len(set(map(id, together)))


def test_frozen_parameters_are_left_out_but_quantized_weights_are_not() -> None:
    model = Model()
    model.embed.weight.requires_grad_(False)
    convert_linears(model, NAMES, WeightFormat(bits=8))
    rest, low_rank = low_rank_param_groups(model, NAMES[:2], rank=4)
    rest_ids = {id(p) for p in rest["params"]}
    assert id(model.embed.weight) not in rest_ids
    # A quantized layer that was not named trains at full rank.
    assert id(model.get_submodule("layers.0.mlp.0").weight) in rest_ids
    assert len(low_rank["params"]) == 2


def test_a_tied_weight_is_there_once() -> None:
    model = Model()
    model.lm_head.weight = model.embed.weight  # type: ignore[assignment]
    rest, _ = low_rank_param_groups(model, NAMES, rank=4)
    assert sum(p is model.embed.weight for p in rest["params"]) == 1
    QGaLoreAdamW8bit(low_rank_param_groups(model, NAMES, rank=4), lr=0.01)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="k_proj"):
        low_rank_param_groups(Model(), ["layers.0.self_attn.k_proj"], rank=4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("proj_type", "rank", "side"), [("std", 9, "left"), ("right", 17, "right")])
def test_a_rank_beyond_a_side_is_refused_by_name(bits: int | None, proj_type: str, rank: int, side: str) -> None:
    model = Model()
    convert_linears(model, NAMES, WeightFormat(bits=bits))
    with pytest.raises(ValueError, match=rf"rank={rank} .* {side} side of layers.0.mlp.2.weight, of shape \(8, 16\)"):
        low_rank_param_groups(model, ["layers.0.mlp.2"], rank=rank, proj_type=proj_type)
    low_rank_param_groups(model, ["layers.0.mlp.2"], rank=rank - 1, proj_type=proj_type)


def test_a_vector_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"parameter layers.0.norm.weight of shape \(8,\) is not a matrix"):
        low_rank_param_groups(Model(), ["layers.0.norm"], rank=4)


def test_groups_carry_the_defaults_of_the_optimizer() -> None:
    model = Model()
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, NAMES, rank=4, update_proj_gap=7), lr=0.01)
    group = optimizer.param_groups[1]
    expected = {
        "rank": 4, "update_proj_gap": 7, "galore_scale": 0.25, "proj_type": "std", "proj_quant": True, "proj_bits": 4,
        "proj_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5, "subspace": "svd",
        "svd_method": "full", "rotate_moments": None, "lr": 0.01,
    }  # fmt: skip
    assert {key: group[key] for key in expected} == expected
    assert torch.optim.Optimizer in type(optimizer).__mro__


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"config=\{'rank': 2\} must be a SubspaceConfig, such as SubspaceConfig\(rank"):
        low_rank_param_groups(nn.Sequential(nn.Linear(4, 4)), ["0"], {"rank": 2})  # type: ignore[arg-type]
