"""Quantized layers back to floats: in a model, in a state dict, in files that from_pretrained and a Trainer read."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgalore import (
    LowRankLinear,
    QGaLoreAdamW8bit,
    WeightFormat,
    convert_linears,
    dequantize_linears,
    float_state_dict,
    linear_names,
    low_rank_param_groups,
)
from qgalore.layer.export import float_entries

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

TOKENS = torch.arange(3, 35).view(2, 16)
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"intermediate_size": 44}),  # rows end with padding
    "qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config",
        SIZES | {"intermediate_size": 44, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "roberta": (
        "RobertaForMaskedLM", "RobertaConfig",
        SIZES | {"intermediate_size": 44, "max_position_embeddings": 32, "pad_token_id": 0},
    ),
}  # fmt: skip
FORMATS = {
    "int8": WeightFormat(bits=8, group_size=16),
    "int4": WeightFormat(bits=4, group_size=16),
    "simulated": WeightFormat(bits=8, group_size=16, simulate=True),
    "float": WeightFormat(),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_storage = pytest.mark.parametrize(
    ("family", "format", "attached"),
    [
        *(("llama", format, attached) for format in ("int8", "float") for attached in (True, False)),
        *((family, *kind) for family in ("qwen2", "gpt2", "roberta") for kind in (("int8", True), ("float", False))),
        *(("llama", "int4", False), ("gpt2", "int4", True), ("llama", "simulated", True)),
    ],
)


def float_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kind, config, sizes = FAMILIES[family]
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes, initializer_range=0.2)).to(dtype).eval()


def converted(family: str, format: str = "int8", dtype: torch.dtype = torch.float32) -> Any:
    model = float_model(family, dtype)
    convert_linears(model, linear_names(model), FORMATS[format])
    return model


def layers_of(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def trained(model: Any, steps: int = 2) -> QGaLoreAdamW8bit:
    groups = low_rank_param_groups(model, layers_of(model), rank=8, proj_group_size=16)
    optimizer = QGaLoreAdamW8bit(groups, lr=1e-2)
    optimizer.attach(model, update_in_backward=True)
    before = [layer.weight.clone() for layer in layers_of(model).values()]
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(old, layer.weight) for old, layer in zip(before, layers_of(model).values(), strict=True))
    return optimizer


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = safetensors.load_file(folder / "model.safetensors")
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- save_pretrained


@pytest.mark.parametrize(
    ("format", "dtype"), [("int8", torch.float32), ("int8", torch.bfloat16), ("float", torch.bfloat16)]
)
@every_family
def test_what_was_trained_is_what_from_pretrained_gives(
    tmp_path: Path, family: str, format: str, dtype: torch.dtype
) -> None:
    model = converted(family, format, dtype)
    optimizer = trained(model)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and loaded.dtype == dtype
    parts = ("qdata", "scale", "zero_point", "format") if format == "int8" else ()
    assert set(report["unexpected_keys"]) == {f"{n}.weight_{part}" for n in layers_of(model) for part in parts}
    assert same(loaded.state_dict(), {key: value.cpu() for key, value in float_state_dict(model).items()})
    expected = logits(model)
    assert expected.float().std() > 0.3
    # Sums in another order, which in bfloat16, of eight bits, are rounded after each of some twenty operations.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert (logits(loaded) - expected).float().norm() < tolerance * expected.float().norm()
    optimizer.detach()
    model.save_pretrained(tmp_path / "detached")
    assert same(read(tmp_path), read(tmp_path / "detached"))


@every_family
def test_a_trainer_resumes_what_was_saved_to_the_bit(tmp_path: Path, family: str) -> None:
    """It reads the file with `load_state_dict` into a model that is made as the first one was."""
    model = converted(family)
    trained(model)
    model.save_pretrained(tmp_path)
    again = converted(family)
    missing, unexpected = again.load_state_dict(read(tmp_path), strict=False)
    assert not unexpected and set(missing) <= set(again._tied_weights_keys)
    assert same(again.state_dict(), model.state_dict())


def test_experts_have_the_names_of_the_model_where_there_are_codes(tmp_path: Path) -> None:
    """A Trainer that resumes does not read those of the original Mixtral, which save_pretrained gives them else."""
    sizes = SIZES | {"intermediate_size": 44, "num_local_experts": 2, "num_key_value_heads": 2}

    def mixtral(seed: int) -> Any:
        torch.manual_seed(seed)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
        names = linear_names(model, "self_attn")
        convert_linears(model, names, FORMATS["int8"])
        return model

    model, again = mixtral(0), mixtral(1)
    model.save_pretrained(tmp_path)
    missing, unexpected = again.load_state_dict(read(tmp_path), strict=False)
    assert not missing and not unexpected and same(again.state_dict(), model.state_dict())
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and same(loaded.state_dict(), float_state_dict(model))
    model.save_pretrained(tmp_path / "original", save_original_format=True)
    assert any("experts.0.w1" in name for name in read(tmp_path / "original"))
    dequantize_linears(model)
    model.save_pretrained(tmp_path / "floats")
    assert any("experts.0.w1" in name for name in read(tmp_path / "floats"))


def test_what_accelerate_saves_has_the_codes(tmp_path: Path) -> None:
    """Its save_state and load_state call safetensors' save and load of a model's state dict."""
    model = converted("qwen2")
    trained(model)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    again = converted("qwen2")
    safetensors.load_model(again, tmp_path / "model.safetensors")
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_given_state_dict_is_completed(tmp_path: Path, prefix: str) -> None:
    """As a Trainer gives it for a wrapped model, from where it was gathered."""
    model, other = converted("llama"), converted("llama")
    trained(other)
    given = {f"{prefix}{key}": value for key, value in other.state_dict().items()}
    names = set(given)
    model.save_pretrained(tmp_path, True, given)
    assert set(given) == names
    expected = {f"{prefix}{key}": value for key, value in (float_state_dict(other) | other.state_dict()).items()}
    assert same(read(tmp_path), expected)


def test_floats_that_are_given_are_written_as_they_are(tmp_path: Path) -> None:
    model = converted("llama")
    floats = float_state_dict(model, torch.bfloat16)
    model.save_pretrained(tmp_path, state_dict=floats)
    assert same(read(tmp_path), floats)


def test_a_state_dict_of_another_model_or_in_part_is_refused(tmp_path: Path) -> None:
    model = converted("llama")
    name = "model.layers.0.mlp.up_proj"
    state = {key.replace(".0.", ".7."): value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has codes of model\.layers\.7\..* and LlamaForCausalLM has no quantized"):
        model.save_pretrained(tmp_path, state_dict=state)
    state = {key: value for key, value in model.state_dict().items() if key != f"{name}.weight_scale"}
    short = model.state_dict()
    short[f"{name}.weight_scale"] = short[f"{name}.weight_scale"][:, :1]
    with pytest.raises(ValueError, match=rf"{name}\.weight_qdata of shape .*do not fit 44 x 32 codes in groups of 16"):
        model.save_pretrained(tmp_path, state_dict=short)
    with pytest.raises(ValueError, match=rf"lacks {name}\.weight_scale: codes are floats only with scale and zero"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_copies_save_their_own_weights_and_parts_of_a_model_theirs(tmp_path: Path) -> None:
    model = converted("llama")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    trained(model)
    for number, twin in enumerate(twins):
        twin.save_pretrained(tmp_path / str(number))
        assert same(read(tmp_path / str(number)), float_state_dict(twin) | twin.state_dict())
    model.model.save_pretrained(tmp_path)
    loaded = transformers.LlamaModel.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), float_state_dict(model.model))


def test_a_model_is_freed_as_soon_as_nobody_has_it() -> None:
    model = converted("llama")
    gone = weakref.ref(model.model.layers[0].mlp.up_proj)
    save = model.save_pretrained
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="of a model that is gone"):
        save("folder")


class Saved(nn.Module):
    """A model of another library; what it was to save is in `got`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.got: dict[str, Any] = {}


