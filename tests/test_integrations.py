"""The library inside training loops of others: the Trainer, accelerate, Lightning's way of a step, dcp."""

from __future__ import annotations

import copy
import gc
import io
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from qgalore import (
    LowRankLinear,
    QGaLoreAdamW8bit,
    SubspaceConfig,
    WeightFormat,
    convert_linears,
    linear_names,
    low_rank_param_groups,
    optimizer_for,
)
from qgalore.integrations import (
    OptimizerFactory,
    QGaLoreCallback,
    TrainingState,
    connect,
    connection,
    visible_norm,
    without_ddp,
)
from qgalore.optimizer import LowRankAdamW
from qgalore.update import moments
from tests.small_run import on_ranks
from tests.test_optimizer import Net, assert_same, backward, build, train
from tests.transformers_families import model_of

VOCABULARY, LENGTH, ROWS = 16, 8, 20
SUBSPACE: dict[str, Any] = {"rank": 4, "update_proj_gap": 2}


@pytest.fixture(autouse=True)
def _8bit_states_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MIN_8BIT_NUMEL", 0)


# ---- what other loops see of the gradient


def connected(storage: str = "int8", **options: Any) -> tuple[Net, LowRankAdamW]:
    in_backward = options.pop("update_in_backward", False)
    net, optimizer = build("qgalore8bit", storage, attach=False, **options)
    connect(optimizer, net, update_in_backward=in_backward)
    return net, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["plain", "float", "int8"])
def test_the_norm_is_found_where_loops_look_for_it(storage: str, dtype: torch.dtype) -> None:
    net, optimizer = connected(storage, dtype=dtype)
    other, ours = build("qgalore8bit", storage, dtype=dtype)
    for update in range(3):
        backward(net, optimizer, update, accumulation=2)
        backward(other, ours, update, accumulation=2)
        norm = clip_grad_norm_(net.parameters(), float("inf"))
        assert norm.dtype == torch.float32 and norm > 0
        ours.collect()
        assert torch.equal(norm, ours.grad_norm())
        optimizer.step()
        ours.step()
        assert all(param.grad is None for param in net.parameters())
        assert all(param.grad_dtype == param.dtype for param in net.parameters() if param.is_floating_point())
    assert_same(net, other)  # what is shown is no gradient


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_clipping_what_is_shown_clips_the_update(storage: str) -> None:
    net, optimizer = connected(storage)
    other, ours = build("qgalore8bit", storage)
    factors = []
    for update in range(4):
        backward(net, optimizer, update)
        factors.append(0.1 / float(clip_grad_norm_(net.parameters(), 0.1)))
        backward(other, ours, update)
        ours.clip_grad_norm_(0.1)
        optimizer.step()
        ours.step()
        optimizer.zero_grad()
        ours.zero_grad()
    assert max(factors) < 0.9, "nothing was clipped"
    for key, state in optimizer.state_dict()["state"].items():
        if state["exp_avg"].dtype == torch.float32:
            torch.testing.assert_close(state["exp_avg"], ours.state_dict()["state"][key]["exp_avg"])
    unclipped, free = build("qgalore8bit", storage)
    train(unclipped, free, range(4))
    with pytest.raises(AssertionError):
        assert_same(net, unclipped)


def test_a_step_with_a_closure_is_clipped_inside_it() -> None:
    """As Lightning does: backward and clipping are in the closure."""
    trained = []
    for inside in (False, True):
        net, optimizer = connected()
        for update in range(3):

            def closure(net: Net = net, optimizer: LowRankAdamW = optimizer, update: int = update) -> float:
                loss = backward(net, optimizer, update)
                clip_grad_norm_(net.parameters(), 0.1)
                return loss

            if inside:
                assert optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        trained.append(net)
    assert_same(*trained)


def test_a_norm_that_is_not_finite_skips_the_update() -> None:
    net, optimizer = connected()
    train(net, optimizer, range(2))
    before = copy.deepcopy(net.state_dict())
    (net(torch.zeros(2, 6, dtype=torch.long)) * float("inf")).backward()
    assert not clip_grad_norm_(net.parameters(), 1.0).isfinite()
    optimizer.step()
    assert bool(optimizer.skipped())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_clipping_is_refused_where_updates_were_made_in_the_backward_pass() -> None:
    net, optimizer = connected(update_in_backward=True)
    backward(net, optimizer, 0)
    assert clip_grad_norm_(net.parameters(), float("inf")) > 0
    optimizer.step()
    backward(net, optimizer, 1)
    clip_grad_norm_(net.parameters(), 1e-3)
    with pytest.raises(
        RuntimeError, match=r"cannot be clipped where each weight is updated inside .* gradient_clip_val"
    ):
        optimizer.step()


