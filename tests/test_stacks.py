"""A 3-D parameter that is split into its matrices: the model computes and saves as before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qgalore.layer.stacks import matrices_of, split_stacks, stack_names
from tests.transformers_families import loss_of, model_of

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def split(**sizes: Any) -> nn.Module:
    model = model_of("mixtral", **sizes)
    split_stacks(model, list(stack_names(model)))
    return model


def test_experts_are_stacks_and_nothing_else_is() -> None:
    model = model_of("mixtral")
    names = list(stack_names(model))
    assert names == [f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in ("gate_up_proj", "down_proj")]
    matrices = split_stacks(model, names[:1])
    assert matrices == [f"model.layers.0.mlp.experts.parametrizations.gate_up_proj.original{i}" for i in range(4)]
    assert list(matrices_of(model, GATE_UP)) == matrices and not matrices_of(model, names[1])
    assert sorted(stack_names(model)) == sorted(names), "split or not"
    assert split_stacks(model, names[:1]) == matrices, "it is split once"
    others = nn.ModuleList([nn.Conv1d(8, 8, 3), nn.Linear(4, 4)])
    others.register_parameter("position", nn.Parameter(torch.zeros(1, 8, 8)))
    assert not list(stack_names(others))


def test_gradients_are_those_of_the_stack() -> None:
    whole, parts = model_of("mixtral"), split()
    losses = [loss_of(model) for model in (whole, parts)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    grads = [param.grad for param in matrices_of(parts, GATE_UP).values()]
    expected = whole.get_parameter(GATE_UP).grad
    assert expected is not None and all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_it_takes_no_memory_of_its_own() -> None:
    model = model_of("mixtral")
    address = model.get_parameter(GATE_UP).data_ptr()
    split_stacks(model, [GATE_UP])
    experts: Any = model.get_submodule(GATE_UP.rpartition(".")[0])
    assert experts.gate_up_proj.data_ptr() == next(iter(matrices_of(model, GATE_UP).values())).data_ptr() == address


def test_an_updated_matrix_is_seen() -> None:
    model = split()
    experts: Any = model.get_submodule(GATE_UP.rpartition(".")[0])
    with torch.no_grad():
        list(matrices_of(model, GATE_UP).values())[2].fill_(7.0)
    assert (experts.gate_up_proj[2] == 7).all() and not (experts.gate_up_proj[1] == 7).any()
    assert (model.state_dict()[GATE_UP][2] == 7).all()


def test_state_dicts_have_the_stack() -> None:
    whole, parts = model_of("mixtral"), split()
    saved, expected = parts.state_dict(), whole.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    for assign in (False, True):
        doubled = {key: 2 * value for key, value in expected.items()}
        parts.load_state_dict(doubled, assign=assign)
        whole.load_state_dict(doubled)
        assert torch.equal(loss_of(parts), loss_of(whole)) and torch.equal(
            parts.state_dict()[GATE_UP], doubled[GATE_UP]
        )
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*gate_up_proj"):
        parts.load_state_dict({key: value for key, value in expected.items() if key != GATE_UP})


def test_from_pretrained_reads_what_it_saves(tmp_path: Path) -> None:
    model: Any = split(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loss_of(loaded), loss_of(model)) and not matrices_of(loaded, GATE_UP)


@pytest.mark.parametrize("way", ["deepcopy", "dtype"])
def test_copies_and_casts_keep_the_values(way: str) -> None:
    model = split()
    before = loss_of(model)
    other = copy.deepcopy(model) if way == "deepcopy" else model.to(torch.bfloat16).to(torch.float32)
    assert torch.allclose(loss_of(other), before, rtol=1e-2)
    experts: Any = other.get_submodule(GATE_UP.rpartition(".")[0])
    stack, matrices = experts.gate_up_proj, list(matrices_of(other, GATE_UP).values())
    assert [x.data_ptr() for x in stack] == [x.data_ptr() for x in matrices], "they share memory again"
    if way == "deepcopy":
        with torch.no_grad():
            matrices[0].zero_()
        assert torch.equal(loss_of(model), before)


def test_a_frozen_stack_gives_frozen_matrices() -> None:
    model = model_of("mixtral")
    model.get_parameter(GATE_UP).requires_grad_(False)
    split_stacks(model, stack_names(model))
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == set(matrices_of(model, GATE_UP))
    loss_of(model).backward()
    assert all(param.grad is None for param in matrices_of(model, GATE_UP).values())