class TakesStateDict(Saved):
    def save_pretrained(
        self, folder: str, is_main_process: bool = True, state_dict: Any = None, max_shard_size: int | str = "1KB"
    ) -> None:
        self.got = {"folder": folder, "state_dict": state_dict, "max_shard_size": max_shard_size}


class PassesOn(TakesStateDict):
    def save_pretrained(self, folder: str, **kwargs: Any) -> None:  # type: ignore[override]
        super().save_pretrained(folder, **kwargs)


class TakesNone(Saved):
    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        self.got = {"folder": folder, "state_dict": self.state_dict()}


@pytest.mark.parametrize("kind", [TakesStateDict, PassesOn])
def test_floats_and_codes_are_one_file_unless_asked_otherwise(kind: type[Any]) -> None:
    """A shard of floats alone would be refused when a Trainer loads one after the other."""
    model = kind()
    convert_linears(model, ["layer"], WeightFormat(bits=8))
    model.save_pretrained("here")
    state = model.got["state_dict"]
    assert "layer.weight" in state and model.got["folder"] == "here"
    assert model.got["max_shard_size"] > sum(tensor.nbytes for tensor in state.values())
    model.save_pretrained("here", max_shard_size=5)
    assert model.got["max_shard_size"] == 5
    model.save_pretrained("here", is_main_process=False)
    assert model.got["state_dict"] is None, "there is nothing to dequantize where nothing is written"