def test_a_gpu_says_one_update_later_that_gradients_were_clipped() -> None:
    """What is still on its way to the host when the next update begins, or when all ends, is refused then."""
    for at_end in (False, True):
        net, optimizer = connected(update_in_backward=True)
        connection_of_net = connection._connections[optimizer]
        backward(net, optimizer, 0)
        optimizer.step()
        connection_of_net._norm._scaled = visible_norm._HostFlag(torch.tensor(True))
        backward(net, optimizer, 1)
        with pytest.raises(RuntimeError, match="cannot be clipped"):
            connection_of_net.close() if at_end else optimizer.step()
        connection_of_net.close()
        net(torch.zeros(2, 6, dtype=torch.long)).backward()
        assert net.embed.weight.grad is not None, "detached all the same"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_after_updates_in_the_backward_pass_does_not_wait_for_a_gpu() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64, device="cuda"))

        def forward(self) -> Tensor:
            return (self.weight**2).sum()

    net = Fixed()
    optimizer = QGaLoreAdamW8bit([{"params": [net.weight]}], lr=1e-3)
    connect(optimizer, net, update_in_backward=True)
    for update in range(4):
        net().backward()
        clip_grad_norm_(net.parameters(), 1e-3 if update == 3 else float("inf"))
        torch.cuda.set_sync_debug_mode("error" if update else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    net().backward()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        optimizer.step()


def test_a_failed_backward_pass_leaves_nothing_behind() -> None:
    net, optimizer = connected()

    def fail(grad: Tensor) -> None:
        raise RuntimeError("a failure")

    handle = net.embed.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="a failure"):
        backward(net, optimizer, 0)
    handle.remove()
    optimizer.zero_grad()
    backward(net, optimizer, 0)
    assert clip_grad_norm_(net.parameters(), 1.0) > 0


def test_connecting_again_and_closing() -> None:
    net, optimizer = connected()
    connection = connect(optimizer, net)
    other, ours = build("qgalore8bit", "int8")
    train(net, optimizer, range(3))
    train(other, ours, range(3))
    assert_same(net, other)
    connection.close()
    backward(net, optimizer, 0)
    assert net.embed.weight.grad is not None and net.embed.weight.grad.count_nonzero() > 1
    with pytest.raises(TypeError, match="AdamW is not an optimizer of this library: give a GaLoreAdamW"):
        connect(torch.optim.AdamW(net.parameters()), net)


def test_copies_of_a_connected_model_are_connected_to_nothing() -> None:
    """What a copy's backward pass finds does not reach the original, which goes on as without copies."""
    (net, optimizer), (other, without_copies) = connected(), connected()
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for update, made in enumerate((copy.deepcopy(net), torch.load(saved, weights_only=False))):
        backward(net, optimizer, update)
        backward(other, without_copies, update)
        made(torch.tensor([[1, 2, 3]])).sum().backward()
        assert all(layer.sink is None for layer in made.modules() if isinstance(layer, LowRankLinear))
        for each in (optimizer, without_copies):
            each.step()
            each.zero_grad()
        assert_same(net, other)


def test_a_connection_does_not_keep_its_optimizer() -> None:
    net, optimizer = connected()
    train(net, optimizer, range(1))
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    net(torch.zeros(2, 6, dtype=torch.long)).backward()


def test_a_model_without_a_float_parameter_is_refused() -> None:
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    convert_linears(layer, ["0"], WeightFormat(bits=8))
    optimizer = QGaLoreAdamW8bit([{"params": [layer[0].weight], "rank": 2}])
    with pytest.raises(ValueError, match=r"Sequential has no float parameter whose \.grad could show the norm"):
        connect(optimizer, layer)


# ---- the Trainer of transformers


