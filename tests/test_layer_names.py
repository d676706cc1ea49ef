"""What `linear_names` chooses in models of other people, and what it says of the rest; no choice is ever empty."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qgalore import GaLoreAdamW, QGaLoreAdamW8bit, WeightFormat, convert_linears, linear_names, low_rank_param_groups
from tests.transformers_families import model_of


def in_layers(prefix: str, *parts: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in (0, 1) for part in parts]


BERT_PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
MLP_PARTS = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
CHOSEN = {
    "llama": in_layers(
        "model.layers", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
    "bert": in_layers("bert.encoder.layer", *BERT_PARTS),
    "roberta": in_layers("roberta.encoder.layer", *BERT_PARTS),
    "gpt_neox": in_layers("gpt_neox.layers", "attention.query_key_value", "attention.dense", *MLP_PARTS),
    "gpt2": in_layers("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "falcon": in_layers("transformer.h", "self_attention.query_key_value", "self_attention.dense", *MLP_PARTS),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_all_linear_layers_of_the_blocks_are_chosen_and_train(name: str) -> None:
    model = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        names = linear_names(model)
    assert names == CHOSEN[name]
    convert_linears(model, names, WeightFormat(bits=8))
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, names, rank=8), lr=0.01)
    optimizer.attach(model)
    before = [model.get_submodule(layer).weight.clone() for layer in names]
    tokens = torch.arange(2, 34).view(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(
        not torch.equal(model.get_submodule(layer).weight, codes) for layer, codes in zip(names, before, strict=True)
    )


def test_experts_that_are_no_linear_layers_are_named() -> None:
    with pytest.warns(UserWarning) as caught:
        names = linear_names(model_of("mixtral"))
    assert names == in_layers("model.layers", *(f"self_attn.{part}_proj" for part in "qkvo"))
    (warning,) = (str(each.message) for each in caught if "linear_names" in str(each.message))
    assert "leaves out what is no linear layer in the blocks of MixtralForCausalLM" in warning
    assert "model.layers.*.mlp.experts.gate_up_proj (2 of 4 x 96 x 32 in MixtralExperts)" in warning
    assert "experts.down_proj" in warning and "train at full rank" in warning
    assert "embed" not in warning and "lm_head" not in warning and "norm" not in warning


def test_a_model_without_linear_layers_in_its_blocks_is_refused() -> None:
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2)), "head": nn.Linear(8, 4)}
    )
    with pytest.raises(ValueError, match=r"ModuleDict has no linear layer inside the blocks") as refusal:
        linear_names(model)
    text = str(refusal.value)
    assert "Its linear layers: head (4 x 8)." in text
    assert "blocks.*.in_proj_weight (2 of 24 x 8 in MultiheadAttention)" in text
    assert "low_rank_param_groups, which also takes other modules with a float matrix" in text
    # And so it does.
    names = ["blocks.0.out_proj"]
    optimizer = GaLoreAdamW(low_rank_param_groups(model, names, rank=4), lr=0.01)
    assert optimizer.param_groups[1]["params"] == [model.get_submodule(names[0]).weight]


def test_a_choice_is_short_to_read() -> None:
    layers = [nn.Linear(4, 5 + i) for i in range(20)]
    with pytest.raises(ValueError, match=r"0 \(5 x 4\), 1 \(6 x 4\), .* and 12 more kinds") as refusal:
        linear_names(nn.Sequential(*layers))
    assert "19 (" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"Its linear layers: none"):
        linear_names(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"layers: itself \(5 x 4\)"):
        linear_names(layers[0])


def test_blocks_may_be_in_a_sequential_or_alone() -> None:
    model = model_of("llama")
    layers = model.get_submodule("model.layers")
    assert linear_names(layers[0]) == [name.removeprefix("model.layers.0.") for name in CHOSEN["llama"][:7]]  # type: ignore[index]
    assert linear_names(nn.Sequential(*layers)) == [name.removeprefix("model.layers.") for name in CHOSEN["llama"]]  # type: ignore[misc]
    assert linear_names(nn.Sequential(model)) == [f"0.{name}" for name in CHOSEN["llama"]], "a head is no block's"
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"has no linear layer inside the blocks"):
        linear_names(deep)  # which are blocks, and which the head, is not to be seen
    assert linear_names(deep[:3]) == ["0.0", "1.0", "2.0"]


def test_what_multihead_attention_reads_is_not_converted() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    model = nn.ModuleList([layer])
    with pytest.warns(UserWarning, match=r"self_attn\.in_proj_weight .*self_attn\.out_proj\.weight"):
        assert linear_names(model) == ["0.linear1", "0.linear2"]
    with pytest.raises(TypeError, match=r"0\.self_attn\.out_proj is a part of nn\.MultiheadAttention"):
        convert_linears(model, ["0.self_attn.out_proj"], WeightFormat(bits=8))


def test_activations_in_the_dtype_of_codes_are_refused() -> None:
    model = model_of("t5")
    names = linear_names(model)
    assert len(names) == 2 * 6 + 2 * 10 and names[0] == "encoder.block.0.layer.0.SelfAttention.q"
    convert_linears(model, names, WeightFormat(bits=8))
    tokens = torch.arange(2, 34).view(2, 16)
    with pytest.raises(TypeError, match=r"the input of a LowRankLinear is torch\.uint8, not float.* T5"):
        model(input_ids=tokens, labels=tokens)
    model = model_of("t5")
    convert_linears(model, [name for name in names if not name.endswith(".wo")], WeightFormat(bits=8))
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


# ---- names that are given


@pytest.mark.parametrize("targets", [(), ("self",), ["attn", "dense"], "q"])
def test_targets_that_match_nothing_are_refused(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer inside a module called") as refusal:
        linear_names(model_of("llama"), targets)
    assert "model.layers.*.self_attn.q_proj (2 of 32 x 32)" in str(refusal.value)
    assert all(repr(target) in str(refusal.value) for target in ([targets] if targets == "q" else targets))


def test_targets_choose_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(linear_names(model_of("mixtral"), ("self_attn",))) == 8
        assert linear_names(model_of("llama"), "lm_head") == ["lm_head"]


CALLS: dict[str, Callable[[nn.Module, list[str]], object]] = {
    "convert_linears": lambda model, names: convert_linears(model, names, WeightFormat(bits=8)),
    "low_rank_param_groups": lambda model, names: low_rank_param_groups(model, names, rank=4),
}


@pytest.mark.parametrize("call", CALLS)
def test_names_must_be_there(call: str) -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match=rf"{call} got no names: nothing of LlamaForCausalLM would be"):
        CALLS[call](model, [])
    with pytest.raises(AttributeError, match=r"has no module model\.layers\.0\.k_proj: names are those of") as refusal:
        CALLS[call](model, ["model.layers.0.k_proj"])
    assert "model.layers.*.self_attn.k_proj (2 of 32 x 32)" in str(refusal.value)


def test_a_module_without_a_weight_has_no_rank() -> None:
    with pytest.raises(AttributeError, match=re.escape("model.layers.0.mlp is a LlamaMLP without a weight")):
        low_rank_param_groups(model_of("llama"), ["model.layers.0.mlp"], rank=4)


def test_a_layer_that_is_named_twice_is_there_once() -> None:
    model = model_of("llama")
    name = CHOSEN["llama"][0]
    _, low_rank = low_rank_param_groups(model, [name, name], rank=4)
    assert len(low_rank["params"]) == 1


@pytest.mark.parametrize("empty", [[], iter(())])
def test_a_rank_without_parameters_is_refused(empty: Any) -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match="a param group with rank=4 has no parameters: nothing would be low-rank"):
        GaLoreAdamW([{"params": [weight]}, {"params": empty, "rank": 4}])
    optimizer = GaLoreAdamW([{"params": [weight]}, {"params": []}])  # as torch has it
    with pytest.raises(ValueError, match="has no parameters"):
        optimizer.add_param_group({"params": [], "rank": 4})
    assert len(optimizer.param_groups) == 2, "a refused group is not kept"
    weight.grad = torch.ones(8, 8)
    optimizer.step()
