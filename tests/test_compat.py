"""Scripts of galore-torch and q-galore-torch, as their users write them, on this library."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgalore
from qgalore import LowRankLinear, compat
from qgalore.optimizer import LowRankAdamW

PACKAGES = ("galore_torch", "q_galore_torch")


def of_packages() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}


@pytest.fixture
def clean() -> Iterator[None]:
    """Neither package before, nor after."""
    before = of_packages()
    for name in before:
        del sys.modules[name]
    yield
    for name in of_packages():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def installed(clean: None) -> None:
    assert compat.install() == list(PACKAGES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(16, 16, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(16, 32), "down_proj": nn.Linear(32, 16)})
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["q_proj"](self.norm(x))
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())


def model_of(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


IDS = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(1))
SUBSPACE = {"rank": 4, "update_proj_gap": 5, "scale": 0.5, "proj_type": "std"}
QUANTIZED = {
    "quant": True, "quant_n_bit": 4, "quant_group_size": 16, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5,
}  # fmt: skip
ARGS = argparse.Namespace(weight_bits=8, weight_group_size=16, stochastic_round=True)
TARGETS = ["q_proj", "up_proj", "down_proj"]


def groups_of(model: nn.Module, **low_rank: Any) -> list[dict[str, Any]]:
    """Two groups as those scripts make them: by the identity of the weights of linear layers."""
    galore_params = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LowRankLinear)) and any(key in name for key in ("attn", "mlp"))
    ]
    ids = {id(param) for param in galore_params}
    rest = [param for param in model.parameters() if id(param) not in ids]
    return [{"params": rest}, {"params": galore_params, **SUBSPACE, **low_rank}]


def train(model: nn.Module, optimizer: Any, updates: int) -> list[float]:
    losses = []
    for _ in range(updates):
        loss = model(IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def all_changed(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(not torch.equal(param, before[name]) for name, param in model.named_parameters())


# ---- arguments

THEIR_8BIT = {
    "amsgrad": False, "optim_bits": 32, "args": None, "min_8bit_size": 4096, "percentile_clipping": 100,
    "block_wise": True, "is_paged": False,
}  # fmt: skip
OURS = (qgalore.GaLoreAdamW, qgalore.GaLoreAdamW8bit, qgalore.QGaLoreAdamW8bit)


@pytest.mark.parametrize("kind", OURS)
def test_arguments_that_ask_for_nothing_are_taken_without_a_word(kind: type[LowRankAdamW]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind([nn.Parameter(torch.ones(2))], lr=0.1, correct_bias=True, no_deprecation_warning=True, **THEIR_8BIT)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", OURS)
def test_one_warning_names_all_that_is_ignored(kind: type[LowRankAdamW]) -> None:
    given = {**THEIR_8BIT, "is_paged": True, "percentile_clipping": 5, "block_wise": False}
    with pytest.warns(UserWarning, match="ignores percentile_clipping=5, block_wise=False, is_paged=True: ") as caught:
        kind([nn.Parameter(torch.ones(2))], lr=0.1, **given)  # type: ignore[arg-type]
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message).startswith(kind.__name__)


def test_what_nobody_knows_or_would_change_the_training_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="unexpected argument 'rank': options of a subspace go into param groups"):
        qgalore.GaLoreAdamW(params, rank=4)
    with pytest.raises(ValueError, match="correct_bias=False: the bias of Adam's moments is always corrected here"):
        qgalore.GaLoreAdamW(params, correct_bias=False)


def test_arguments_come_in_the_order_and_with_the_defaults_of_the_originals(installed: None) -> None:
    from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
    from q_galore_torch import QGaLoreAdamW8bit, QGaLoreAdamW8bit_simulate

    params = [nn.Parameter(torch.ones(2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = GaLoreAdamW(params, 0.1, (0.8, 0.9), 1e-7, 0.2, True, True).defaults
        GaLoreAdafactor(params, None, (1e-20, 1e-2), 2.0, -0.7, 0.5, 0.1, False, True, True)
        eight = [
            kind(params, 0.1, (0.8, 0.9), 1e-7, 0.2, False, 32, None, 4096, 100, True, False).defaults
            for kind in (GaLoreAdamW8bit, QGaLoreAdamW8bit, QGaLoreAdamW8bit_simulate)
        ]
    given = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.2}
    for defaults in (plain, *eight):
        assert {name: defaults[name] for name in given} == given
    found = [kind(params).defaults for kind in (GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit)]
    assert [(each["lr"], each["eps"], each["weight_decay"]) for each in found] == [
        (1e-3, 1e-6, 0.0), (1e-3, 1e-8, 1e-2), (1e-3, 1e-8, 1e-2),
    ]  # fmt: skip
    with pytest.raises(TypeError, match="3 arguments after weight_decay, of at most 2: correct_bias"):
        GaLoreAdamW(params, 0.1, (0.8, 0.9), 1e-7, 0.2, True, True, False)
    with pytest.raises(TypeError, match="amsgrad is given twice"):
        GaLoreAdamW8bit(params, 0.1, (0.8, 0.9), 1e-7, 0.2, False, amsgrad=False)
    with pytest.warns(UserWarning, match="ignores is_paged=True"):
        GaLoreAdamW8bit(params, 0.1, is_paged=True)


# ---- modules


def test_modules_are_where_scripts_import_them_from(installed: None) -> None:
    found = {
        "galore_torch": "GaLoreAdamW GaLoreAdamW8bit GaLoreAdafactor",
        "galore_torch.adamw": "AdamW",
        "galore_torch.adamw8bit": "AdamW8bit",
        "galore_torch.adafactor": "Adafactor",
        "q_galore_torch": "QGaLoreAdamW8bit QGaLoreAdamW8bit_simulate",
        "q_galore_torch.q_galore_adamw8bit": "AdamW8bit",
        "q_galore_torch.q_galore_adamw8bit_simulate": "AdamW8bit",
        "q_galore_torch.utils.quantization": "prepare_model_for_int8_training QGaLoreLinear",
        "q_galore_torch.utils.simulate_quantization": "prepare_model_for_int8_training_simulation QLinear",
        "q_galore_torch.utils.setup": "saving_model_weight load_model_weight",
    }
    for name, members in found.items():
        module = importlib.import_module(name)
        assert all(callable(getattr(module, member)) for member in members.split())
        assert importlib.util.find_spec(name) is not None
    import q_galore_torch.utils.setup as setup  # by way of the attributes of its parents

    assert setup is sys.modules["q_galore_torch.utils.setup"]
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("galore_torch.galore_projector")
    before = dict(of_packages())
    assert compat.install() == list(PACKAGES) and before == of_packages()  # once more changes nothing


def test_a_package_that_is_installed_stays_unless_asked(
    clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "galore_torch").mkdir()
    (tmp_path / "galore_torch" / "__init__.py").write_text("GaLoreAdamW = 'theirs'\n")
    (tmp_path / "galore_torch" / "galore_projector.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"galore_torch is installed and stays what it is: install\(shadow=True\)"):
        assert compat.install() == ["q_galore_torch"]
    assert importlib.import_module("galore_torch").GaLoreAdamW == "theirs"
    importlib.import_module("galore_torch.galore_projector")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.install(shadow=True) == list(PACKAGES)
        assert compat.install() == list(PACKAGES)  # what is ours already stays ours
    assert importlib.import_module("galore_torch").GaLoreAdamW is compat.GaLoreAdamW
    assert "galore_torch.galore_projector" not in sys.modules


# ---- scripts of galore-torch

NOT_CORRECTED = {"correct_bias": False}


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"])
def test_a_script_of_galore_torch(installed: None, name: str) -> None:
    import galore_torch

    model = model_of()
    rest, low_rank = groups_of(model)
    options = {"relative_step": False, "scale_parameter": False} if "factor" in name else {"weight_decay": 0.01}
    optimizer = getattr(galore_torch, name)([rest, low_rank], lr=0.02, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.5)
    before = copies(model)
    losses = train(model, optimizer, 12)
    schedule.step()
    assert losses[-1] < 0.8 * losses[0] and all_changed(model, before)
    for param in low_rank["params"]:
        sizes = [value.numel() for key, value in optimizer.state[param].items() if key.startswith("exp_avg")]
        assert max(sizes) <= 4 * max(param.shape)  # states of the projection
    restored = getattr(galore_torch, name)(groups_of(model), lr=0.02, **options)
    restored.load_state_dict(optimizer.state_dict())


def test_moments_are_not_corrected_where_a_script_says_so(installed: None) -> None:
    """With correct_bias=False the first update is (1 - b1) g / (sqrt((1 - b2) g^2) + eps), as in galore-torch."""
    import galore_torch

    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.96), "eps": 0.5}
    grads = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([-1.0, 4.0, 2.0])
    for place in ("argument", "group"):
        param = nn.Parameter(torch.ones(3))
        group = {"params": [param], **({"correct_bias": False} if place == "group" else {})}
        optimizer = galore_torch.GaLoreAdamW([group], **options, **({} if group.keys() > {"params"} else NOT_CORRECTED))
        expected, first, second = torch.ones(3), torch.zeros(3), torch.zeros(3)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
            first, second = 0.8 * first + 0.2 * grad, 0.96 * second + 0.04 * grad.square()
            expected = expected - 0.1 * first / (second.sqrt() + 0.5)
            torch.testing.assert_close(param.detach(), expected, atol=1e-6, rtol=1e-6)
        later = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [later]})
        assert optimizer.param_groups[1].get("correct_bias", True) is (place == "group")


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit"])
def test_an_optimizer_a_parameter_and_a_hook_that_steps_it(installed: None, name: str) -> None:
    import galore_torch

    kind, model = getattr(galore_torch, name), model_of()
    low_rank = {id(param) for param in groups_of(model)[1]["params"]}
    optimizers = {}
    for param in model.parameters():
        group: dict[str, Any] = {"params": param, **(SUBSPACE if id(param) in low_rank else {})}
        optimizers[param] = kind([group], lr=0.02)

    def update(param: Tensor) -> None:
        if param.grad is None:
            return
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    before, losses = copies(model), []
    for _ in range(8):
        loss = model(IDS)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and all_changed(model, before)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"])
def test_galore_has_no_lazy_rule_and_q_galore_has(installed: None, name: str) -> None:
    import galore_torch
    import q_galore_torch

    weight, rates = [nn.Parameter(torch.ones(8, 8))], {"lr": 0.1}
    if name == "GaLoreAdafactor":
        rates |= {"relative_step": False}
    (group,) = getattr(galore_torch, name)([{"params": weight, **SUBSPACE}], **rates).param_groups
    assert group["gamma_proj"] == 1 and group["galore_scale"] == 0.5 and not group["proj_quant"]
    (group,) = q_galore_torch.QGaLoreAdamW8bit([{"params": weight, **SUBSPACE}], lr=0.1).param_groups
    assert group["gamma_proj"] == 2 and group["proj_quant"]


def test_tensors_of_more_dimensions_are_refused_at_once(installed: None) -> None:
    from galore_torch import GaLoreAdamW

    weight = nn.Parameter(torch.ones(4, 4, 3, 3))
    with pytest.raises(ValueError, match="dim=4: the gradients of matrices alone are projected here"):
        GaLoreAdamW([{"params": [weight], "dim": 4, **SUBSPACE, "rank": 0.2}])
    with pytest.raises(ValueError, match=r"of shape \(4, 4, 3, 3\) is not a matrix"):
        GaLoreAdamW([{"params": [weight], **SUBSPACE}])
    (group,) = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))], "dim": 2, **SUBSPACE}]).param_groups
    assert "dim" not in group


@pytest.mark.parametrize("name", ["galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"])
def test_the_trainer_of_transformers_trains_by_these_names(installed: None, tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trainer() -> Any:
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path), optim=name, optim_target_modules=[r".*(attn|mlp).*proj"], learning_rate=0.02, max_steps=4,
            optim_args="rank=4,update_proj_gap=2", per_device_train_batch_size=4, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no" if "layer" in name else "steps",
        )  # fmt: skip
        return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows)

    whole = trainer()
    before = copies(whole.model)
    whole.train()
    assert all_changed(whole.model, before)
    if "layer" in name:  # of which transformers saves nothing
        return
    kind = compat.GaLoreAdafactor if "factor" in name else compat.GaLoreAdamW8bit
    assert isinstance(whole.optimizer.optimizer, kind)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, copies(whole.model)[name]) for name, value in copies(resumed.model).items())


# ---- scripts of q-galore-torch


def int8_model(seed: int = 0) -> Model:
    from q_galore_torch.utils.quantization import QGaLoreLinear, prepare_model_for_int8_training

    model: Model = prepare_model_for_int8_training(model_of(seed), ARGS, TARGETS)
    layers = [module for module in model.modules() if isinstance(module, QGaLoreLinear)]
    assert len(layers) == 6
    for layer in layers:
        layer.weight.scales = layer.weight.scales.to(layer.weight.device)
        layer.weight.zeros = layer.weight.zeros.to(layer.weight.device)
        assert hasattr(layer.weight, "group_size") and not layer.weight.is_floating_point()
    return model


def dense(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    return {name: layer.dequantized_weight(torch.float32).clone() for name, layer in layers.items()}


def test_a_script_of_q_galore_torch(installed: None, tmp_path: Path) -> None:
    from q_galore_torch import QGaLoreAdamW8bit
    from q_galore_torch.utils.setup import load_model_weight, saving_model_weight

    model = int8_model()
    optimizer = QGaLoreAdamW8bit(groups_of(model, **QUANTIZED), lr=0.02, weight_decay=0, betas=(0.9, 0.99))
    trained = [param for param in model.parameters() if param.requires_grad]
    before, before_int8, losses = copies(model), dense(model), []
    for _ in range(12):
        loss = model(IDS)
        loss.backward()
        assert all(param.grad is not None for param in trained)  # so it can be clipped
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and all_changed(model, before)
    assert all(not torch.equal(before_int8[name], value) for name, value in dense(model).items())
    saving_model_weight(model, str(tmp_path / "weights.pth"))
    other = load_model_weight(int8_model(1), str(tmp_path / "weights.pth"))
    assert torch.equal(other(IDS), model(IDS))
    resumed = QGaLoreAdamW8bit(groups_of(other, **QUANTIZED), lr=0.02, weight_decay=0, betas=(0.9, 0.99))
    resumed.load_state_dict(optimizer.state_dict())
    assert train(other, resumed, 6) == train(model, optimizer, 6)
    assert torch.equal(other(IDS), model(IDS))


def test_who_attaches_such_an_optimizer_says_which_micro_batch_is_the_last(installed: None) -> None:
    from q_galore_torch import QGaLoreAdamW8bit

    model = int8_model()
    optimizer = QGaLoreAdamW8bit(groups_of(model, **QUANTIZED), lr=0.02, weight_decay=0)
    optimizer.attach(model, update_in_backward=True)
    before = dense(model)
    model(IDS).backward()
    assert all(not torch.equal(before[name], value) for name, value in dense(model).items())
    assert all(param.grad is None for param in model.parameters())


def test_several_processes_need_the_sum_of_int8_gradients(installed: None) -> None:
    from q_galore_torch import QGaLoreAdamW8bit
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = int8_model()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"INT8 weights of several processes.*attach\(model, all_reduce"):
            QGaLoreAdamW8bit(groups_of(model, **QUANTIZED), lr=0.02)
        QGaLoreAdamW8bit(model_of().parameters(), lr=0.02)
    finally:
        torch.distributed.destroy_process_group()


def test_micro_batches_add_up_without_a_word_from_the_script(installed: None) -> None:
    from q_galore_torch import QGaLoreAdamW8bit

    args = argparse.Namespace(**vars(ARGS) | {"stochastic_round": False})
    found = []
    for parts in ([IDS], IDS.split(2)):
        model = compat.prepare_model_for_int8_training(model_of(), args, TARGETS)
        optimizer = QGaLoreAdamW8bit(groups_of(model, quant=False), lr=0.02, weight_decay=0)
        for _ in range(3):
            for part in parts:
                (model(part) / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(dense(model))
    for name, value in found[0].items():
        difference = (value - found[1][name]).abs()
        # A sum in another order may round to the neighbouring code.
        assert difference.mean() < 1e-4 and difference.max() < 0.02, name


def test_int8_weights_with_an_optimizer_and_a_hook_each(installed: None) -> None:
    from q_galore_torch import QGaLoreAdamW8bit

    model = int8_model()
    optimizers = {
        param: QGaLoreAdamW8bit([{"params": [param], **SUBSPACE, **QUANTIZED}], lr=0.02, weight_decay=0)
        for param in groups_of(model)[1]["params"]
    }
    steps = []

    def update(param: Any) -> None:
        if not hasattr(param, "float_grad") and param.grad is None:
            return
        optimizers[param].step()
        optimizers[param].zero_grad()
        steps.append(param)

    for param in optimizers:
        param.backward_hook = update  # type: ignore[attr-defined]
    before, losses = dense(model), []
    for _ in range(8):
        loss = model(IDS)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and len(steps) == 8 * len(optimizers)
    assert all(not torch.equal(before[name], value) for name, value in dense(model).items())


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_script_that_simulates(installed: None, stochastic: bool) -> None:
    from q_galore_torch import QGaLoreAdamW8bit_simulate
    from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation

    args = argparse.Namespace(**vars(ARGS) | {"stochastic_round": stochastic})
    model = prepare_model_for_int8_training_simulation(model_of(), args, TARGETS)
    optimizer = QGaLoreAdamW8bit_simulate(groups_of(model, **QUANTIZED), lr=0.02, weight_decay=0)
    before = copies(model)
    loss = model(IDS)
    loss.backward()
    assert all(param.grad is not None for param in model.parameters())
    assert all(hasattr(param, "group_size") for param in optimizer.param_groups[1]["params"])
    optimizer.step()
    optimizer.zero_grad()
    losses = train(model, optimizer, 11)
    assert losses[-1] < 0.8 * losses[0] and all_changed(model, before)
    for param in optimizer.param_groups[1]["params"]:
        # On the grid: rounding once more moves values by 0.1 steps at the most, as scales are bfloat16; others by 0.25.
        steps = param.detach().view(-1, 16).aminmax(dim=1)
        step = ((steps.max - steps.min) / 255).repeat_interleave(16).view(param.shape)
        moved = (qgalore.quantize(param.detach(), 8, 16).dequantize(torch.float32) - param.detach()).abs() / step
        assert moved.mean() < 0.15


def test_an_int8_weight_that_no_prepared_model_has_says_what_to_do(installed: None) -> None:
    from q_galore_torch import QGaLoreAdamW8bit

    model = model_of()
    qgalore.convert_linears(model, ["layers.0.attn.q_proj"], qgalore.WeightFormat(bits=8, group_size=16))
    optimizer = QGaLoreAdamW8bit(groups_of(model, **QUANTIZED), lr=0.02)
    model(IDS).backward()
    with pytest.raises(ValueError, match=r"call attach\(model\)"):
        optimizer.step()


def test_names_of_layers_that_are_not_there_are_refused(installed: None) -> None:
    with pytest.raises(ValueError, match=r"no nn.Linear called gate_proj; it has down_proj, head, q_proj, up_proj"):
        compat.prepare_model_for_int8_training(model_of(), ARGS, ["gate_proj"])