class Causal(nn.Module):
    """A causal model of transformers that is saved as a state dict, since it is no PreTrainedModel itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.loss_type = model.loss_type  # by which the Trainer knows which tokens are predicted

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return self.model(input_ids=input_ids, labels=labels, **kwargs)


def causal(storage: str, wrapped: bool = True) -> nn.Module:
    """A small LLaMA of transformers, its blocks converted to a format of tests.test_optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    if storage != "plain":
        convert_linears(model, linear_names(model), WeightFormat(bits=8 if storage == "int8" else None))
    return Causal(model) if wrapped else model


def optimizer_of(model: nn.Module, lr: float = 0.02) -> LowRankAdamW:
    return QGaLoreAdamW8bit(low_rank_param_groups(model, linear_names(model), **SUBSPACE), lr=lr)


def rows(count: int = ROWS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Any:
    """A Trainer of 5 updates an epoch on a CPU; arguments of TrainingArguments and of Trainer as they come."""
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
    from transformers import Trainer, TrainingArguments

    own = {key: options.pop(key) for key in ("optimizers", "callbacks", "optimizer_cls_and_kwargs") if key in options}
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **(settings | options))
    return Trainer(model=model, args=args, train_dataset=rows(), **own)


class Seen:
    """What a reporting callback, which comes before ours, is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(name)


def by_hand(model: nn.Module, accumulation: int, clip: float) -> list[float]:
    """The Trainer's loop over `rows` in our words, with its linear schedule; gives the norms of the gradients.

    The loss of an update is the mean over its predicted tokens.
    """
    optimizer, norms = optimizer_of(model), list[float]()
    optimizer.attach(model)
    tokens = torch.tensor([row["input_ids"] for row in rows()])
    updates = tokens.split(2 * accumulation)
    for number, update in enumerate(updates):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - number / len(updates))
        batches = update.split(2)
        for batch in batches:
            optimizer.is_last_micro_batch = batch is batches[-1]
            total = torch.tensor(len(update) * (LENGTH - 1))
            model(input_ids=batch, labels=batch, num_items_in_batch=total).loss.backward()
        optimizer.collect()
        norm = optimizer.grad_norm()
        norms.append(float(norm))
        optimizer.scale_gradients(norm * (clip / (norm + 1e-6)).clamp(max=1.0) / norm)
        optimizer.step()
    return norms


DOORS = ["optimizers", "factory", "factory alone"]


@pytest.mark.parametrize(
    ("storage", "accumulation", "door"),
    [("int8", 1, "optimizers"), ("int8", 4, "optimizers"), ("plain", 2, "optimizers")]
    + [("int8", 2, door) for door in DOORS]
    + [("float", 2, "factory")],
)
def test_a_trainer_makes_the_updates_of_our_own_loop(
    storage: str, accumulation: int, door: str, tmp_path: Path
) -> None:
    """With clipping, and an epoch whose last update is shorter (10 batches by 4); norm and rate are logged."""
    model, other, seen, clip = causal(storage), causal(storage), Seen(), 0.9
    options: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_grad_norm": clip}
    if door == "optimizers":
        optimizer = optimizer_of(model)
        options |= {"optimizers": (optimizer, None), "callbacks": [seen, QGaLoreCallback(optimizer)]}
    else:
        factory = {"lr": 0.02, "config": SubspaceConfig(**SUBSPACE)}
        options |= {"optimizer_cls_and_kwargs": (OptimizerFactory, factory)}
        options["callbacks"] = [seen, QGaLoreCallback()] if door == "factory" else [seen]
    trainer_of(model, tmp_path, gradient_accumulation_steps=accumulation, **options).train()
    norms = by_hand(other, accumulation, clip)
    logs = [log for log in seen.logs if "grad_norm" in log]
    assert len(logs) == len(norms) == -(-10 // accumulation) and max(norms) > clip
    assert [log["grad_norm"] for log in logs] == pytest.approx(norms, rel=1e-6)
    rates = [0.02 * (1 - number / len(logs)) for number in range(len(logs))]
    assert [log["learning_rate"] for log in logs] == pytest.approx(rates)
    assert_same(model, other)


def test_a_trainer_updates_inside_the_backward_pass(tmp_path: Path) -> None:
    trained, norms = [], []
    for in_backward in (False, True):
        model, seen = causal("int8"), Seen()
        optimizer = optimizer_of(model)
        callbacks = [seen, QGaLoreCallback(optimizer, update_in_backward=in_backward)]
        options = {"optimizers": (optimizer, None), "callbacks": callbacks, "gradient_accumulation_steps": 1}
        trainer_of(model, tmp_path, max_grad_norm=0.0, **options).train()
        trained.append(model)
        norms.append([log["grad_norm"] for log in seen.logs if "grad_norm" in log])
    assert_same(*trained)
    assert norms[0] == norms[1] and min(norms[0]) > 0


@pytest.mark.parametrize("storage", ["int8", "float", "plain"])
@pytest.mark.parametrize("door", ["optimizers", "factory"])
def test_a_trainer_resumes_to_the_bit(storage: str, door: str, tmp_path: Path) -> None:
    trained, states = [], []
    for resume in (False, True):
        model = causal(storage)
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.9}
        if door == "optimizers":
            optimizer = optimizer_of(model)
            options |= {"optimizers": (optimizer, None), "callbacks": [QGaLoreCallback(optimizer)]}
        else:
            factory = {"lr": 0.02, "config": SubspaceConfig(**SUBSPACE)}
            options |= {"optimizer_cls_and_kwargs": (OptimizerFactory, factory), "callbacks": [QGaLoreCallback()]}
        trainer = trainer_of(model, tmp_path, **options)
        if resume:
            with torch.no_grad():
                model.model.model.norm.weight.zero_()  # what is loaded and not what was built goes on
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        trained.append(model)
        states.append(trainer.optimizer.state_dict())
    assert_same(*trained)
    for key, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in state.items())


def test_a_trainer_resumes_a_model_that_save_pretrained_has_saved(tmp_path: Path) -> None:
    """What it writes has the codes, beside the floats of `from_pretrained`."""
    trained = []
    for resume in (False, True):
        model = causal("int8", wrapped=False)
        optimizer = optimizer_of(model)
        options = {"optimizers": (optimizer, None), "callbacks": [QGaLoreCallback(optimizer)]}
        trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=3, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        trained.append(model)
    assert_same(*trained)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_a_trainer_resumes_what_transformers_saves_in_another_form(family: str, tmp_path: Path) -> None:
    """With float weights, too; once training has ended, the model saves as transformers does."""
    trained = []
    for resume in (False, True):
        model = model_of(family, num_hidden_layers=1)
        before = {name: param.clone() for name, param in model.named_parameters()}
        optimizer = optimizer_for(model, rank=4, weight_bits=None)
        options = {"optimizers": (optimizer, None), "callbacks": [QGaLoreCallback(optimizer)]}
        trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=3, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        trained.append(model)
    assert_same(*trained)
    assert all(name not in before or not torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert "save_pretrained" not in vars(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "clipping": ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 needs all gradients at once, .*: set max_grad_norm=0"),
    "fp16": ({"fp16": True, "max_grad_norm": 0.0}, "fp16=True scales the loss .*: set bf16=True instead"),
    "GPUs": ({"max_grad_norm": 0.0, "n_gpu": 2}, "one process with 2 GPUs copies the model .* torchrun"),
    "fsdp": ({"max_grad_norm": 0.0, "fsdp": True}, "fsdp shards parameters"),
    "deepspeed": ({"max_grad_norm": 0.0, "deepspeed": "a.json"}, "deepspeed shards parameters"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_trainer_cannot_do_is_refused_before_it_begins(what: str) -> None:
    settings, message = REFUSED[what]
    plain = {"fp16": False, "n_gpu": 1, "deepspeed": None, "fsdp": [], "max_grad_norm": 0.0}
    model = Net()
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, linear_names(model), **SUBSPACE))
    callback = QGaLoreCallback(optimizer, update_in_backward=True)
    with pytest.raises(ValueError, match=message):
        callback.on_init_end(SimpleNamespace(**(plain | settings)), None, None, model=model)
    callback.on_init_end(SimpleNamespace(**plain), None, None, model=model)


def test_a_trainer_is_refused_another_optimizer(tmp_path: Path) -> None:
    model = causal("plain")
    trainer = trainer_of(model, tmp_path, callbacks=[QGaLoreCallback()])
    with pytest.raises(TypeError, match=r"AdamW is not an optimizer of this library.*optimizer_cls_and_kwargs"):
        trainer.train()
    one, other = optimizer_of(model), optimizer_of(model)
    trainer = trainer_of(model, tmp_path, optimizers=(one, None), callbacks=[QGaLoreCallback(other)])
    with pytest.raises(ValueError, match="with another optimizer than QGaLoreCallback was given"):
        trainer.train()


def test_a_factory_that_updates_in_the_backward_pass_is_refused_clipping(tmp_path: Path) -> None:
    factory = {"lr": 0.02, "config": SubspaceConfig(**SUBSPACE), "update_in_backward": True}
    options = {"optimizer_cls_and_kwargs": (OptimizerFactory, factory), "callbacks": [QGaLoreCallback()]}
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 needs all gradients at once"):
        trainer_of(causal("plain"), tmp_path, **options).train()


def test_the_callback_has_every_event_of_a_trainer() -> None:
    from transformers import TrainerCallback

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            assert callable(getattr(QGaLoreCallback(), name))
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        QGaLoreCallback().other  # noqa: B018


# ---- accelerate


def loop(accelerator: Any, model: nn.Module, optimizer: Any, batches: list[Tensor], clip: float) -> list[float]:
    """accelerate's own loop; gives the norms of the gradients."""
    norms = []
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            optimizer.zero_grad()
    return norms


