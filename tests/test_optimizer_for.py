"""One line from any model to an optimizer: what is chosen, that all of it trains, what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import qgalore
from qgalore import GaLoreAdafactor, GaLoreAdamW, LowRankLinear, WeightFormat, convert_linears, optimizer_for, summary
from qgalore.optimizer import LowRankAdamW
from qgalore.update.moments import ROW_MOMENT
from tests.transformers_families import FAMILIES, loss_of, model_of, stored

MATRICES = {
    "llama": 14, "qwen2": 14, "qwen3": 14, "mistral": 14, "gemma": 14, "gemma2": 14, "gemma3": 14, "olmo": 14,
    "gpt2": 8, "gpt_neox": 8, "falcon": 8, "bert": 12, "roberta": 12, "t5": 32, "mixtral": 24,
}  # fmt: skip
"""In two layers of each family."""

FLOAT = {"t5": 4, "mixtral": 16}
"""Of those the ones that cannot be converted."""


def train(model: nn.Module, optimizer: LowRankAdamW, updates: int = 3) -> list[float]:
    losses = []
    for _ in range(updates):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, param in model.named_parameters() if torch.equal(param, before[name])]


def low_rank(model: nn.Module, optimizer: LowRankAdamW) -> set[str]:
    weights = {param for group in optimizer.param_groups if "rank" in group for param in group["params"]}
    return {name for name, param in model.named_parameters() if param in weights}


@pytest.mark.parametrize("update_in_backward", [False, True], ids=["step", "backward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_trains(family: str, update_in_backward: bool) -> None:
    model = model_of(family)
    values = sum(param.numel() for param in model.parameters())
    optimizer = optimizer_for(model, rank=8, update_in_backward=update_in_backward)
    before = dict(stored(model))
    losses = train(model, optimizer)
    assert unchanged(model, before) == []
    assert losses[-1] < losses[0] - 0.1
    found = summary(model, optimizer)
    assert (found.low_rank_matrices, found.ranks, found.frozen_values) == (MATRICES[family], (8,), 0)
    stored_as = {"INT8": MATRICES[family] - FLOAT.get(family, 0), "float32": FLOAT.get(family, 0)}
    assert found.stored_bits == {kind: count for kind, count in stored_as.items() if count}
    assert found.low_rank_values + found.full_rank_values == values
    assert not [name for name in low_rank(model, optimizer) if re.search("embed|wte|wpe|shared|lm_head|cls", name)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_float_weights_train_the_same_attached_and_not(family: str) -> None:
    losses, models = [], []
    for attached in (True, False):
        model = model_of(family)
        optimizer = optimizer_for(model, rank=8, weight_bits=None)
        if not attached:
            optimizer.detach()
        before = dict(stored(model))
        losses.append(train(model, optimizer))
        models.append(model)
        assert unchanged(model, before) == [] and losses[-1][-1] < losses[-1][0] - 0.1
        assert not any(param.dtype == torch.uint8 for param in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("recipe", ["orthogonal", "paper"])
def test_int4_weights_train_with_every_recipe(recipe: str) -> None:
    model = model_of("gpt2")
    optimizer = optimizer_for(model, rank=8, weight_bits=4, group_size=16, recipe=recipe, lr=0.02)
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0] - 0.1 and summary(model, optimizer).stored_bits == {"INT4": 8}


# ---- what is frozen


@pytest.mark.parametrize("weight_bits", [8, 4, None])
@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", ["model.embed_tokens", "model.layers.0"]),
        ("gpt2", ["transformer.wpe", "transformer.h.0.attn"]),
        ("mixtral", ["model.layers.0.mlp.experts", "model.layers.1.self_attn"]),
    ],
)
def test_what_was_frozen_stays_frozen(family: str, parts: list[str], weight_bits: int | None) -> None:
    model = model_of(family)
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
    optimizer = optimizer_for(model, rank=8, weight_bits=weight_bits)
    before = dict(stored(model))
    train(model, optimizer, 2)
    frozen = {name for name in before if any(name.startswith(f"{part}.") for part in parts)}
    assert set(unchanged(model, before)) == frozen and frozen
    assert summary(model, optimizer).frozen_values > 0


def test_a_frozen_model_is_refused_and_stays_as_it_is() -> None:
    model = model_of("llama")
    model.get_submodule("model.layers").requires_grad_(False)
    with pytest.raises(ValueError, match="all that would be low-rank of LlamaForCausalLM is frozen: free the layers"):
        optimizer_for(model, rank=8)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


# ---- what is chosen


def test_names_may_be_given() -> None:
    model = model_of("mixtral")
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts.down_proj"]
    optimizer = optimizer_for(model, 8, names)
    experts = "mlp.experts.parametrizations"
    assert low_rank(model, optimizer) == {
        "model.layers.1.self_attn.q_proj.weight",
        *(f"model.layers.0.{experts}.{part}.original{i}" for part in ("gate_up_proj", "down_proj") for i in range(4)),
        *(f"model.layers.1.{experts}.down_proj.original{i}" for i in range(4)),
    }
    layers = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert layers == ["model.layers.1.self_attn.q_proj"]
    assert losses_fall(model, optimizer)


def losses_fall(model: nn.Module, optimizer: LowRankAdamW) -> bool:
    losses = train(model, optimizer)
    return losses[-1] < losses[0]


def test_a_head_may_be_given_by_its_name_alone() -> None:
    model = model_of("llama")
    optimizer = optimizer_for(model, 8, "lm_head")
    assert low_rank(model, optimizer) == {"lm_head.weight"} and losses_fall(model, optimizer)


def test_a_tied_head_stays_float() -> None:
    model = model_of("gpt2")
    optimizer = optimizer_for(model, 8, ["lm_head", "transformer.h.0.mlp.c_fc"])
    assert low_rank(model, optimizer) == {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"}
    assert type(model.get_submodule("lm_head")) is nn.Linear and losses_fall(model, optimizer)


class Blocks(nn.Module):
    """A model without linear layers in repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)


