"""`--method`: factors, LoRA, ReLoRA and QLoRA train, resume to the bit, are planned and end as plain models."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.after_training.trained_model import find_checkpoint, method_of, open_trained
from peft_pretraining.build import build_training
from peft_pretraining.commands.export import export
from peft_pretraining.config.flag_groups import MethodArgs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan
from peft_pretraining.methods.adapters import A, Adapter, B, adapters_of, add_adapter
from peft_pretraining.methods.dropout import SeededDropout, begin_pass, dropouts_of, dropped
from peft_pretraining.methods.factored import FactoredLinear, factored
from peft_pretraining.methods.merge import merged, merged_entries
from peft_pretraining.methods.restarts import largest, merge_, prune_
from peft_pretraining.models.registry import read_config
from peft_pretraining.optim.lr_schedule import Restarts
from qgalore.seeding import mix_seed
from qgalore.update.moments import init_moments, read_moment, write_moment
from tests.golden.record import restored_process
from tests.small_run import CONFIG, ROOT, Result, SmallRun, assert_same_bits, assert_same_run

METHODS: dict[str, dict[str, object]] = {
    "low_rank": {"method": "low_rank"},
    "lora": {"method": "lora"},
    "relora": {"method": "relora", "relora_every": 3, "relora_warmup": 1},
    "qlora": {"method": "qlora"},
    "qlora8": {"method": "qlora", "qlora_bits": 8},
}
FLAGS: dict[str, object] = {"rank": 8, "lr": 1e-2, "num_training_steps": 8}
ADAPTERS = [name for name in METHODS if name != "low_rank"]
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("methods"))


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored_process():
        yield


def run_of(small: SmallRun, name: str) -> Result:
    """A run of a method with a checkpoint before its first update, and one that a signal did not end."""
    if not (small.folder / name).exists():
        small.run(name, **FLAGS | METHODS[name] | {"save_every": 8})
    return small.result(name)


def linear(rows: int = 48, columns: int = 32, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def adapter_of(name: str, dtype: torch.dtype = torch.float32, rank: int = 4, **options: Any) -> Adapter:
    """An adapter whose B has some values."""
    method = MethodArgs(**{"method": name} | options)
    adapter = Adapter("layer", add_adapter(linear(dtype=dtype), "layer", method, rank, seed=1))
    with torch.no_grad():
        adapter.factors[1].normal_(0, 0.02)
    return adapter


# ---- training


@each_method
def test_everything_but_frozen_matrices_trains(small: SmallRun, name: str) -> None:
    result = run_of(small, name)
    before, after = (result.checkpoint(step).model_tensors for step in (0, 8))
    frozen = {key for key in before if "base_layer" in key}
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == before.keys() - (frozen if name != "relora" else set())
    assert bool(frozen) == (name != "low_rank") and result.losses[-1] < result.losses[0] - 0.2


def test_adapters_begin_with_the_model_of_a_run_without(small: SmallRun) -> None:
    full = small.run("full", **{"lr": 1e-2, "num_training_steps": 8}).losses
    assert run_of(small, "lora").losses[0] == run_of(small, "relora").losses[0] == full[0]
    for name in ("qlora", "qlora8"):
        assert run_of(small, name).losses[0] == pytest.approx(full[0], rel=1e-3)
    assert run_of(small, "lora").losses[1:] != full[1:]


def test_an_adapter_is_pefts_and_its_formula() -> None:
    adapter, x = adapter_of("lora", rank=4, lora_alpha=24.0), torch.randn(3, 32)
    (a, b), base = adapter.factors, adapter.base
    assert type(adapter.layer).__module__ == "peft.tuners.lora.layer"
    assert a.abs().max() <= 1 / math.sqrt(32) and not torch.equal(a, torch.zeros_like(a))
    torch.testing.assert_close(adapter.layer(x), x @ base.weight.T + 24 / 4 * x @ a.T @ b.T)
    assert [p.requires_grad for p in (a, b, base.weight)] == [True, True, False]


def test_factors_multiply_and_begin_like_the_matrix_that_they_replace() -> None:
    layer, x = factored(linear(400, 300, bias=True), "layer", 40, seed=1, std=0.02), torch.randn(3, 300)
    assert isinstance(layer, FactoredLinear)
    product = (layer.factor_B @ layer.factor_A).detach()
    torch.testing.assert_close(layer(x), x @ product.T + layer.bias)
    assert float(product.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit", "sgd", "adafactor"])
def test_each_optimizer_trains_adapters(small: SmallRun, optimizer: str) -> None:
    rates = {"optimizer": optimizer, "lr": 0.3 if optimizer == "sgd" else 1e-2}
    losses = small.run(optimizer, **FLAGS | METHODS["relora"] | rates).losses
    assert losses[-1] < losses[0] - 0.05 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["lora", "qlora", "low_rank"])
def test_micro_batches_and_recomputed_layers_change_nothing(small: SmallRun, name: str) -> None:
    flags = FLAGS | METHODS[name] | {"num_training_steps": 4, "batch_size": 8}
    whole = small.run(f"{name}-whole", **flags)
    parts = small.run(f"{name}-parts", **flags | {"batch_size": 2, "activation_checkpointing": True})
    assert parts.losses == pytest.approx(whole.losses, abs=2e-4)


@each_method
def test_gradients_of_what_is_trained_are_summed_over_ranks(small: SmallRun, name: str) -> None:
    """Each once, by a sum over two ranks that are alike; the update is that of gradients twice as large."""
    args = parse_args(small.argv("summed", FLAGS | METHODS[name] | {"grad_clipping": 1e9}))
    sizes: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        sizes.append(tensor.numel())
        tensor.mul_(2)

    norms = []
    for function in (None, all_reduce):
        model, optimizer = build_training(args, torch.device("cpu"), function)
        ids = torch.arange(64).view(2, 32)
        loss = model(ids, ids).loss_sum
        assert loss is not None
        loss.backward()
        norms.append(float(optimizer.grad_norm()))
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert sum(sizes) == trained and norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_rank", "relora"])
def test_two_ranks_are_one(small: SmallRun, name: str) -> None:
    flags = FLAGS | METHODS[name]
    one, two = small.run(f"{name}-one", **flags), small.run_on(2, f"{name}-two", **flags)
    assert two.losses == pytest.approx(one.losses, abs=1e-3) and two.losses[0] == pytest.approx(one.losses[0], rel=1e-6)


@pytest.mark.parametrize("name", ["low_rank", "lora", "qlora"])
def test_transformers_own_class(small: SmallRun, name: str) -> None:
    flags = FLAGS | METHODS[name] | {"use_hf_model": True, "num_training_steps": 3}
    result = small.run(f"{name}-hf", **flags)
    assert result.losses[-1] < result.losses[0]
    assert any("factor_A" in key or A in key for key in result.checkpoint().model_tensors)
    export(result.save_dir, small.folder / f"{name}-hf-exported", "float32")
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        plain, trained = (
            open_trained(path, "cpu").model(ids).logits
            for path in (small.folder / f"{name}-hf-exported", result.save_dir)
        )
    torch.testing.assert_close(plain, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name, dropout", [("low_rank", 0), ("lora", 0), ("lora", 0.1)])
def test_all_layers_are_one_compiled_graph(tmp_path: Path, name: str, dropout: float) -> None:
    """peft's layers, too, pass a compiler that may break no graph, and so does dropout with the bits that it has."""
    from torch._dynamo.utils import counters

    small = SmallRun(tmp_path, layers=12)
    model, optimizer = build_training(
        parse_args(small.argv("compiled", FLAGS | METHODS[name] | ({"lora_dropout": dropout} if dropout else {}))),
        torch.device("cpu"),
    )
    optimizer.is_last_micro_batch = False
    ids = torch.arange(64).view(2, 32)
    begin_pass(dropouts_of(model), 1)
    for adapter in adapters_of(model):
        adapter.factors[1].data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    expected = model(ids, ids).loss_sum
    torch._dynamo.reset()
    counters.clear()
    model.compile_layers(backend="eager")  # type: ignore[call-arg]
    loss = model(ids, ids).loss_sum
    assert loss is not None and torch.equal(loss, expected) and counters["stats"]["unique_graphs"] == 1
    loss.backward()


