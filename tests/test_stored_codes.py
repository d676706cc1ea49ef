"""Codes of quantized weights in state dicts: no float model takes them for weights, no layer floats for codes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from qgalore import LowRankLinear, WeightFormat, convert_linears, linear_names

ROWS, COLUMNS = 6, 40
FORMATS = {
    "int8": WeightFormat(bits=8, group_size=16),
    "int8 in groups of 20": WeightFormat(bits=8, group_size=20),  # as many groups a row as of 32
    "int8 in groups of 32": WeightFormat(bits=8, group_size=32),
    "int4": WeightFormat(bits=4, group_size=16),
    "int8 products": WeightFormat(bits=8, int8_products=True),
    "float": WeightFormat(),
    "simulated": WeightFormat(bits=8, group_size=16, simulate=True),
}
QUANTIZED = [name for name in FORMATS if name.startswith("int")]
every_quantized = pytest.mark.parametrize("stored", QUANTIZED)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def model(format: str | None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS, bias=False))
    if format is not None:
        convert_linears(net, ["0", "1"], FORMATS[format])
    return net


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As state dicts were before codes had a name of their own."""
    return {key.removesuffix("_qdata"): value for key, value in state.items() if not key.endswith("weight_format")}


def refused(net: nn.Module, state: dict[str, Tensor], message: str) -> None:
    """Whatever `strict` says, in one sentence for all layers, and not a bit of a weight has changed."""
    before = copy.deepcopy(net.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message) as error:
            net.load_state_dict(copy.deepcopy(state), strict=strict)
        assert str(error.value).count("stored weights do not fit") == 1
        for key, value in net.state_dict().items():
            assert torch.equal(value, before[key]) or "bias" in key


@every_quantized
def test_codes_have_a_name_of_their_own(stored: str) -> None:
    net = model(stored)
    state = net.state_dict()
    parts = ("qdata", "scale", "zero_point", "format")
    assert set(state) == {"0.bias", *(f"{layer}.weight_{part}" for layer in "01" for part in parts)}
    assert set(dict(net.named_parameters())) == {"0.bias", "0.weight", "1.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight.*\n.*Unexpected key.*0\.weight_scale"):
        model(None).load_state_dict(state)
    kept = net.state_dict(keep_vars=True)
    assert set(kept) == set(state) and not state["0.weight_qdata"].requires_grad


@pytest.mark.parametrize("of_today", [True, False])
@every_quantized
def test_codes_come_back(stored: str, of_today: bool) -> None:
    state = model(stored, seed=1).state_dict()
    for assign in (False, True):
        net = model(stored)
        net.load_state_dict(copy.deepcopy(state if of_today else old_names(state)), assign=assign)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        x = torch.randn(3, COLUMNS)
        assert torch.equal(net(x), model(stored, seed=1)(x))


def test_what_is_missing_and_what_is_too_much_is_named() -> None:
    net = model("int8")
    state = net.state_dict()
    codes = state.pop("0.weight_qdata")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.weight_qdata\"\. $"):
        net.load_state_dict(state)
    assert net.load_state_dict(state, strict=False).missing_keys == ["0.weight_qdata"]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0\.weight_other\"\. $"):
        net.load_state_dict(state | {"0.weight_qdata": codes, "0.weight_other": codes})


# ---- what is refused


@pytest.mark.parametrize("of_today", [True, False])
@pytest.mark.parametrize("here", ["float", "simulated"])
@every_quantized
def test_codes_are_no_float_weights(stored: str, here: str, of_today: bool) -> None:
    state = model(stored).state_dict()
    there = "8 bits in groups of 16" if of_today and stored == "int8" else r"\d bits|quantized there"
    message = rf"0\.weight is float here and ({there}).*Convert the model to the format"
    refused(model(here), state if of_today else old_names(state), message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_quantized
def test_float_weights_are_no_codes(stored: str, dtype: torch.dtype) -> None:
    state = model(None, seed=1).to(dtype).state_dict()
    message = rf"0\.weight is \d bits in groups of \d+ here and {dtype} there\. Load float weights .* before convert"
    refused(model(stored), state, message)
    scales = {key: value for key, value in model(stored).state_dict().items() if "scale" in key or "zero" in key}
    refused(model(stored), state | scales, message)


@pytest.mark.parametrize("here", QUANTIZED)
@every_quantized
def test_codes_are_of_one_format(stored: str, here: str) -> None:
    if stored == here:
        return
    state = model(stored).state_dict()
    bits, group_size = state["0.weight_format"].tolist()
    message = rf"here and {bits} bits in groups of {group_size} there\. Convert the model with that WeightFormat"
    refused(model(here), state, message)


def test_a_group_may_be_longer_than_a_row() -> None:
    formats = [WeightFormat(bits=8, group_size=64), WeightFormat(bits=8, group_size=256), FORMATS["int8 products"]]
    layers = [LowRankLinear(torch.randn(ROWS, COLUMNS), None, format) for format in formats]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
        assert torch.equal(layer.weight, layers[0].weight)


def test_codes_must_be_bytes() -> None:
    state = model("int8").state_dict()
    wrong = {key: value.float() if "qdata" in key else value for key, value in state.items()}
    refused(model("int8"), wrong, r"here and torch\.float32 there, where codes are torch\.uint8")
    without_scales = {key: value for key, value in old_names(state).items() if "scale" not in key}
    refused(model("int8"), without_scales, r"here and torch\.uint8 there")


# ---- other libraries


@every_quantized
def test_distributed_checkpoints_have_the_codes(stored: str) -> None:
    net, other = model(stored), model(stored, seed=1)
    state = get_model_state_dict(other)
    assert "0.weight_qdata" in state and "0.weight" not in state
    set_model_state_dict(net, state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("format", ["float", "simulated"])
def test_save_pretrained_of_floats_works(tmp_path: Path, format: str) -> None:
    net = llama()
    convert_linears(net, linear_names(net), FORMATS[format])
    net.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(2, 34).view(2, 16)
    assert torch.allclose(again(tokens).logits, net(tokens).logits, atol=1e-5)


def test_from_pretrained_never_reads_codes_as_weights(tmp_path: Path) -> None:
    """However they got into a file that it reads."""
    net = llama()
    names = linear_names(net)
    convert_linears(net, names, WeightFormat(bits=8))
    save_file(net.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(net.config.to_dict()))
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {f"{name}.weight" for name in names} == set(info["missing_keys"])
    assert {f"{name}.weight_qdata" for name in names} < set(info["unexpected_keys"])
    assert all(parameter.abs().max() < 2 for parameter in again.parameters())
