"""A family of models is one folder: the registry finds it, and everything else asks it."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining import models
from peft_pretraining.build import build_model
from peft_pretraining.commands.export import export
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.memory.budget import parse_within_budget
from peft_pretraining.memory.plan import plan
from peft_pretraining.models import registry
from peft_pretraining.models.build import build_on_meta, low_rank_names, parameter_count
from peft_pretraining.models.network import CausalLM
from peft_pretraining.speed import update_passes
from peft_pretraining.speed.passes import FP8_SPEED, INT8_SPEED
from peft_pretraining.speed.run_speed import setting_of
from qgalore import LowRankLinear
from tests.small_run import Result, SmallRun, flags_of

FAMILY = """
from dataclasses import dataclass
from typing import ClassVar

from peft_pretraining.errors import UserError
from peft_pretraining.models.family import ModelFamily


@dataclass(frozen=True)
class MixerConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    source: str
    max_position_embeddings: int = 64
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    model_type: ClassVar[str] = "mixer"

    @property
    def head_dim(self):
        return self.hidden_size

    def matrix_shapes(self):
        wide, narrow = self.intermediate_size, self.hidden_size
        return {"mix.into": (wide, narrow), "mix.out": (narrow, wide)}

    def other_shapes(self):
        return [(self.vocab_size, self.hidden_size)] + [(self.hidden_size,)] * (self.num_hidden_layers + 1)

    def parameter_count(self):
        layer = 2 * self.intermediate_size * self.hidden_size
        return (self.vocab_size + self.num_hidden_layers + 1) * self.hidden_size + self.num_hidden_layers * layer


class Mixer(ModelFamily):
    model_type = "mixer"

    def config(self, raw, source):
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        if missing := [key for key in keys if key not in raw]:
            raise UserError(f"{source}: {missing[0]} is missing")
        return MixerConfig(*(raw[key] for key in keys), source)

    def network(self, config):
        from peft_pretraining.models.mixer.network import MixerForCausalLM

        return MixerForCausalLM(config)


FAMILY = Mixer()
"""
NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn

from peft_pretraining.models.head import head_output
from peft_pretraining.models.network import CausalLM


class Mix(nn.Module):
    def __init__(self, hidden, wide):
        super().__init__()
        self.into, self.out = nn.Linear(hidden, wide, bias=False), nn.Linear(wide, hidden, bias=False)

    def forward(self, x):
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.out(F.silu(self.into(before.to(x.dtype))))


class Layer(nn.Module):
    def __init__(self, hidden, wide):
        super().__init__()
        self.norm, self.mix = nn.RMSNorm(hidden, 1e-6), Mix(hidden, wide)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class MixerForCausalLM(CausalLM):
    layers_name = "blocks"
    matrix_names = ("into", "out")
    padded_outputs = ("into",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        sizes = config.hidden_size, config.intermediate_size
        self.blocks = nn.ModuleList(Layer(*sizes) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, 1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, input_ids, labels=None):
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return head_output(self.norm(x), self.lm_head, labels)
"""
CONFIG = {
    "model_type": "mixer",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
MATRICES = [f"blocks.{layer}.mix.{name}" for layer in (0, 1) for name in ("into", "out")]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    """Runs of a model of the family `mixer`, which is one folder."""
    folder = tmp_path / "models" / "mixer"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("family", FAMILY), ("network", NETWORK)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder.parent)])
    importlib.invalidate_caches()
    run = SmallRun(tmp_path)
    run.config.write_text(json.dumps(CONFIG))
    yield run
    for name in [name for name in sys.modules if name.startswith(f"{models.__name__}.mixer")]:
        del sys.modules[name]
    if hasattr(models, "mixer"):
        del models.mixer


def trained(small: SmallRun, optimizer: str, **flags: object) -> Result:
    given: dict[str, object] = flags_of(optimizer) | {"num_training_steps": 2, "save_every": 1} | flags
    return small.run("run", **given)