# ---- resume


@pytest.mark.parametrize("name, at", [*((name, 4) for name in METHODS), ("relora", 3), ("relora", 2)])
def test_a_resumed_run_has_the_same_bits(small: SmallRun, name: str, at: int) -> None:
    whole, parts = run_of(small, name), f"{name}-{at}"
    stopped = small.stop(parts, at, **FLAGS | METHODS[name])
    assert stopped.checkpoint().update_step == at
    resumed = small.run(parts, **FLAGS | METHODS[name] | {"continue_from": stopped.checkpoints[-1]})
    assert_same_run(whole, resumed)


def test_dropout_is_repeated_by_a_resumed_run_and_a_recomputed_layer(small: SmallRun) -> None:
    flags = FLAGS | METHODS["lora"] | {"lora_dropout": 0.3, "activation_checkpointing": True, "num_training_steps": 4}
    whole = small.run("dropout", **flags)
    stopped = small.stop("dropout-parts", 2, **flags)
    assert_same_run(whole, small.run("dropout-parts", **flags | {"continue_from": stopped.checkpoints[-1]}))
    kept = small.run("dropout-kept", **flags | {"activation_checkpointing": None})
    assert kept.losses == pytest.approx(whole.losses, abs=1e-5)
    assert whole.losses[0] == run_of(small, "lora").losses[0] and whole.losses[1:] != run_of(small, "lora").losses[1:4]