def test_a_save_pretrained_that_takes_no_state_dict_is_refused() -> None:
    model = TakesNone()
    convert_linears(model, ["layer"], WeightFormat(bits=8))
    with pytest.raises(RuntimeError, match=r"of a TakesNone with quantized weights takes no state_dict.*dequantize_li"):
        model.save_pretrained("here")
    assert not model.got
    model.layer = nn.Linear(16, 8)  # type: ignore[assignment]
    model.save_pretrained("here")
    assert set(model.got["state_dict"]) == {"layer.weight", "layer.bias"}


# ---- state dicts


@every_storage
def test_float_state_dict_is_one_of_the_float_model(family: str, format: str, attached: bool) -> None:
    model, plain = converted(family, format), float_model(family)
    optimizer = trained(model, 1)
    if not attached:
        optimizer.detach()
    before = copy.deepcopy(model.state_dict())
    state = float_state_dict(model)
    expected = plain.state_dict()
    assert set(state) == set(expected)
    assert all(tensor.shape == expected[key].shape and tensor.is_contiguous() for key, tensor in state.items())
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    assert same(model.state_dict(), before)
    fine = float_state_dict(model, torch.bfloat16)
    rounded = [key for key, tensor in fine.items() if tensor.dtype == torch.bfloat16]
    assert rounded == ([f"{name}.weight" for name in layers_of(model)] if format.startswith("int") else [])


@every_family
def test_a_model_without_memory_is_enough_for_the_entries_of_a_state_dict(family: str) -> None:
    """As for a checkpoint on disk."""
    model = converted(family, "int4")
    state = model.state_dict()
    entries = float_entries(model.to("meta"), state, torch.float32)
    made = [weakref.ref(tensor) for name, tensor in entries if f"{name}_qdata" in state]
    assert sum(tensor() is not None for tensor in made) <= 1, "each weight is freed before the next one is made"
    assert same(dict(float_entries(model, state, torch.float32)), float_state_dict(converted(family, "int4")))


def test_tied_weights_are_one_tensor() -> None:
    model = converted("qwen2")
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[1].mlp.up_proj = layer
    state = float_state_dict(model)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1)]
    assert state[names[0]] is state[names[1]]


def test_the_dtype_of_a_layer_is_that_of_its_bias() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16).to(torch.bfloat16), nn.LayerNorm(16))
    convert_linears(model, ["0", "1"], WeightFormat(bits=8))
    state = float_state_dict(model)
    assert (state["0.weight"].dtype, state["1.weight"].dtype) == (torch.bfloat16, torch.bfloat16)
    model[2].to(torch.float64)
    model = nn.Sequential(model[2], model[0], model[1])
    state = float_state_dict(model)
    assert (state["1.weight"].dtype, state["2.weight"].dtype) == (torch.float64, torch.bfloat16)
    assert float_state_dict(model[1])["weight"].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("here", ["float", "simulated"])
def test_a_float_layer_takes_the_floats_beside_codes(tmp_path: Path, here: str) -> None:
    model, other = converted("llama"), converted("llama", here)
    trained(model)
    model.save_pretrained(tmp_path)
    missing, unexpected = other.load_state_dict(read(tmp_path), strict=False)
    codes = {key for key in model.state_dict() if ".weight_" in key}
    assert not missing and codes == set(unexpected)
    assert same(other.state_dict(), float_state_dict(model))


# ---- models