def accelerated(accumulation: int) -> tuple[Any, nn.Module, Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = causal("int8")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    connect(optimizer, model)
    return accelerator, model, optimizer


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """What accelerate keeps for the process is made anew, and does not reach other tests."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_accumulates_clips_and_goes_on_to_the_bit(accumulation: int, tmp_path: Path) -> None:
    batches = [*torch.tensor([row["input_ids"] for row in rows()]).split(2)]
    accelerator, model, optimizer = accelerated(accumulation)
    norms = loop(accelerator, model, optimizer, batches[:4], 0.9)
    accelerator.save_state(str(tmp_path))
    norms += loop(accelerator, model, optimizer, batches[4:8], 0.9)
    other = causal("int8")
    ours = optimizer_of(other)
    ours.attach(other)
    expected = []
    for first in range(0, 8, accumulation):
        for number in range(first, first + accumulation):
            ours.is_last_micro_batch = number == first + accumulation - 1
            (other(input_ids=batches[number], labels=batches[number]).loss / accumulation).backward()
        norm = ours.grad_norm()
        expected.append(float(norm))
        ours.scale_gradients(norm * (0.9 / (norm + 1e-6)).clamp(max=1.0) / norm)
        ours.step()
    assert norms == pytest.approx(expected, rel=1e-6) and max(norms) > 0.9
    assert_same(model, other)
    again, resumed, resumed_optimizer = accelerated(accumulation)
    again.load_state(str(tmp_path))
    loop(again, resumed, resumed_optimizer, batches[4:8], 0.9)
    assert_same(resumed, model)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_only_an_optimizer_that_accelerate_has_prepared_follows_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.Accelerator(cpu=True).sync_gradients
    net, optimizer = connected()
    other, ours = build("qgalore8bit", "int8")
    train(net, optimizer, range(2), accumulation=2)
    train(other, ours, range(2), accumulation=2)
    assert_same(net, other)


# ---- several ranks


@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_model_kept_from_ddp_is_cast_as_accelerate_would(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    monkeypatch.setattr(connection, "_ranks", lambda: 2)
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(model.state_dict())
    without_ddp(model)
    expected = accelerator.prepare(other)(torch.ones(1, 4))
    without_ddp(other)  # accelerate has prepared it
    prepared = accelerator.prepare(model)
    assert prepared is model and torch.equal(model(torch.ones(1, 4)), expected)
    assert expected.dtype == torch.float32 and not torch.equal(nn.functional.linear(*_of(model)), expected)


def _of(model: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(1, 4), model.weight, model.bias


def train_on_ranks(folder: str) -> int:
    """A rank of two: a Trainer and accelerate, each over its own rows."""
    moments.MIN_8BIT_NUMEL = 0
    rank = int(os.environ["RANK"])
    model, seen = causal("int8"), Seen()
    optimizer = optimizer_of(model)
    if rank:
        with torch.no_grad():
            model.model.model.norm.weight.add_(1)  # ranks that begin otherwise go on as the first
    options = {"optimizers": (optimizer, None), "callbacks": [seen, QGaLoreCallback(optimizer)]}
    options |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0.9, "ddp_backend": "gloo"}
    trainer = trainer_of(model, Path(folder), per_device_train_batch_size=1, **options)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert trainer.args.world_size == 2
    norms = [log["grad_norm"] for log in seen.logs if "grad_norm" in log]
    state = {"model": trainer.model.state_dict(), "norms": norms}
    torch.save(state, Path(folder) / f"{rank}.pt")
    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=Path(folder) / "dcp")
    torch.save(accelerate_on_ranks(rank), Path(folder) / f"accelerate{rank}.pt")
    return 0


def accelerate_on_ranks(rank: int) -> dict[str, Tensor]:
    """Ten rows, one after the other to each rank; what comes out of their updates."""
    from accelerate import Accelerator

    model = causal("int8")
    optimizer = optimizer_of(model)
    accelerator = Accelerator(cpu=True)
    without_ddp(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    connect(optimizer, model)
    batches = [*torch.tensor([row["input_ids"] for row in rows(10)]).split(1)]
    norms = loop(accelerator, model, optimizer, batches[rank::2], 0.9)
    return model.state_dict() | {"norms": torch.tensor(norms)}


def test_two_ranks_of_a_trainer_make_the_updates_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert on_ranks(2, train_on_ranks, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    accelerated = [torch.load(tmp_path / f"accelerate{rank}.pt") for rank in range(2)]
    assert all(torch.equal(value, accelerated[1][name]) for name, value in accelerated[0].items())
    one = causal("int8")
    norms = by_hand(one, 2, 0.9)
    # The first batch of two rows, before anything is updated: their mean is the gradient of both together.
    other = causal("int8")
    ours = optimizer_of(other)
    ours.attach(other)
    tokens = torch.tensor([row["input_ids"] for row in rows(10)][:2])
    other(input_ids=tokens, labels=tokens).loss.backward()
    assert float(accelerated[0]["norms"][0]) == pytest.approx(float(ours.grad_norm()), rel=1e-5)
    assert first["norms"] == second["norms"] == pytest.approx(norms, rel=0.05)
    assert first["norms"][0] == pytest.approx(norms[0], rel=1e-5)
    model = causal("int8")
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=r"call attach\(model\)"):
        TrainingState(model, optimizer).state_dict()
    optimizer.attach(model)
    dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=tmp_path / "dcp")
    for name, value in first["model"].items():
        assert torch.equal(value, model.state_dict()[name]), name


# ---- torch.distributed.checkpoint

CONFIGS: list[dict[str, Any]] = [
    {"storage": "int8", "gamma_proj": 2, "cos_threshold": 0.0, "queue_size": 2},
    {"storage": "int8", "subspace": "streaming"},
    {"storage": "float", "options": {"norm_growth": 1.01}, "residual": "fira"},
    {"storage": "plain", "proj_type": "full"},
]


@pytest.mark.parametrize("updates", [0, 5])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_a_distributed_checkpoint_goes_on_to_the_bit(config: dict[str, Any], updates: int, tmp_path: Path) -> None:
    """Saved before any update, too, into a new optimizer and into one that has gone another way."""
    net, optimizer = build("qgalore8bit", **config)
    train(net, optimizer, range(updates))
    dcp.save({"training": TrainingState(net, optimizer)}, checkpoint_id=tmp_path)
    reference, undisturbed = build("qgalore8bit", **config)
    train(reference, undisturbed, range(updates + 3))
    train(net, optimizer, range(updates, updates + 3))
    assert_same(net, reference)  # saving changes nothing
    for before in (0, 2):
        other, loaded = build("qgalore8bit", **config)
        train(other, loaded, range(20, 20 + before))
        for group in loaded.param_groups:
            group["lr"] = 0.5
        dcp.load({"training": TrainingState(other, loaded)}, checkpoint_id=tmp_path)
        train(other, loaded, range(updates, updates + 3))
        assert_same(other, reference)
        expected = undisturbed.state_dict()["state"]
        for key, state in loaded.state_dict()["state"].items():
            assert state.keys() == expected[key].keys()
            assert all(torch.equal(value, expected[key][name]) for name, value in state.items())


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    _, optimizer = build("qgalore8bit", "int8")
    with pytest.raises(ValueError, match="9 parameters of the optimizer are not in Net"):
        TrainingState(Net(), optimizer).state_dict()