def test_dropout_keeps_the_mean_and_the_share() -> None:
    layer, x = SeededDropout(0.25, seed=3), torch.ones(200, 200)
    y = layer(x)
    assert torch.equal(layer(x), y) and set(y.unique().tolist()) == {0.0, float(1 / torch.tensor(0.75))}
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    begin_pass([layer], 1)
    other = layer(x)
    assert not torch.equal(other, y) and torch.equal(layer.eval()(x), x)
    # Those of another micro-batch and of another layer are as independent as those of a generator.
    for again in (other, SeededDropout(0.25, seed=4)(x)):
        assert float(((again > 0) & (y > 0)).float().mean()) == pytest.approx(0.75**2, abs=0.01)
    dropped = (y == 0).float()
    neighbours = (dropped[:, 1:] * dropped[:, :-1]).mean(), (dropped[1:] * dropped[:-1]).mean()
    assert [float(share) for share in neighbours] == pytest.approx([0.25**2] * 2, abs=0.005)


@torch._dynamo.config.patch(error_on_recompile=True)  # monkeypatch would hide the option afterwards
def test_dropout_has_the_same_bits_where_it_is_compiled_and_is_compiled_once() -> None:
    """Whatever the layer and the micro-batch; and so has its gradient, for which no mask is kept."""
    torch._dynamo.reset()
    layers = [SeededDropout(0.3, seed=mix_seed(seed)) for seed in (1, 2)]
    compiled = torch.compile(SeededDropout.forward, fullgraph=True, dynamic=False)
    saved: list[Tensor] = []
    for number in range(3):
        begin_pass(layers, number, 2**64 - 1)
        for layer in layers:
            x = torch.randn(5, 64, requires_grad=True)
            expected = layer(x)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda kept: (saved.append(kept), kept)[1], lambda kept: kept
            ):
                found = compiled(layer, x)
            assert torch.equal(found, expected) and 0 < int((found == 0).sum()) < 160
            given = torch.randn(5, 64)
            grads = [torch.autograd.grad(y, x, given)[0] for y in (found, expected)]
            assert torch.equal(*grads)
    assert saved and all(tensor.numel() == 1 for tensor in saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_has_the_same_bits_on_a_gpu() -> None:
    """In the one kernel of a layer that is not compiled, and in operations one by one; nobody waits for the device."""
    x = torch.randn(37, 512)
    on_cpu, on_gpu = SeededDropout(0.05, seed=5), SeededDropout(0.05, seed=5, device="cuda")
    begin_pass([on_cpu], 7)
    moved = x.cuda()
    on_gpu(moved)  # compiles it
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin_pass([on_gpu], 7)
        found = on_gpu(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), on_cpu(x)) and 0 < int((found == 0).sum()) < 1500
    assert torch.equal(dropped(moved, on_gpu.seed, on_gpu.pass_seed, 0.05), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_gpu_repeats_a_run_with_dropout(small: SmallRun, name: str) -> None:
    """In compiled layers and in those of bitsandbytes, with the losses of layers that are computed again."""
    flags = FLAGS | METHODS[name] | {"lora_dropout": 0.3, "device": "cuda", "num_training_steps": 4}
    whole = small.run(f"{name}-gpu", **flags)
    stopped = small.stop(f"{name}-gpu-parts", 2, **flags)
    assert_same_run(whole, small.run(f"{name}-gpu-parts", **flags | {"continue_from": stopped.checkpoints[-1]}))
    again = small.run(f"{name}-gpu-again", **flags | {"activation_checkpointing": True})
    assert again.losses == pytest.approx(whole.losses, rel=2e-3)


def test_another_method_is_another_run(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_of(small, "lora").checkpoints[-1]
    flags = FLAGS | METHODS["qlora"] | {"lora_alpha": 16, "continue_from": checkpoint}
    assert small.main("other", **flags) == 2
    err = capsys.readouterr().err
    assert "method is 'qlora' here and 'lora' there" in err and "lora_alpha is 16.0 here and 32.0 there" in err


# ---- restarts


def test_a_restart_keeps_the_function_and_begins_anew(small: SmallRun) -> None:
    """The checkpoint after three updates is after the restart, of the same run with lora before it."""
    flags = FLAGS | {"save_every": 3, "num_training_steps": 4}
    merged_run = small.run("relora-merged", **flags | METHODS["relora"])
    kept = small.run("relora-kept", **flags | METHODS["lora"])
    state, before = merged_run.checkpoint(3), kept.checkpoint(3)
    method = method_of(before.state)
    assert method is not None
    plain = dict(merged_entries(before.model_tensors, method))
    for key, value in state.model_tensors.items():
        if "base_layer" in key:
            torch.testing.assert_close(value, plain[key.replace("base_layer.", "")])
        elif key.endswith(A):
            first = merged_run.checkpoint(0).model_tensors[key]
            assert not torch.equal(value, first) and float(value.std()) == pytest.approx(float(first.std()), rel=0.2)
        elif key.endswith(B):
            assert not value.any()
        else:
            assert torch.equal(value, before.model_tensors[key])
    at_restart, of_lora = (open_trained(each.save_dir / "step_00000003", "cpu") for each in (merged_run, kept))
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(at_restart.model(ids).logits, of_lora.model(ids).logits)
    moments = [x["exp_avg"] for x in state.optimizer_state["state"].values()]
    factors = [x for x in moments if 8 in x.shape]
    assert factors and all(int((x != 0).sum()) <= round(0.01 * x.numel()) for x in factors)
    assert any(x.all() for x in moments if 8 not in x.shape)


def test_a_longer_run_has_the_restart_after_its_old_end(small: SmallRun) -> None:
    flags = FLAGS | METHODS["relora"] | {"scheduler": "constant", "num_training_steps": 9}
    whole = small.run("planned", **flags)
    short = small.run("longer", **flags | {"num_training_steps": 6})
    longer = small.run("longer", **flags | {"continue_from": short.checkpoints[-1]})
    assert longer.losses == whole.losses
    assert_same_bits(longer.checkpoint().model_tensors, whole.checkpoint().model_tensors)


def test_the_rate_grows_again_after_each_restart(small: SmallRun) -> None:
    jags = Restarts(every=10, warmup=4)
    assert [jags.factor(step) for step in (0, 9, 10, 11, 13, 14, 19, 20, 21)] == [1, 1, 0, 0.25, 0.75, 1, 1, 0, 0.25]
    rates, plain = (
        [line["train/lr"] for line in run_of(small, name).train_lines] for name in ("relora", "lora")
    )  # fmt: skip
    assert rates == [0 if step in (3, 6) else rate for step, rate in enumerate(plain)]


def test_a_merge_agrees_with_pefts() -> None:
    adapter = adapter_of("lora")
    ours = merged(adapter.base.weight, *adapter.factors, MethodArgs(method="lora"))
    here = adapter_of("relora")
    merge_(here, seed=1)
    adapter.layer.merge()
    torch.testing.assert_close(ours, adapter.base.weight)
    torch.testing.assert_close(here.base.weight, adapter.base.weight)


def test_a_small_adapter_is_not_lost_in_bfloat16() -> None:
    """Rounded to nearest, each of these merges would change nothing."""
    adapter = adapter_of("relora", torch.bfloat16)
    with torch.no_grad():
        adapter.base.weight.fill_(1.0)
        adapter.factors[0].fill_(2.0**-6)
        adapter.factors[1].fill_(2.0**-8)
    change = adapter.scaling * 4 * 2.0**-14
    assert change < 2.0**-8  # half of the distance to the next bfloat16 number
    for seed in range(8):
        merge_(adapter, seed)
    assert float(adapter.base.weight.float().mean()) - 1 == pytest.approx(8 * change, rel=0.1)


@pytest.mark.parametrize("bits", [32, 8])
def test_pruned_states_keep_the_largest_and_no_first_moment_without_its_second(bits: int) -> None:
    state: dict[str, Tensor] = {}
    init_moments(state, torch.Size((80, 100)), bits, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(80, 100, generator=generator)
    write_moment(state, "exp_avg", first)
    write_moment(state, "exp_avg_sq", torch.rand(80, 100, generator=generator) + 0.1)
    state["step"] = torch.tensor(5)
    stored = {name: read_moment(state, name).clone() for name in ("exp_avg", "exp_avg_sq")}
    prune_(state, 0.99)
    kept = largest(stored["exp_avg"], 0.99)
    assert 80 <= int(kept.sum()) <= (80 if bits == 32 else 300)  # codes of 8 bits have equals
    for name, value in stored.items():
        # A block of 8-bit codes whose largest value is gone has another scale.
        close = {"rtol": 0.05, "atol": 0.0} if bits == 8 else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(read_moment(state, name), value * kept, **close)
    prune_(state, 1.0)
    assert not read_moment(state, "exp_avg").any() and not read_moment(state, "exp_avg_sq").any() and state["step"] == 5


# ---- what becomes of a run


@each_method
def test_an_opened_run_evaluates_to_the_bit(small: SmallRun, name: str) -> None:
    from peft_pretraining.commands.evaluate import main

    result = run_of(small, name)
    written = small.folder / f"{name}.json"
    with written.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert main([str(result.save_dir), "--device", "cpu", "--json"]) == 0
    assert json.loads(written.read_text())["loss"] == result.eval_loss


@each_method
def test_an_export_is_the_plain_model(small: SmallRun, name: str) -> None:
    result, folder = run_of(small, name), small.folder / f"{name}-exported"
    notes = export(result.save_dir, folder, "float32")
    assert any(str(METHODS[name]["method"]) in note and "float32" in note for note in notes)
    plain, trained = open_trained(folder, "cpu"), open_trained(result.save_dir, "cpu")
    full = {f"model.layers.0.{key}" for key in ("self_attn.q_proj.weight", "mlp.down_proj.weight")}
    assert full <= plain.in_transformers().state_dict().keys()
    ids = torch.arange(64).view(2, 32)
    # On a CPU bitsandbytes' 8-bit layers round activations outside of training.
    tolerance = {"atol": 0.05, "rtol": 0} if name == "qlora8" else {"atol": 1e-4, "rtol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(plain.model(ids).logits, trained.model(ids).logits, **tolerance)
        in_transformers = trained.in_transformers()(ids).logits
    torch.testing.assert_close(in_transformers, plain.model(ids).logits)


def test_a_merge_into_floats_keeps_an_adapter_that_nf4_would_lose() -> None:
    """Of 0.75 % of the weight, after which most codes of NF4 would be those of before."""
    from peft_pretraining.methods.frozen import FrozenNF4

    adapter = adapter_of("qlora")
    first, second = (factor.data for factor in adapter.factors)
    base = adapter.base.dequantized()  # type: ignore[operator]
    second *= 0.0075 * base.norm() / (adapter.scaling * second @ first).norm()
    change = adapter.scaling * second @ first
    state = {f"layer.{key}": value for key, value in adapter.layer.state_dict().items()}
    weight = dict(merged_entries(state, MethodArgs(method="qlora")))["layer.weight"]
    torch.testing.assert_close(weight - base, change, rtol=0, atol=1e-7)
    again = FrozenNF4(weight, None).dequantized()
    agreed = float(((again - base) * change).sum() / (change * change).sum())
    assert (again - base - change).norm() > 2 * change.norm() or agreed < 0.5
    assert float((weight - base).norm() / base.norm()) == pytest.approx(0.0075, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_frozen_layers_state_dict_has_the_names_and_sizes_of_its_shape(bits: int) -> None:
    from peft_pretraining.methods.frozen import dequantized, frozen

    values, zeros = frozen(linear(), bits), frozen(linear(), bits)
    zeros.store_(torch.zeros(48, 32))
    saved = {key: value.clone() for key, value in values.state_dict().items()}
    described = {key: (value.shape, value.dtype) for key, value in saved.items()}
    assert described == {key: (value.shape, value.dtype) for key, value in zeros.state_dict().items()}
    zeros(torch.randn(2, 32))  # after which 8 bits have their scale in another place
    zeros.load_state_dict(saved)
    assert_same_bits(dict(zeros.state_dict()), dict(saved))
    assert torch.equal(zeros.dequantized(), values.dequantized())
    assert torch.equal(dequantized(saved, (48, 32), bits), values.dequantized())
    error = (values.dequantized() - linear().weight).abs().max() / linear().weight.abs().max()
    assert 0.001 < error < {4: 0.2, 8: 0.01}[bits]


# ---- --init_from


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "lora" else []) for n in ADAPTERS])
def test_a_run_at_full_rank_is_the_warm_start(small: SmallRun, name: str) -> None:
    if not (small.folder / "warm").exists():
        small.run("warm", lr=1e-2, num_training_steps=8)
    warm = small.result("warm")
    flags = FLAGS | METHODS[name] | {"init_from": warm.save_dir, "model_config": None}
    begun = small.run(f"{name}-warm", **flags)
    first = next(line["eval/loss"] for line in begun.lines if "eval/loss" in line)
    assert first == (warm.eval_loss if "qlora" not in name else pytest.approx(warm.eval_loss, rel=2e-3))
    assert begun.losses[-1] < first


def test_a_run_with_adapters_is_no_warm_start_before_it_is_merged(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run_of(small, "lora").save_dir
    assert small.main("from-lora", init_from=source, model_config=None) == 2
    err = capsys.readouterr().err
    assert f": --init_from {source}: it is a run of --method lora" in err and "qgalore export" in err
    assert err.rstrip().endswith("give that folder.") and not err.rstrip().endswith("..")


# ---- plan and first lines

SHAPE = CONFIG | {
    "hidden_size": 96, "intermediate_size": 342, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("optimizer, dtype", [("adamw", "bfloat16"), ("adam8bit", "float32")])
@each_method
def test_what_lasts_is_planned(tmp_path: Path, name: str, optimizer: str, dtype: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    flags = {"model_config": path, "rank": 24, "optimizer": optimizer, "dtype": dtype, "batch_size": 2}
    flags |= {"max_length": 16, "dataset": "pydocs", "device": "cpu"} | METHODS[name]
    args = parse_args(list(itertools.chain(*((f"--{key}", str(value)) for key, value in flags.items()))))
    model, optimizer_ = build_training(args, torch.device("cpu"))
    ids = torch.arange(32).view(2, 16)
    output = model(ids, ids)
    assert output.loss_sum is not None
    output.loss_sum.backward()
    optimizer_.step()
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if hasattr(module, "quant_state"):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif name == "qlora8" and hasattr(module, "state"):
            tensors.append(module.state.SCB)
    for state in optimizer_.state.values():
        tensors += [value for key, value in state.items() if isinstance(value, Tensor) and key != "step"]
    measured = sum(tensor.nbytes for tensor in tensors)
    planned = plan(args, read_config(path))
    assert planned.weights_and_states_bytes == pytest.approx(measured, rel=1e-3)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    sums = trained * (2 if dtype == "bfloat16" else 4)
    assert planned.lasting["gradients"] == sums
    assert planned.peak_bytes > planned.weights_and_states_bytes + sums


@pytest.mark.parametrize(
    "flags, sentence",
    {
        "--method low_rank --rank 8": "low_rank, each matrix the product of two factors of rank 8; trains 8,704 values",
        "--method lora --rank 8 --lora_alpha 16": "lora, adapters of rank 8 and alpha 16 beside matrices frozen in "
        "float32; trains 8,704 values of these and all 32,960 others",
        "--method qlora --rank 8 --lora_dropout 0.1": "beside matrices frozen in NF4, dropout 0.1",
        "--method qlora --qlora_bits 8 --rank 8": "beside matrices frozen in 8 bits",
        "--method relora --rank 8 --relora_every 4 --relora_warmup 1": "merged every 4 updates with 0.99 of their "
        "states set to zero and 1 updates of warm-up",
    }.items(),
)
def test_the_first_lines_say_the_method(
    small: SmallRun, capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    words = flags.split()
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    assert small.main("dry", **given, dry_run=True) == 0
    assert sentence in capsys.readouterr().out


PAGE = ROOT / "docs" / "guide" / "baselines.md"


def test_each_command_of_the_guide_is_read(small: SmallRun) -> None:
    lines = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)).splitlines()
    shared, *commands = lines
    common = shlex.split(shared.partition("=")[2])[0].split()
    assert len(commands) == 7 and common[0] == "run_pretrain.py"
    source = run_of(small, "lora").save_dir
    found = []
    for command in commands:
        words = [str(source) if word == "runs/warm" else word for word in shlex.split(command)]
        assert words[:2] == ["python", "$TRAIN"]
        argv = [str(small.data) if word == "DIR" else word for word in (*common[1:], *words[2:])]
        if "--init_from" in argv:  # of the small model
            argv[argv.index("60m")] = str(small.config)
            argv += ["--max_length", "32", "--rank", "8"]
        found.append(parse_args(argv).method.method)
    assert found == ["low_rank", "lora", "relora", "qlora", "qlora", "full", "relora"]


# ---- what cannot work

RELORA = "--method relora --rank 8 --relora_every 4 --relora_warmup 1"
REFUSED = {
    "--method lora --rank 8 --optimizer muon": "--optimizer muon cannot work with --method lora: it is for whole",
    "--method low_rank --rank 8 --optimizer galore_adamw": "--optimizer galore_adamw cannot work with --method",
    "--method qlora --rank 8 --optimizer q_galore_adamw8bit": "use one of adam, adamw, adam8bit, sgd, adafactor",
    "--method lora --rank full": "--rank full cannot work with --method lora",
    "--method lora --rank auto": "--rank auto cannot work with --method lora, whose factors have one rank: give a",
    "--method lora --rank 8,16": "--rank 8,16 cannot work with --method lora",
    "--method lora --rank 64": "--rank is 64, but self_attn.q_proj",
    "--method low_rank --rank 8 --mlp_rank 4": "--mlp_rank 4 cannot work with --method low_rank",
    "--method lora --rank 8 --average_last 0.5": "--average_last 0.5 cannot work with --method lora",
    "--relora_every 4": "--relora_every 4 has no meaning with --method full: leave it out, or give --method relora",
    "--method lora --rank 8 --relora_prune 1": "--relora_prune 1 has no meaning with --method lora",
    "--lora_alpha 16": "--lora_alpha 16 has no meaning with --method full",
    "--method low_rank --rank 8 --lora_dropout 0.1": "give --method lora or relora or qlora",
    "--method lora --rank 8 --qlora_bits 8": "--qlora_bits 8 has no meaning with --method lora",
    "--method qlora --rank 8 --qlora_bits 2": "--qlora_bits is '2', it must be one of 4, 8",
    "--method relora --rank 8": "needs --relora_every, the updates between two merges",
    RELORA.replace("every 4", "every 8"): "--relora_every 8 is not less than the run's 8 updates",
    RELORA.replace("warmup 1", "warmup 4"): "--relora_warmup 4 is not less than --relora_every 4",
    "--method qlora --rank 8 --compile on": "--compile on cannot work with --method qlora",
    "--method adalora": "--method is 'adalora', it must be one of full, low_rank, lora, relora, qlora",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_refused(small: SmallRun, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    argv = [*small.argv("refused"), *flags.split()]
    with restored_process():
        import run_pretrain

        assert run_pretrain.main(argv) == 2
    assert REFUSED[flags] in capsys.readouterr().err
    assert not (small.folder / "refused").exists()


GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 256,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "shape, rank, sentence",
    [
        (GPT2, 8, "transformer.h.0.attn.c_attn of .* is a Conv1D of transformers"),
        (
            CONFIG | {"model_type": "mistral", "num_key_value_heads": 1},
            32,
            "--rank is 32, but .*k_proj of .* is 32 x 64",
        ),
    ],
    ids=["gpt2", "mistral"],
)
def test_matrices_that_take_no_factors_are_refused(
    tmp_path: Path, small: SmallRun, capsys: pytest.CaptureFixture[str], shape: dict[str, Any], rank: int, sentence: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape))
    assert small.main("refused-hf", model_config=path, use_hf_model=True, method="low_rank", rank=rank) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_an_evaluation_leaves_a_frozen_layer_as_it_was() -> None:
    """bitsandbytes lays codes out anew in evaluations on some CPUs, and no backward pass reads them then."""
    from peft_pretraining.methods.frozen import FrozenNF4

    layer, x = FrozenNF4(linear().weight.data, None), torch.randn(3, 32)
    assert not layer.support_avx512bf16_for_cpu
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()(x)
    assert_same_bits(dict(layer.train().state_dict()), before)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, -1))


def test_low_rank_has_nothing_to_put_given_weights_into(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    source = run_of(small, "lora").save_dir
    assert small.main("refused", method="low_rank", rank=8, init_from=source) == 2
    assert f"--init_from {source} cannot work with --method low_rank" in capsys.readouterr().err


@pytest.mark.parametrize("package, name", [("peft", "lora"), ("bitsandbytes", "qlora")])
def test_a_missing_package_is_a_sentence(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "peft_pretraining.methods.frozen", raising=False)
    assert small.main("missing", **FLAGS | METHODS[name]) == 2
    assert f"needs the package {package}, which is not installed: pip install 'qgalore[" in capsys.readouterr().err


def test_a_checkpoint_from_before_there_were_methods_is_of_a_full_run(small: SmallRun) -> None:
    found = find_checkpoint(run_of(small, "lora").save_dir)
    assert found is not None and method_of(found.state) == MethodArgs(method="lora")
    assert method_of({"method": "full"}) is None and method_of({}) is None


def test_without_a_method_there_is_no_adapter(small: SmallRun) -> None:
    args = parse_args(small.argv("plain"))
    model, _ = build_training(args, torch.device("cpu"))
    assert not list(adapters_of(model)) and not [x for x in model.parameters() if not x.requires_grad]