EMPTY: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "names": (
        lambda: model_of("llama"),
        [],
        r"names is empty.* linear layers: .*self_attn\.q_proj \(2 of 32 x 32\).*lm_head",
    ),
    "iterator": (
        lambda: model_of("gpt2"),
        iter(()),
        r"names is empty.* linear layers: .*attn\.c_attn \(2 of 96 x 32\)",
    ),
    "stacks": (lambda: model_of("mixtral"), (), r"stacks of matrices: .*gate_up_proj \(2 of 4 x 96 x 32\)"),
    "choice": (Blocks, None, r"nothing of Blocks .* is in a repeated block: give names\. .*: first \(16 x 16\), head"),
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_choice_lists_the_linear_layers(case: str) -> None:
    make, names, message = EMPTY[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        optimizer_for(model, 8, names)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_other_modules_are_refused() -> None:
    model = model_of("llama")
    with pytest.raises(TypeError, match=r"model\.embed_tokens is a Embedding: name linear layers, which are .*q_proj"):
        optimizer_for(model, 8, ["model.embed_tokens"])
    with pytest.raises(AttributeError, match=r"has no module model\.layers\.0\.k_proj: .*k_proj \(2 of 32 x 32\)"):
        optimizer_for(model, 8, ["model.layers.0.k_proj"])


def test_weights_of_another_library_are_refused() -> None:
    model = model_of("llama")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.0\.mlp\.up_proj is torch\.uint8, quantized by"):
        optimizer_for(model, 8)


def test_matrices_that_are_narrower_than_the_rank_train_at_full_rank(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama", num_key_value_heads=1, num_attention_heads=4)
    optimizer = optimizer_for(model, rank=16)
    said = capsys.readouterr().out
    assert "at full rank, since a side is shorter than 16: model.layers.*.self_attn.k_proj (2 of 8 x 32), " in said
    assert summary(model, optimizer).low_rank_matrices == 10
    before = dict(stored(model))
    assert losses_fall(model, optimizer) and unchanged(model, before) == []
    for names, rank in ((["model.layers.0.self_attn.k_proj"], 16), (None, 64)):
        with pytest.raises(ValueError, match=rf"rank={rank} is larger than the projected side of model\.layers\."):
            optimizer_for(model_of("llama", num_key_value_heads=1, num_attention_heads=4), rank, names)


@pytest.mark.parametrize("recipe", ["orthogonal", "full_rank", "paper"])
def test_the_whole_space(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    optimizer = optimizer_for(model, "full", recipe=recipe, lr=1e-2)
    said = capsys.readouterr().out
    assert "under full-rank training:\n  without projections: 14 matrices, " in said and "values (14 in INT8)" in said
    assert f"\n  recipe {recipe}, lr 0.01, at full rank 0.01" in said and summary(model, optimizer).ranks == ("full",)
    assert losses_fall(model, optimizer)
    expected = {
        "step",
        "exp_avg",
        {"orthogonal": "limited_norm", "full_rank": ROW_MOMENT, "paper": "exp_avg_sq"}[recipe],
    }
    for weight in optimizer.low_rank_weights():
        assert weight.state.keys() == expected and weight.state["exp_avg"].shape == weight.shape
    with pytest.raises(ValueError, match="rank='full' projects nothing, so that subspace='streaming' has no meaning"):
        optimizer_for(model_of("llama"), "full", recipe="paper", subspace="streaming")


def test_layers_whose_weight_the_model_reads_stay_float(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("t5")
    optimizer_for(model, rank=8)
    said = capsys.readouterr().out
    assert (
        "float, since code of T5DenseActDense reads the weight: encoder.block.*.layer.*.DenseReluDense.wo (2 of" in said
    )
    layers = {name: module for name, module in model.named_modules() if name.endswith((".wo", ".wi"))}
    assert {type(layer) for name, layer in layers.items() if name.endswith(".wo")} == {nn.Linear}
    assert {type(layer) for name, layer in layers.items() if name.endswith(".wi")} == {LowRankLinear}


class Router(nn.Linear):
    """As that of Llama 4: a linear layer that gives more than its product."""

    def forward(self, input: torch.Tensor) -> Any:
        logits = super().forward(input)
        return logits, logits.softmax(-1)


class Renamed(nn.Linear):
    """As that of Falcon: a linear layer in other words."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


def test_subclasses_are_converted_where_they_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    block = nn.ModuleDict({"router": Router(16, 16), "renamed": Renamed(16, 16)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    optimizer = optimizer_for(model, rank=8)
    assert type(block["router"]) is Router and type(block["renamed"]) is LowRankLinear
    assert "float, since Router computes more than a linear layer: blocks.0.router (16 x 16)" in capsys.readouterr().out
    assert low_rank(model, optimizer) == {"blocks.0.router.weight", "blocks.0.renamed.weight"}


# ---- what is said


def test_what_was_chosen_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("mixtral")
    optimizer = optimizer_for(model, rank=8)
    said, found = capsys.readouterr().out, summary(model, optimizer)
    assert said.startswith(str(found))
    assert "low-rank: 24 matrices, 45,056 values, rank 8 (8 in INT8, 16 in float32)" in said
    assert "full-rank: 9 parameters, 4,512 values" in said and "frozen" not in said
    assert "float: model.layers.*.mlp.experts.gate_up_proj (2 of 4 x 96 x 32), " in said


@pytest.mark.parametrize("optimizer_class", [qgalore.QGaLoreAdamW8bit, qgalore.GaLoreAdamW])
@pytest.mark.parametrize("recipe", ["orthogonal", "paper"])
@pytest.mark.parametrize("weight_bits", [8, None])
def test_bytes_are_those_that_there_are(
    weight_bits: int | None, recipe: str, optimizer_class: type[LowRankAdamW]
) -> None:
    sizes = {"hidden_size": 64, "vocab_size": 128}  # embeddings have 8-bit states
    model = model_of("llama", **sizes).to(torch.bfloat16)
    optimizer = optimizer_for(
        model, 16, weight_bits=weight_bits, recipe=recipe, optimizer_class=optimizer_class, group_size=16
    )
    assert type(optimizer) is optimizer_class and not optimizer.state
    counted = summary(model, optimizer)
    train(model, optimizer, 1)
    there = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert counted.state_bytes == there
    assert counted.weight_bytes == sum(
        tensor.nbytes
        for module in model.modules()
        for tensor in [*module.parameters(recurse=False), *(module.buffers(False) if _is_low_rank(module) else [])]
    )


def _is_low_rank(module: nn.Module) -> bool:
    return isinstance(module, LowRankLinear)


# ---- recipes and options


def rates(optimizer: LowRankAdamW) -> dict[str, Any]:
    rest, matrices = optimizer.param_groups
    keys = ("lr", "weight_decay", "norm_growth", "rank", "galore_scale", "subspace", "direction", "update_proj_gap")
    return {key: matrices[key] for key in keys} | {"rest": (rest["lr"], rest["weight_decay"])}


def test_the_recipes() -> None:
    """Without a rank it is the recipe's share of the width."""
    assert rates(optimizer_for(model_of("llama"))) == {
        "lr": 0.01, "weight_decay": 0.0, "norm_growth": 1.01, "rank": 8, "galore_scale": 0.5, "subspace": "streaming",
        "direction": "orthogonal", "update_proj_gap": 200, "rest": (0.01, 0.0),
    }  # fmt: skip
    assert rates(optimizer_for(model_of("gpt2", n_embd=64), recipe="paper")) == {
        "lr": 0.004, "weight_decay": 0.0, "norm_growth": 0.0, "rank": 16, "galore_scale": 0.25, "subspace": "svd",
        "direction": "adam", "update_proj_gap": 200, "rest": (0.004, 0.0),
    }  # fmt: skip
    full = optimizer_for(model_of("llama"), recipe="full_rank")
    assert rates(full) == rates(full) | {"lr": 0.01, "rank": "full", "direction": "normuon", "norm_growth": 0.0}
    assert full.param_groups[0]["second_moment"] == "row"


@pytest.mark.parametrize("recipe", ["orthogonal", "full_rank"])
def test_the_recipe_is_that_of_run_pretrain(recipe: str) -> None:
    from peft_pretraining.config.parse import parse_args
    from tests.small_run import ROOT

    flags = (
        f"--model_config {ROOT}/configs/llama_9m.json --dataset pydocs --batch_size 4 --optimizer q_galore_adamw8bit"
    )
    flags += f" --recipe {recipe} --num_training_steps 2000 --total_batch_size 64 --max_length 256"
    args = parse_args(flags.split()).optimizer
    optimizer = optimizer_for(model_of("llama"), 8, recipe=recipe, updates=2000, tokens_per_update=64 * 256)
    found = rates(optimizer)
    assert found["lr"] == args.lr and found["weight_decay"] == pytest.approx(args.weight_decay)
    assert found["rest"] == pytest.approx((args.peak_full_rank_lr, args.decay_of_full_rank))
    assert found["weight_decay"] > 0


def test_options_have_their_say_over_the_recipe() -> None:
    model = model_of("llama")
    optimizer = optimizer_for(
        model, 8, lr=0.002, weight_decay=0.1, norm_growth=0, betas=(0.8, 0.9), scale=1.0, update_proj_gap=7,
        full_rank_lr=0.03, full_rank_weight_decay=0.0, updates=100, stochastic_rounding=False, proj_bits=8,
    )  # fmt: skip
    found = rates(optimizer)
    assert found == found | {"lr": 0.002, "weight_decay": 0.1, "norm_growth": 0, "galore_scale": 1.0}
    assert found["update_proj_gap"] == 7 and found["rest"] == (0.03, 0.0)
    assert optimizer.param_groups[1]["proj_bits"] == 8 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, LowRankLinear) and layer.format == WeightFormat(8, stochastic_rounding=False)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of 0": ({"rank": 0}, ValueError, "rank=0 must be a whole number of dimensions, at least 1"),
    "rank that is no integer": ({"rank": 8.0}, ValueError, r"rank=8\.0 must be a whole number"),
    "weight_bits": ({"weight_bits": 16}, ValueError, "weight_bits=16 must be 8 or 4, or None for weights that stay"),
    "recipe": (
        {"recipe": "muon"},
        ValueError,
        "recipe='muon' is unknown: it must be one of full_rank, orthogonal, paper",
    ),
    "option": ({"galore_scael": 1}, TypeError, r"has no option galore_scael \(did you mean galore_scale\?\)"),
    "bits": ({"bits": 8}, TypeError, "has no option bits"),
    "subspace": ({"subspace": "pca"}, ValueError, "subspace='pca' is unknown"),
    "lr": ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
    "full_rank_lr": ({"full_rank_lr": -1.0}, ValueError, r"full_rank_lr=-1\.0 must be a finite number, at least 0"),
    "full_rank_lr nan": ({"full_rank_lr": float("nan")}, ValueError, "full_rank_lr=nan must be a finite number"),
    "lr nan": ({"lr": float("nan")}, ValueError, "^lr=nan must be a finite number, at least 0"),
    "lr as text": ({"lr": "1e-3", "updates": 10}, ValueError, "^lr='1e-3' must be a finite number"),
    "no lr": ({"lr": None, "updates": 10}, ValueError, "^lr=None must be a finite number"),
    "weight_bits that are no integer": ({"weight_bits": 8.0}, ValueError, r"weight_bits=8\.0 must be 8 or 4"),
    "updates": ({"updates": -5}, ValueError, "updates=-5 must be a whole number, at least 0"),
    "tokens": ({"updates": 5, "tokens_per_update": 0}, ValueError, "tokens_per_update=0 must be a whole number, at"),
    "another library's optimizer": ({"optimizer_class": torch.optim.AdamW}, TypeError, "must be one of this library"),
    "seed": ({"seed": None}, ValueError, "seed=None must be a whole number"),
    "sums": (
        {"accumulator_dtype": torch.bfloat16},
        ValueError,
        "accumulator_dtype=torch.bfloat16 is unknown: it must be",
    ),
    "shrinking": ({"norm_growth": 0.5}, ValueError, "norm_growth=0.5 must be at least 1, such as 1.01, or 0"),
    "Adafactor with the orthogonal recipe": (
        {"optimizer_class": GaLoreAdafactor},
        ValueError,
        "take direction='adam', in optimizer_for recipe='paper'",
    ),
    "Adafactor at full rank": (
        {"optimizer_class": GaLoreAdafactor, "recipe": "full_rank"},
        ValueError,
        "take direction='adam', in optimizer_for recipe='paper'",
    ),
    "L2": ({"weight_decay": 0.1, "decoupled_weight_decay": False}, ValueError, "is decoupled"),
    "products": ({"weight_bits": 4, "int8_products": True}, ValueError, "int8_products multiplies the codes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_values_are_refused_and_the_model_stays(case: str) -> None:
    options, error, message = REFUSED[case]
    model = model_of("mixtral", num_hidden_layers=1)
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        optimizer_for(model, **{"rank": 8} | options)
    assert list(model.state_dict()) == before and not any(map(_is_low_rank, model.modules()))


def test_adafactor_finds_its_own_rate_and_takes_a_given_one() -> None:
    model = model_of("llama")
    optimizer = optimizer_for(model, rank=8, recipe="paper", optimizer_class=GaLoreAdafactor)
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    before = dict(stored(model))
    train(model, optimizer, 1)
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters())
    options = {"relative_step": False, "lr": 1e-3, "full_rank_lr": 2e-3}
    optimizer = optimizer_for(model, rank=8, recipe="paper", optimizer_class=GaLoreAdafactor, **options)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3]


def _with_computed_weight(kind: str) -> nn.Module:
    model = model_of("llama")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    if kind == "parametrize":
        nn.utils.parametrizations.weight_norm(layer)
    else:
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


@pytest.mark.parametrize("kind", ["parametrize", "prune"])
def test_a_weight_that_is_computed_from_others_is_refused(kind: str) -> None:
    model = _with_computed_weight(kind)
    with pytest.raises(TypeError, match=r"the weight of model\.layers\.0\.mlp\.up_proj is computed from other"):
        optimizer_for(model, rank=8)
    with pytest.raises(TypeError, match=r"the weight of model\.layers\.0\.mlp\.up_proj is computed from other"):
        convert_linears(model, ["model.layers.0.mlp.up_proj"], WeightFormat(8))
    assert not any(map(_is_low_rank, model.modules()))


class WithLoRA(nn.Linear):
    """As loralib has it: the second factor starts at zero, so that at first it computes as a linear layer."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.lora_A = nn.Parameter(torch.ones(2, columns))
        self.lora_B = nn.Parameter(torch.zeros(rows, 2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + input @ self.lora_A.T @ self.lora_B.T


def test_a_layer_with_parameters_of_its_own_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    block = model.get_submodule("model.layers.0.mlp")
    block.up_proj = WithLoRA(32, 48)
    with pytest.raises(TypeError, match=r"up_proj is a WithLoRA with lora_A, lora_B beside weight and bias, which a"):
        convert_linears(model, ["model.layers.0.mlp.up_proj"], WeightFormat(8))
    optimizer = optimizer_for(model, rank=8)
    assert (
        "float, since WithLoRA holds more than weight and bias: model.layers.0.mlp.up_proj" in capsys.readouterr().out
    )
    before = dict(stored(model))
    train(model, optimizer, 2)
    assert isinstance(block.up_proj, WithLoRA) and not unchanged(model, before)


def test_what_is_no_model_with_layers_inside_is_refused() -> None:
    with pytest.raises(TypeError, match="got a generator as model: give the torch"):
        optimizer_for(model_of("llama").parameters(), rank=8)  # type: ignore[arg-type]
    for refused in (
        lambda model: optimizer_for(model, 8, [""]),
        lambda model: convert_linears(model, [""], WeightFormat(8)),
    ):
        with pytest.raises(TypeError, match="the model is itself a Linear, and layers are replaced inside a model"):
            refused(nn.Linear(16, 16))


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = model_of("llama")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device and has no values"):
        optimizer_for(model, rank=8)


def test_a_model_in_float64_is_refused() -> None:
    model = model_of("llama").to(torch.float64)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is float64: updates are made in float32"):
        optimizer_for(model, rank=8)
    assert not any(map(_is_low_rank, model.modules()))


def test_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(model_of("llama"))
        with pytest.raises(
            ValueError, match="the model is a DistributedDataParallel, which does not see the gradients"
        ):
            optimizer_for(model, rank=8)
    finally:
        torch.distributed.destroy_process_group()
    assert not any(map(_is_low_rank, model.modules()))


# ---- twice


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5"])
def test_a_model_may_get_another_optimizer(family: str) -> None:
    model = model_of(family)
    train(model, optimizer_for(model, rank=8), 1)
    optimizer = optimizer_for(model, rank=4, optimizer_class=GaLoreAdamW)
    before = dict(stored(model))
    assert losses_fall(model, optimizer) and unchanged(model, before) == []
    assert summary(model, optimizer).low_rank_matrices == MATRICES[family]
    with pytest.raises(
        ValueError, match=r"is converted to WeightFormat\(bits=8.* already, not to WeightFormat\(bits=4"
    ):
        optimizer_for(model, rank=4, weight_bits=4)


def test_a_plain_loop_clips_with_the_function_of_torch() -> None:
    """It finds the norm; the update is that which the optimizer's own clipping makes, also where both are called."""
    weights = []
    for torchs, ours in ((0.5, None), (None, 0.5), (1e9, 0.5)):
        model = model_of("llama")
        optimizer = optimizer_for(model, rank=8, weight_bits=None, lr=1e-3, norm_growth=0.0, direction="adam")
        before, norms = dict(stored(model)), []
        for _ in range(3):
            loss_of(model).backward()
            if torchs is not None:
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), torchs)))
            if ours is not None:
                optimizer.clip_grad_norm_(ours)
            optimizer.step()
            optimizer.zero_grad()
        assert all(norm > 0.5 for norm in norms) and unchanged(model, before) == []
        weights.append([value for _, value in stored(model)])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(weights[0], weights[1], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(weights[1], weights[2], strict=True))
