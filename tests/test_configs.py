"""The shipped model configs have the published shapes, load in transformers, and bad ones are refused by name."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.models.build import build_on_meta, parameter_count
from peft_pretraining.models.config import check_length, rank_problems
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.qwen2.config import Qwen2Config
from peft_pretraining.models.registry import read_config

# name: hidden, MLP, layers, heads, and the parameters in millions that the name rounds
SHAPES = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "30b": (6656, 17920, 60, 52),
    "70b": (8192, 28672, 80, 64),
}
KEY_VALUE_HEADS = {"70b": 8}
"""Where they are fewer than heads, which share them."""
POSITIONS = {"7b": 2048, "13b": 2048, "30b": 2048, "70b": 4096}
COUNTS = {"9m": 8_995_968, "60m": 58_073_600, "350m": 367_969_280, "1b": 1_339_082_752, "7b": 6_738_415_616}
COUNTS |= {"30b": 32_528_943_616, "70b": 68_976_648_192}  # as LLaMA-1 and LLaMA-2 have them


def expected_count(name: str) -> int:
    hidden, inter, layers, heads = SHAPES[name]
    key_values = 2 * hidden**2 * KEY_VALUE_HEADS.get(name, heads) // heads
    vocabulary = 32_100 if name == "100m" else 32_000
    return 2 * vocabulary * hidden + layers * (2 * hidden**2 + key_values + 3 * hidden * inter + 2 * hidden) + hidden


def test_every_config_is_listed(root: Path) -> None:
    assert {path.stem for path in (root / "configs").iterdir()} == {f"llama_{name}" for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(root: Path, name: str) -> None:
    path = root / "configs" / f"llama_{name}.json"
    config = LlamaConfig.from_json(path)
    assert SHAPES[name] == (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert config.num_key_value_heads == KEY_VALUE_HEADS.get(name, config.num_attention_heads)
    assert config.vocab_size == (32_100 if name == "100m" else 32_000)
    assert config.max_position_embeddings == POSITIONS.get(name, 1024)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 10000.0, False)
    assert config.parameter_count() == expected_count(name) == COUNTS.get(name, expected_count(name))
    assert parameter_count(build_on_meta(path)) == config.parameter_count()


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_the_same(root: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = root / "configs" / f"llama_{name}.json"
    theirs = transformers.AutoConfig.from_pretrained(str(path))
    ours = LlamaConfig.from_json(path)
    assert theirs.architectures == ["LlamaForCausalLM"] and theirs.model_type == "llama"
    for key in (field.name for field in dataclasses.fields(LlamaConfig)):
        if key not in ("source", "rope_theta", "rope_scaling"):
            assert getattr(theirs, key) == getattr(ours, key), key
    assert theirs.rope_parameters == {"rope_theta": ours.rope_theta, "rope_type": "default"}
    assert str(theirs.dtype) == "torch.bfloat16"
    written = ours.to_hf_dict("bfloat16")
    written.pop("head_dim")
    assert written == json.loads(path.read_text())


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GOOD = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_defaults_of_a_short_config(tmp_path: Path) -> None:
    config = LlamaConfig.from_json(write(tmp_path, rope_theta=5e5, eos_token_id=[3, 4]))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.eos_token_id) == (4, 8, 5e5, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pad_token_id": -1}, "pad_token_id is -1; it must be null or an id inside the vocabulary, 0 to 99"),
        ({"bos_token_id": 100}, "bos_token_id is 100"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"max_sequence_length": 1024}, "rename it max_position_embeddings"),
        ({"hidden_size": 33}, "hidden_size is 33; it must be a multiple of the 4 heads"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 36}, "head_dim is 9; it must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor of num_attention_heads (4)"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; it must be 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"mlp_bias": True}, "mlp_bias is True; it must be false"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear'"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has values of its own for full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; it must be 1.0"),
        (
            {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": {"rope_theta": 2.0}},
            "give rope_parameters alone",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of rope_type 'llama3' lacks low_freq"),
        ({"rope_parameters": SCALING | {"factor": 0.5}}, "factor of rope_parameters is 0.5; it must be a number, 1"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 0}}, "low_freq_factor of rope_scaling is 0; it must be a pos"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1}}, "high_freq_factor of rope_scaling is 1; it must be a n"),
        ({"rope_scaling": SCALING | {"original_max_position_embeddings": 8.5}}, "must be a positive whole number"),
        ({"rope_scaling": SCALING | {"beta_fast": 32}}, "rope_type 'llama3' has beta_fast, which it does not know"),
    ],
)
def test_bad_value_is_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        LlamaConfig.from_json(path)
    assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_key_value_heads": None, "attention_bias": False},
            "attention_bias is False; it must be true or left out",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is True; it must be false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'qwen2'"),
    ],
)
def test_bad_value_of_a_qwen2_is_named(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = write(tmp_path, **{"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": None} | changes)
    with pytest.raises(UserError) as error:
        Qwen2Config.from_json(path)
    assert says in str(error.value) and str(path) in str(error.value)


def test_a_qwen2_gives_its_heads_of_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_key_value_heads missing; a Qwen2 config\.json gives vocab_size, "):
        read_config(write(tmp_path, model_type="qwen2"))


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "rope_scaling": SCALING}, {"model_type": "qwen2", "num_key_value_heads": 2}]
)
def test_what_is_written_is_read_as_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    """By us, and by transformers."""
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, **changes)
    config = read_config(path)
    assert isinstance(config, LlamaConfig)
    path.write_text(json.dumps(config.to_hf_dict("float32")))
    assert read_config(path) == config
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(str(path)))
    assert theirs.num_parameters() == config.parameter_count() == parameter_count(build_on_meta(path))
    assert theirs.config.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        LlamaConfig.from_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"a folder without config\.json"):
        LlamaConfig.from_json(tmp_path)
    (tmp_path / "broken.json").write_text('{"hidden_size": ')
    with pytest.raises(UserError, match=r"broken\.json: not JSON"):
        LlamaConfig.from_json(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"binary\.json: not JSON"):
        LlamaConfig.from_json(tmp_path / "binary.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a JSON list"):
        LlamaConfig.from_json(tmp_path / "list.json")
    (tmp_path / "short.json").write_text('{"hidden_size": 8}')
    with pytest.raises(UserError, match="vocab_size, intermediate_size, num_hidden_layers, num_attention_heads miss"):
        LlamaConfig.from_json(tmp_path / "short.json")


def test_limits_name_the_flag(tmp_path: Path) -> None:
    config = LlamaConfig.from_json(write(tmp_path, num_key_value_heads=2))
    check_length(config, 1024)
    layers, shapes = config.num_hidden_layers, config.matrix_shapes()
    problems = functools.partial(rank_problems, config.source, layers, shapes)
    assert not problems((16, 8)) and not problems((*[8] * (layers - 1), "full")) and not problems((16,), (32, "full"))
    with pytest.raises(UserError, match=r"--max_length is 1025, but .*model\.json has max_position_embeddings 1024"):
        check_length(config, 1025)
    too_large = f"of {config.source} is {{}}: give at most {{}}."
    assert problems((8, 17)) == ["--rank is 17, but self_attn.k_proj " + too_large.format("16 x 32", 16)]
    # A flag is about its own matrices.
    assert problems((16,), (33,)) == ["--mlp_rank is 33, but mlp.gate_proj " + too_large.format("64 x 32", 32)]
    assert len(problems((17,), (33,))) == 2
    assert problems([8] * (layers + 1)) == [
        f"--rank has {layers + 1} ranks for parts of the layers, and {config.source} has {layers} layers: give at most "
        "so many."
    ]