@pytest.mark.parametrize("optimizer", ["q_galore_adamw8bit_per_layer", "q_galore_adamw8bit"])
def test_one_folder_is_enough_to_train_another_family(small: SmallRun, optimizer: str) -> None:
    result = trained(small, optimizer)
    assert len(result.losses) == 2 and result.eval_loss > 0
    before, after = result.checkpoint(0).model_tensors, result.checkpoint(2).model_tensors
    integers = {name for name, tensor in after.items() if tensor.dtype == torch.uint8 or tensor.dtype == torch.int8}
    assert integers == {f"{name}.weight_qdata" for name in MATRICES}
    # Of scales and zero points those in use stay: only codes and float parameters are updated.
    assert all(not torch.equal(before[name], after[name]) for name in integers | {"table.weight", "norm.weight"})


def test_it_learns(small: SmallRun) -> None:
    flags = {"num_training_steps": 12, "save_every": 0, "activation_checkpointing": None}
    losses = trained(small, "q_galore_adamw8bit_per_layer", **flags).losses
    assert losses[-1] < losses[0] - 0.1


def test_a_qwen2_trains_and_so_do_its_biases(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.config.write_text(
        json.dumps(json.loads(run.config.read_text()) | {"model_type": "qwen2", "num_key_value_heads": 1})
    )
    result = trained(run, "q_galore_adamw8bit_per_layer", num_training_steps=6, save_every=6)
    assert result.losses[-1] < result.losses[0] - 0.05
    before, after = result.weights(0), result.weights(6)
    assert sum(name.endswith(".bias") for name in after) == 3
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]


def test_a_recipe_takes_its_rank_from_another_family(small: SmallRun) -> None:
    flags = {"optimizer": "q_galore_adamw8bit", "recipe": "orthogonal", "rank": None, "lr": None}
    args = parse_args(small.argv("run", flags))
    assert args.subspace.rank == 64 * 7 // 16 // 8 * 8


