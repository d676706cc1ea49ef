"""A Conv1D of transformers, a linear layer whose weight is (in_features, out_features), as a `LowRankLinear`."""

import copy

import pytest
import torch
from torch import nn

from qgalore import GaLoreAdamW, LowRankLinear, WeightFormat, convert_linears, low_rank_param_groups

pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
FORMATS = {"float": WeightFormat(), "int8": WeightFormat(8, 16), "int4": WeightFormat(4, 16)}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def conv(outputs: int = 24, inputs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = pytorch_utils.Conv1D(outputs, inputs)
    nn.init.normal_(module.get_parameter("bias"))
    return module


def converted(module: nn.Module, format: WeightFormat) -> LowRankLinear:
    model = nn.ModuleDict({"layer": module})
    convert_linears(model, ["layer"], format)
    layer = model["layer"]
    assert isinstance(layer, LowRankLinear)
    return layer


@every_format
def test_it_computes_what_the_stored_weight_says(format: WeightFormat) -> None:
    before = conv()
    layer = converted(before, format)
    assert layer.transposed and (layer.out_features, layer.in_features) == (24, 20)
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))
    weight = layer.dequantized_weight(torch.float32)
    bound = {None: 0.0, 8: 1e-3, 4: 2e-2}[format.bits]
    assert (weight - before.get_parameter("weight").T).abs().max() <= bound
    assert torch.allclose(layer(x), x @ weight.T + before.get_parameter("bias"), atol=1e-6)


@pytest.mark.parametrize("size", [(24, 20), (20, 20)], ids=["oblong", "square"])
def test_a_float_state_dict_is_that_of_the_conv1d(size: tuple[int, int]) -> None:
    before = conv(*size)
    layer = converted(copy.deepcopy(before), FORMATS["float"])
    saved = layer.state_dict()
    assert saved.keys() == before.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in before.state_dict().items())
    assert all(value.is_contiguous() for value in saved.values()), "safetensors takes no others"
    other = {key: value + 1 for key, value in before.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict(saved)
        layer.load_state_dict(other, assign=assign)
        assert torch.equal(layer.weight, other["weight"].T) and layer.weight.is_contiguous()


@pytest.mark.parametrize("format", [FORMATS["int8"], FORMATS["int4"]])
def test_codes_are_stored_as_those_of_every_layer(format: WeightFormat) -> None:
    layer, other = converted(conv(), format), converted(conv(), format)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight) and "weight" not in layer.state_dict()


@every_format
def test_what_was_frozen_stays_frozen(format: WeightFormat) -> None:
    module = conv()
    module.get_parameter("weight").requires_grad_(False)
    layer = converted(module.eval(), format)
    assert layer.frozen and not layer.training
    assert not converted(conv(), format).frozen


def test_it_trains_as_the_conv1d_does() -> None:
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
    weights = []
    for convert in (False, True):
        model = nn.ModuleDict({"layer": conv()})
        if convert:
            convert_linears(model, ["layer"], FORMATS["float"])
        # The whole space: a basis lies on the other side of a transposed weight.
        optimizer = GaLoreAdamW(low_rank_param_groups(model, ["layer"], rank="full"), lr=0.02)
        optimizer.attach(model)
        for _ in range(3):
            model["layer"](x).square().mean().backward()
            optimizer.step()
        weights.append(model["layer"].state_dict()["weight"])
    assert torch.allclose(weights[0], weights[1], atol=1e-5) and not torch.allclose(
        weights[0], conv().state_dict()["weight"]
    )


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match=r"layer is a Conv1d: only nn\.Linear, and Conv1D of transformers, can become"):
        convert_linears(nn.ModuleDict({"layer": nn.Conv1d(4, 4, 3)}), ["layer"], WeightFormat(8))
