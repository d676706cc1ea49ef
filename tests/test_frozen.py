"""A frozen layer stays as it is in every format, however it was frozen, until it is freed."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qgalore import GaLoreAdamW, LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, low_rank_param_groups
from qgalore.layer.codes import Codes
from tests.test_optimizer import FORMATS, Net, backward, batch, build, train, values

STORAGES = {name: format for name, format in FORMATS.items() if format is not None} | {
    "int8_products": WeightFormat(bits=8, int8_products=True)
}
every_storage = pytest.mark.parametrize("storage", STORAGES)
NAMES = ["layers.0.self_attn", "layers.0.mlp.0", "layers.0.mlp.2"]
FROZEN = NAMES[1]


def frozen_net(storage: str) -> Net:
    """One of three layers is frozen before all are converted."""
    net = Net()
    net.get_submodule(FROZEN).requires_grad_(False)
    convert_linears(net, NAMES, STORAGES[storage])
    return net


def layer(net: nn.Module, name: str = FROZEN) -> LowRankLinear:
    found = net.get_submodule(name)
    assert isinstance(found, LowRankLinear)
    return found


def optimizer_of(net: nn.Module, by_hand: bool = False, **options: Any) -> QGaLoreAdamW8bit:
    if by_hand:
        weights = [layer(net, name).weight for name in NAMES]
        rest = [param for param in net.parameters() if not any(param is weight for weight in weights)]
        groups = [{"params": rest}, {"params": weights, "rank": 4, "update_proj_gap": 2}]
    else:
        groups = low_rank_param_groups(net, NAMES, rank=4, update_proj_gap=2)
    optimizer = QGaLoreAdamW8bit(groups, lr=0.02)
    optimizer.attach(net, **options)
    return optimizer


def changed(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name.removesuffix(".weight") for name, value in values(net).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
@every_storage
def test_what_was_frozen_before_it_was_converted_stays(storage: str, by_hand: bool, update_in_backward: bool) -> None:
    net = frozen_net(storage)
    optimizer, before = optimizer_of(net, by_hand, update_in_backward=update_in_backward), values(net)
    train(net, optimizer, range(3))
    moved = changed(net, before)
    assert FROZEN not in moved and {NAMES[0], NAMES[2], "embed", "head"} <= moved


@every_storage
def test_groups_leave_it_out(storage: str) -> None:
    net = frozen_net(storage)
    for names in (NAMES, NAMES[:1]):  # once as a low-rank weight, once among the rest
        rest, low_rank = low_rank_param_groups(net, names, rank=4)
        assert not any(param is layer(net).weight for param in rest["params"] + low_rank["params"])
        assert len(low_rank["params"]) == (2 if len(names) == 3 else 1)
        assert any(param is layer(net, NAMES[2]).weight for param in rest["params"] + low_rank["params"])
    with pytest.raises(ValueError, match="all that is named of Net is frozen: nothing would be low-rank"):
        low_rank_param_groups(net, [FROZEN], rank=4)


@every_storage
def test_the_gradient_of_its_input_passes_through(storage: str) -> None:
    module = layer(frozen_net(storage))
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(5, module.out_features, generator=torch.Generator().manual_seed(1))
    optimizer = QGaLoreAdamW8bit([module.weight])
    optimizer.attach(module)
    results = []
    for freeze in (True, False):
        module.requires_grad_(not freeze)
        leaf = x.clone().requires_grad_()
        module(leaf).backward(grad)
        results.append(leaf.grad)
    frozen, free = results
    assert frozen is not None and free is not None and frozen.abs().max() > 0.1
    assert torch.allclose(frozen, free, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "int4", "int8_products"])
def test_no_float_copy_of_it_waits_for_the_backward_pass(storage: str) -> None:
    module, saved = layer(frozen_net(storage)), list[torch.dtype]()
    stored = {tensor.data_ptr() for tensor in (module.weight_scale, module.weight_zero_point) if tensor is not None}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in stored:
            saved.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.ones(5, module.in_features, requires_grad=True)).sum().backward()
    assert torch.uint8 in saved and not any(dtype.is_floating_point for dtype in saved)


# ---- copies, files, devices


def _stored(net: Net) -> Net:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: Net = torch.load(file, weights_only=False)
    return loaded


def _loaded(net: Net, assign: bool) -> Net:
    other = Net()
    convert_linears(other, NAMES, layer(net).format)
    net.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    return net


def _without_the_same_parameters(net: Net) -> Net:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return net.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


WAYS: dict[str, Callable[[Net], Net]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "file": _stored,
    "state dict": lambda net: _loaded(net, assign=False),
    "assigned state dict": lambda net: _loaded(net, assign=True),
    "dtype": lambda net: net.to(torch.bfloat16).to(torch.float32),
    "device": lambda net: net.to("meta").to_empty(device="cpu"),
    "new parameters": _without_the_same_parameters,
}


@pytest.mark.parametrize("way", WAYS)
@every_storage
def test_it_stays_frozen_in(way: str, storage: str) -> None:
    net = WAYS[way](frozen_net(storage))
    assert [layer(net, name).frozen for name in NAMES] == [False, True, False]
    if way != "device":  # whose values are void
        optimizer, before = optimizer_of(net, by_hand=True), values(net)
        train(net, optimizer, range(2))
        assert FROZEN not in changed(net, before) and NAMES[0] in changed(net, before)
    net.requires_grad_(True)
    assert not any(layer(net, name).frozen for name in NAMES)


# ---- freezing and freeing what is converted


def _parameters_set(module: nn.Module, value: bool) -> None:
    for param in module.parameters():
        param.requires_grad = value


def _parameters_called(module: nn.Module, value: bool) -> None:
    for param in module.parameters():
        param.requires_grad_(value)


IDIOMS: dict[str, Callable[[nn.Module, bool], Any]] = {
    "module": lambda module, value: module.requires_grad_(value),
    "parameters": _parameters_called,
    "attribute": _parameters_set,
}


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("attached", [False, True])
@every_storage
def test_all_is_frozen_and_some_is_freed(storage: str, attached: bool, idiom: str) -> None:
    """As in fine-tuning: the whole model is frozen, then a part of it is freed."""
    net = Net()
    convert_linears(net, NAMES, STORAGES[storage])
    optimizer = optimizer_of(net) if attached else None
    set_requires_grad = IDIOMS[idiom]
    set_requires_grad(net, False)
    assert all(layer(net, name).frozen for name in NAMES)
    set_requires_grad(net.layers[0].mlp, True)
    assert [layer(net, name).frozen for name in NAMES] == [True, False, False]
    optimizer = optimizer or optimizer_of(net)
    before = values(net)
    train(net, optimizer, range(2))
    bias = f"{NAMES[2]}.bias"
    assert changed(net, before) == {NAMES[1], NAMES[2], bias}
    set_requires_grad(net.layers[0].self_attn, True)
    if attached:
        train(net, optimizer, range(2, 4))
        assert NAMES[0] in changed(net, before) and "embed" not in changed(net, before)


def test_freezing_between_forward_and_backward_is_for_the_next_pass() -> None:
    net, optimizer = build("qgalore8bit", "int8")
    loss = net(batch(0))
    layer(net).requires_grad_(False)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = values(net)
    backward(net, optimizer, 1)
    optimizer.step()
    assert FROZEN not in changed(net, before)


def test_codes_are_a_plain_parameter_to_autograd() -> None:
    module = LowRankLinear(torch.ones(4, 16), None, WeightFormat(bits=8))
    assert isinstance(module.weight, Codes) and isinstance(module.weight, nn.Parameter)
    assert [param.requires_grad for param in module.parameters()] == [False]
    assert type(module.state_dict()["weight_scale"]) is torch.Tensor
    assert not vars(module.weight), "no loose attributes"
    assert type(module.weight.detach()) is type(module.weight.data) is type(module.weight + 1) is torch.Tensor
    again = pickle.loads(pickle.dumps(module.weight))
    assert type(again) is Codes and torch.equal(again, module.weight)


def test_an_integer_weight_of_before_can_be_trained_and_marked() -> None:
    """A pickle from before holds it in an ordinary parameter."""
    net, optimizer = build("qgalore8bit", "int8", attach=False)
    module = layer(net)
    module.weight = nn.Parameter(module.weight.data, requires_grad=False)
    assert not module.frozen
    module.to(torch.float32)
    assert isinstance(module.weight, Codes) and not module.frozen
    assert isinstance(optimizer, QGaLoreAdamW8bit)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_sees_what_is_frozen_later(backend: str) -> None:
    net, optimizer = build("qgalore8bit", "int8")
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    train(compiled, optimizer, range(1))
    layer(net).requires_grad_(False)
    before = values(net)
    train(compiled, optimizer, range(1, 3))
    assert FROZEN not in changed(net, before) and NAMES[0] in changed(net, before)
    layer(net).requires_grad_(True)
    train(compiled, optimizer, range(3, 4))
    assert FROZEN in changed(net, before)


def test_plain_optimizers_leave_it_alone() -> None:
    net = frozen_net("float")
    optimizer = GaLoreAdamW(net.parameters(), lr=0.02)
    optimizer.attach(net)
    before = values(net)
    train(net, optimizer, range(2))
    assert FROZEN not in changed(net, before) and NAMES[0] in changed(net, before)