def test_dry_run_of_another_family(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.main("run", dry_run=True, **flags_of("q_galore_adamw8bit_per_layer")) == 0
    text = capsys.readouterr().out
    assert "parameters, 2 layers, width 64" in text and "Planned memory of one rank" in text
    model = build_on_meta(small.config)
    args = parse_args(small.argv("run", {"optimizer": "adamw", "device": "cuda", "compile": "on"}))
    config = registry.read_config(small.config)
    assert config.parameter_count() == parameter_count(model)
    assert plan(args, config).weights_and_states_bytes == 12 * parameter_count(model)
    # A family whose layers nobody compiles is planned so.
    assert plan(args, config) == plan(parse_args(small.argv("run", {"device": "cuda", "compile": "off"})), config)


COUNTED: dict[str, dict[str, object]] = {
    "rank": {}, "full rank": {"rank": "full", "proj_quant": None, "proj_group_size": None, "update_proj_gap": None},
    "int8": {"int8_products": True, "weight_group_size": None}, "fp8": {"fp8_products": True},
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_the_speed_of_another_family_counts_each_of_its_matrices(small: SmallRun, case: str) -> None:
    """Whose names nothing here knows; as on a GPU without a --batch_size, and under a --memory_budget."""
    flags = flags_of("q_galore_adamw8bit_per_layer") | {"dtype": "bfloat16", "batch_size": 8} | COUNTED[case]
    args = parse_args(small.argv("run", flags))
    setting = setting_of(args, registry.read_config(small.config))
    update = update_passes.q_galore(setting)
    counted = {name: sum(each.operations for each in passes) for name, passes in update.items()}
    products = 2 * setting.tokens * 2 * (64 * 104 + 104 * 64)  # of both layers
    eight_bits = (1, INT8_SPEED, FP8_SPEED, FP8_SPEED)[setting.products]
    assert counted[update_passes.FORWARD] == products / eight_bits
    assert counted[update_passes.INPUT_GRADIENTS] == products / eight_bits
    if case == "full rank":
        assert counted[update_passes.WEIGHT_GRADIENTS] == products
    else:  # each projected onto 32 of the shorter side's 64 dimensions, whichever product comes first
        assert products / 2 <= counted[update_passes.WEIGHT_GRADIENTS] <= 2 * products
    flags |= {"batch_size": None, "memory_budget": "1GB"}
    assert parse_within_budget(small.argv("run", flags)).batch.batch_size == 8


def test_what_the_builder_and_the_optimizers_ask(small: SmallRun) -> None:
    model = build_model(ModelArgs(str(small.config), dtype="float32"))
    assert isinstance(model, CausalLM) and low_rank_names(model) == MATRICES
    assert len(model.decoder_layers) == 2 and model.compiled_layer is None
    model.compile_layers()
    assert model.compiled_layer is None


def test_outputs_are_padded_where_the_network_says_so(small: SmallRun) -> None:
    from peft_pretraining.optim.build import low_rank_converter

    small.config.write_text(json.dumps(CONFIG | {"intermediate_size": 101}))
    args = parse_args(small.argv("run", flags_of("q_galore_adamw8bit")))
    convert = low_rank_converter(args.optimizer, args.quantization)
    model = build_model(ModelArgs(str(small.config), dtype="float32"), on_module=convert)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    assert list(layers) == MATRICES
    assert [name for name, layer in layers.items() if layer.width > layer.out_features] == [MATRICES[0], MATRICES[2]]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("activation_checkpointing", "--activation_checkpointing cannot work with a model of model_type 'mixer'"),
        ("int8_activations", "--int8_activations cannot work with a model of model_type 'mixer'"),
    ],
)
def test_what_a_family_has_not_got_is_refused(small: SmallRun, flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(small.argv("run", {flag: True}))
    with pytest.raises(UserError, match="leave --" + flag):
        build_model(ModelArgs(str(small.config), **{flag: True}))  # type: ignore[arg-type]


def test_an_export_finds_the_columns_of_another_family(small: SmallRun, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    small.config.write_text(json.dumps(CONFIG | {"hidden_size": 60, "intermediate_size": 101}))
    flags: dict[str, Any] = {"weight_bits": 4, "rank": 16}
    export(trained(small, "q_galore_adamw8bit", **flags).save_dir, tmp_path / "exported", "float32")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert tensors["blocks.1.mix.into.weight"].shape == (101, 60)
    assert tensors["blocks.1.mix.out.weight"].shape == (60, 101)


def test_an_unknown_family_is_refused_with_the_known_ones(small: SmallRun) -> None:
    for model_type in ("gpt2", 3, ["llama"]):
        small.config.write_text(json.dumps(CONFIG | {"model_type": model_type}))
        with pytest.raises(UserError) as caught:
            parse_args(small.argv("run"))
        known = f"model_type is {model_type!r}; it must be 'llama' or 'mixer' or 'qwen2', or pass --use_hf_model, which"
        assert known in str(caught.value)
    small.config.write_text(json.dumps({"model_type": "mixer"}))
    with pytest.raises(UserError, match="vocab_size is missing"):
        parse_args(small.argv("run"))


def test_two_families_of_one_name_and_what_is_no_family_are_refused(small: SmallRun) -> None:
    family = small.folder / "models" / "mixer" / "family.py"
    family.write_text(FAMILY.replace('model_type = "mixer"', 'model_type = "llama"'))
    with pytest.raises(ValueError, match=r"two folders of peft_pretraining\.models define the family llama"):
        registry.families()
    del sys.modules["peft_pretraining.models.mixer.family"]
    family.write_text("FAMILY = 3\n")
    importlib.invalidate_caches()
    with pytest.raises(TypeError, match=r"FAMILY of peft_pretraining\.models\.mixer\.family is no ModelFamily"):
        registry.families()


def test_a_family_says_of_itself_what_its_network_overrides() -> None:
    assert list(registry.families()) == ["llama", "qwen2"]
    for name, family in registry.families().items():
        raw = json.loads((Path(__file__).parent.parent / "configs" / "llama_9m.json").read_text())
        raw |= {"model_type": name, "attention_bias": None}
        with torch.device("meta"):
            network = type(family.network(family.config(raw, "a file")))
        overridden = {
            "compiles_layers": network.compile_layers is not CausalLM.compile_layers,
            "recomputes_layers": network.gradient_checkpointing_enable is not CausalLM.gradient_checkpointing_enable,
            "int8_activations": network.keep_int8_activations is not CausalLM.keep_int8_activations,
            "fp8_head": network.multiply_head_in_fp8 is not CausalLM.multiply_head_in_fp8,
            "brings_tables": network.bring_tables_by is not CausalLM.bring_tables_by,
        }
        assert overridden == {key: getattr(family, key) for key in overridden}