@every_storage
def test_dequantize_linears_gives_the_float_model(tmp_path: Path, family: str, format: str, attached: bool) -> None:
    model, plain = converted(family, format), float_model(family)
    next(iter(layers_of(model).values())).requires_grad_(False)
    frozen = [name for name, layer in layers_of(model).items() if layer.frozen]
    floats = {id(layer.weight) for layer in layers_of(model).values() if layer.quantized_weight is None}
    others = {id(param) for param in model.parameters()} - {id(layer.weight) for layer in layers_of(model).values()}
    trains = [name for name in layers_of(model) if name not in frozen]
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, trains, rank=8, proj_group_size=16), lr=1e-2)
    optimizer.attach(model)
    if not attached:
        optimizer.detach()
    expected, state = logits(model), float_state_dict(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        dequantize_linears(model)
    lost = f"given {len(trains)} layers, such as {trains[0]}, a new float weight, which the attached optimizer does not"
    replaced = attached and (format.startswith("int") or family == "gpt2")
    assert [lost in str(warning.message) for warning in warned] == [True] * replaced
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert str(model) == str(plain)
    assert same(model.state_dict(), state)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert [name for name, param in model.named_parameters() if not param.requires_grad and param.dim() == 2] == [
        f"{name}.weight" for name in frozen
    ]
    assert others <= {id(param) for param in model.parameters()}
    assert family == "gpt2" or floats <= {id(param) for param in model.parameters()}
    assert not any(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    assert not [key for key in read(tmp_path) if ".weight_" in key]
    assert "save_pretrained" not in vars(model)
    dequantize_linears(model)  # there is nothing left to do


@pytest.mark.parametrize("update_in_backward", [True, False])
@pytest.mark.parametrize("format", ["float", "simulated"])
def test_weights_that_were_float_are_trained_on(format: str, update_in_backward: bool) -> None:
    model = converted("llama", format)
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, layers_of(model), rank=8, proj_group_size=16), lr=1e-2)
    optimizer.attach(model, update_in_backward)
    dequantize_linears(model)
    before = copy.deepcopy(model.state_dict())
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]


def test_one_layer_in_several_places_stays_one() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)))
    model.append(model[0])
    convert_linears(model, ["0", "1.0"], WeightFormat(bits=8))
    model[1][0].weight = model[0].weight  # type: ignore[index, union-attr]
    dequantize_linears(model, torch.bfloat16)
    assert model[0] is model[2] and type(model[0]) is nn.Linear
    assert model[1][0].weight is model[0].weight  # type: ignore[index, union-attr]
    assert model[0].weight.dtype == torch.bfloat16 and model[0].bias.dtype == torch.float32


def test_codes_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    convert_linears(model, "0123", WeightFormat(bits=8))
    codes = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    dequantized = LowRankLinear.dequantized_weight

    def counted(layer: LowRankLinear, dtype: torch.dtype) -> Tensor:
        alive.append(sum(code() is not None for code in codes))
        return dequantized(layer, dtype)

    monkeypatch.setattr(LowRankLinear, "dequantized_weight", counted)
    dequantize_linears(model)
    assert alive == [4, 3, 2, 1]


def test_a_layer_alone_is_refused() -> None:
    layer = LowRankLinear.from_linear(nn.Linear(16, 16), WeightFormat(bits=8))
    with pytest.raises(ValueError, match=r"replaces layers inside a model.*layer\.dequantized_weight"):
        dequantize_linears(layer)


@pytest.fixture
def conv1d() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    conv = pytorch_utils.Conv1D(nf=24, nx=16)
    layer = LowRankLinear(conv.weight.T, conv.bias, WeightFormat(bits=8, group_size=16))
    layer.transposed = True
    yield nn.Sequential(layer)


def test_a_conv1d_is_one_again(conv1d: nn.Sequential) -> None:
    x = torch.randn(3, 16)
    expected, state = conv1d(x), float_state_dict(conv1d)
    assert state["0.weight"].shape == (16, 24)
    dequantize_linears(conv1d)
    assert type(conv1d[0]) is pytorch_utils.Conv1D and (conv1d[0].nf, conv1d[0].nx) == (24, 16)
    assert same(conv1d.state_dict(), state)
    torch.testing.assert_close(conv1d(x), expected)
