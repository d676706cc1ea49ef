"""Accumulation layer by layer: the bits of accumulation by micro-batches, with the sums of one layer at a time."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import run_pretrain
from peft_pretraining.accumulation import layer_by_layer
from peft_pretraining.accumulation.layer_by_layer import LayerByLayer
from peft_pretraining.build import build_training
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.memory.host import missing_host_memory
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.plan import MemoryPlan, plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.models.registry import read_config
from peft_pretraining.runtime.process import make_reproducible
from peft_pretraining.runtime.update_outcomes import RollbackError
from qgalore.graphs import dequant_cache
from qgalore.optimizer import LowRankAdamW
from tests.small_run import (
    CONFIG,
    FULL_RANK,
    INT8_PRODUCTS,
    OPTIMIZERS,
    RECIPE,
    Result,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    flags_of,
)

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS} | {
    "streaming": PER_LAYER | {"subspace": "streaming"},
    "recipe": PER_LAYER | RECIPE,
    "normuon": PER_LAYER | RECIPE | {"direction": "normuon"},
    "int8 sums": PER_LAYER | {"subspace": "streaming", "grad_accum_dtype": "int8"},
    "bfloat16 sums": PER_LAYER | {"grad_accum_dtype": "bfloat16", "dtype": "bfloat16"},
    "products in int8": PER_LAYER | INT8_PRODUCTS,
    "int4": PER_LAYER | {"weight_bits": 4},
    "simulated": PER_LAYER | {"simulation": True},
    "fira, limited": PER_LAYER | {"residual": "fira", "norm_growth": 1.01, "subspace": "streaming"},
    "full rank": {**FULL_RANK},
    "full rank, Adam": FULL_RANK | {"recipe": "paper"},
    "momentum in parts": FULL_RANK | {"momentum_rank": "1/8"},
    "rounding feedback": FULL_RANK | {"rounding_feedback": 1},
    "recipe full_rank": FULL_RANK | {"rank": None, "recipe": "full_rank", "lr": None},
    "clipping": flags_of("q_galore_adamw8bit") | {"grad_clipping": 0.5},
    "float16": PER_LAYER | {"dtype": "float16", "loss_scale": 1024},
}
QUICK = ("adamw", "sgd", "q_galore_adamw8bit_per_layer", "int8 sums", "recipe full_rank", "momentum in parts")
"""What is tried at every change; the others are slow."""
TRAINED: dict[str, object] = {"num_training_steps": 6, "batch_size": 2, "eval_every": 2, "save_every": 3}
BY_LAYER: dict[str, object] = {"accumulate_by": "layer"}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path, layers=2)


def assert_same_training(a: Result, b: Result) -> None:
    """Losses, evaluations, weights, states and the place in the data, to the bit."""
    assert [str(line) for line in a.lines] == [str(line) for line in b.lines] and a.train_lines
    for step in (3, 6):
        one, other = a.checkpoint(step), b.checkpoint(step)
        assert_same_bits(one.model_tensors, other.model_tensors, "model")
        assert_same_bits(one.optimizer_state, other.optimizer_state, "optimizer")
        assert_same_bits(one.state["data"], other.state["data"], "data")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_it_gives_the_bits_of_accumulation_by_micro_batches(small: SmallRun, case: str) -> None:
    """Of four micro-batches, through refreshes, an evaluation between updates and a checkpoint."""
    flags = CASES[case] | TRAINED
    by_micro_batch = small.run("by_micro_batch", **flags, activation_checkpointing=True)
    assert_same_training(by_micro_batch, small.run("by_layer", **flags, **BY_LAYER))


@pytest.mark.slow
def test_adapters_drop_the_same_values(small: SmallRun) -> None:
    pytest.importorskip("peft")
    flags = TRAINED | {"method": "lora", "rank": 4, "lora_dropout": 0.3, "lr": 1e-2}
    assert_same_training(small.run("by_micro_batch", **flags), small.run("by_layer", **flags, **BY_LAYER))


def test_one_micro_batch_is_an_update_too(small: SmallRun) -> None:
    flags = PER_LAYER | TRAINED | {"batch_size": 8}
    assert_same_training(small.run("by_micro_batch", **flags), small.run("by_layer", **flags, **BY_LAYER))


def test_a_family_that_builds_on_llama_has_it(small: SmallRun) -> None:
    """Qwen2, with biases and grouped heads."""
    grouped = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1}
    small.config.write_text(json.dumps(CONFIG | grouped | {"num_hidden_layers": 2}))
    flags = FULL_RANK | TRAINED
    assert_same_training(small.run("by_micro_batch", **flags), small.run("by_layer", **flags, **BY_LAYER))


def test_a_head_that_is_the_embeddings_has_its_gradients_in_another_order(small: SmallRun) -> None:
    """h1 + h2 + e1 + e2 instead of (h1 + e1) + (h2 + e2): last bits of float32 sums."""
    small.config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 2, "tie_word_embeddings": True}))
    flags = TRAINED | {"optimizer": "galore_adamw", "rank": "full", "adam_eps": 1.0, "lr": 1.0, "save_every": 6}
    one, other = small.run("by_micro_batch", **flags), small.run("by_layer", **flags, **BY_LAYER)
    assert other.losses == pytest.approx(one.losses, abs=1e-5)
    moved = {name: weight - one.weights(0)[name] for name, weight in one.weights().items()}
    for name, weight in other.weights().items():
        assert (weight - one.weights()[name]).norm() < 1e-4 * moved[name].norm(), name


# ---- memory


def test_one_layer_has_sums_at_a_time(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its weights are dequantized once for each of its two passes, whatever the number of micro-batches."""
    end_layer, grouped_dequantize, ends, dequantized = LowRankAdamW.end_layer, dequant_cache.grouped_dequantize, [], []

    def alone(optimizer: LowRankAdamW, parameters: Any) -> None:
        parameters = list(parameters)
        of_layer = {optimizer._weights[param] for param in parameters}
        waiting = {weight for weight in optimizer._weights.values() if weight.gradient.waits}
        assert waiting == of_layer
        end_layer(optimizer, parameters)
        assert not any(weight.gradient.waits or weight.gradient.is_final for weight in optimizer._weights.values())
        ends.append(len(parameters))

    def counted(*args: Any) -> Any:
        dequantized.append(len(args[0]))
        return grouped_dequantize(*args)

    monkeypatch.setattr(LowRankAdamW, "end_layer", alone)
    monkeypatch.setattr(dequant_cache, "grouped_dequantize", counted)
    small.run("by_layer", **(FULL_RANK | TRAINED | BY_LAYER))
    # Head and last norm, two layers of seven matrices and two norms, embeddings.
    assert ends == [2, 9, 9, 1] * 6
    assert [count for count in dequantized if count] == [7] * 4 * 6
    dequantized.clear()
    monkeypatch.setattr(layer_by_layer, "CACHED_BYTES", 4 * (4 * 64 * 64 + 128 * 64))
    small.run("parts", **(FULL_RANK | TRAINED | BY_LAYER | {"num_training_steps": 1}))
    assert [count for count in dequantized if count] == [7, 7, 5, 5], "gate, but not up and down, beside the sums"


SEVEN_B = "--model_config 7b --dataset pydocs --batch_size 8 --total_batch_size 512 --device cuda --max_length 256"
IN_PARTS = "--momentum_rank 1/16 --momentum_rest_bits 4"


def planned(flags: str) -> MemoryPlan:
    argv = f"{SEVEN_B} --optimizer q_galore_adamw8bit_per_layer --recipe full_rank {flags}"
    args = parse_args(argv.split())
    return plan(args, read_config(args.model.model_config))


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        (IN_PARTS, 13.0e9),
        (f"{IN_PARTS} --grad_accum_dtype bfloat16", 12.51e9),
        ("", 15.5e9),
        ("--grad_accum_dtype bfloat16", 15.0e9),
        ("--grad_accum_dtype int8", 14.85e9),  # of which FP8 takes 62 MB
    ],
)
def test_7b_at_full_rank_and_a_batch_of_512_in_the_memory_of_small_cards(flags: str, most: float) -> None:
    by_layer = planned(f"{flags} --accumulate_by layer")
    assert by_layer.weights_and_states_bytes < by_layer.peak_bytes <= most
    # 64 micro-batches of 8 x 256 tokens of 4096 values of 2 bytes, in 32 layers
    assert by_layer.host == 64 * 8 * 256 * 4096 * 2 * 32
    assert f"host memory of one rank: {by_layer.host / 1e9:.3f} GB" in by_layer.table()
    by_micro_batch = planned(f"{flags} --activation_checkpointing")
    assert by_micro_batch.peak_bytes > by_layer.peak_bytes + 5e9 and "host memory" not in by_micro_batch.table()


def test_the_plan_counts_sums_of_one_layer() -> None:
    """Of more micro-batches nothing but ids on the device; more on the host."""
    few, many = planned("--accumulate_by layer"), planned("--accumulate_by layer --total_batch_size 1024")
    ids = 16 * 8 * 256
    assert many.peak_bytes - few.peak_bytes == 64 * ids and many.host == 2 * few.host
    wide, narrow = planned("--accumulate_by layer"), planned("--accumulate_by layer --grad_accum_dtype bfloat16")
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert wide.peak_bytes - narrow.peak_bytes == 2 * layer


@pytest.mark.parametrize("case", ["full rank", "int8 sums", "bfloat16 sums", "fira, limited"])
def test_sums_of_a_layer_take_what_is_planned(small: SmallRun, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of matrices, in the update with the most: refreshes of subspaces have sums of their own."""
    end_layer, found = LowRankAdamW.end_layer, []

    def counted(optimizer: LowRankAdamW, parameters: Any) -> None:
        parameters = list(parameters)
        weights = [weight for param in parameters if (weight := optimizer._weights[param]).layer is not None]
        stored = [total.stored for weight in weights for total in weight.gradient._sums.values() if not total.empty]
        kept = [weight.gradient._last_full for weight in weights]
        found.append(sum(x.nbytes for x in (*stored, *kept) if x is not None))
        end_layer(optimizer, parameters)

    monkeypatch.setattr(LowRankAdamW, "end_layer", counted)
    flags = CASES[case] | TRAINED | BY_LAYER
    small.run("by_layer", **flags)
    args = parse_args(small.argv("planned", flags))
    planned = PassingByLayer(PlannedRun(args, read_config(args.model.model_config))).sums_of_layer()
    if case == "full rank":
        assert max(found) == planned
    else:  # all subspaces of a layer are never due at once here
        assert 0.5 * planned < max(found) <= planned


def test_host_memory_that_is_not_free_is_refused(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse_args(f"{SEVEN_B} --optimizer q_galore_adamw8bit_per_layer --accumulate_by layer".split())
    assert missing_host_memory(args, free=35 * 10**9) is None
    message = missing_host_memory(args, free=30 * 10**9)
    assert message is not None and "34.36 GB of hidden states" in message and "4.36 GB are missing" in message
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = missing_host_memory(args, free=35 * 10**9)
    assert message is not None and "68.72 GB of hidden states of 2 ranks" in message
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert missing_host_memory(parse_args(SEVEN_B.split()), free=0) is None
    monkeypatch.setattr("peft_pretraining.memory.host.free_host_bytes", lambda: 1000)
    assert small.main("refused", **(PER_LAYER | BY_LAYER)) == 2
    assert "--accumulate_by layer keeps 0.00 GB of hidden states in host memory" in capsys.readouterr().err
    assert not (small.folder / "refused").exists()
    assert small.main("dry", **(PER_LAYER | BY_LAYER | {"dry_run": True})) == 0
    assert "warning: --accumulate_by layer keeps" in capsys.readouterr().out


# ---- faults, stops, ranks


def spoiled(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Any, Tensor], Tensor]) -> None:
    """Let a method of the network give `spoil(model, its result)`."""
    method = getattr(LlamaForCausalLM, name)
    monkeypatch.setattr(LlamaForCausalLM, name, lambda model, *args: spoil(model, method(model, *args)))


@pytest.mark.parametrize("optimizer", ["sgd", "q_galore_adamw8bit_per_layer"])
def test_a_loss_that_is_not_finite_is_known_before_any_weight_is_updated(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    calls = itertools.count()
    # The third micro-batch of four in the third update.
    spoiled(monkeypatch, "head_loss", lambda _, loss: loss + (torch.inf if next(calls) == 2 * 4 + 2 else 0))
    flags = flags_of(optimizer) | TRAINED | {"save_every": 1, "keep_checkpoints": 0}
    run = small.run("by_layer", **flags, **BY_LAYER)
    assert [line["train/skipped"] for line in run.train_lines] == [0, 0, 1, 0, 0, 0]
    assert run.train_lines[2]["train/loss"] is None
    assert_same_bits(run.checkpoint(3).model_tensors, run.checkpoint(2).model_tensors)
    assert "late_overflow" not in str(run.lines)


def test_a_gradient_that_is_not_finite_is_skipped_from_a_checkpoint_on(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the embeddings, when all above have been updated: the same training as where nothing had been."""
    flags = PER_LAYER | TRAINED | {"save_every": 2}
    updates, update = [0], run_pretrain.Run.update

    def counted(run: run_pretrain.Run) -> bool:
        updates[0] = run.update_step
        return update(run)

    def break_gradient(_: object, x: Tensor) -> Tensor:
        if updates[0] == 3:
            x.register_hook(lambda grad: grad * torch.nan)
        return x

    monkeypatch.setattr(run_pretrain.Run, "update", counted)
    raised: list[RollbackError] = []
    decide = run_pretrain.Run.decide

    def noted(run: run_pretrain.Run, finished: Any) -> None:
        try:
            decide(run, finished)
        except RollbackError as error:
            raised.append(error)
            raise

    monkeypatch.setattr(run_pretrain.Run, "decide", noted)
    spoiled(monkeypatch, "embed", break_gradient)
    run = small.run("by_layer", **flags, **BY_LAYER)
    assert [error.update_step for error in raised] == [3]
    assert [line["train/skipped"] for line in run.train_lines] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(("method", "finished"), [("embed", 3), ("head_loss", 4)])
def test_a_stop_before_the_first_update_of_a_weight_is_at_once_and_later_at_the_end(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, method: str, finished: int
) -> None:
    flags = FULL_RANK | TRAINED | BY_LAYER | {"save_every": 0}
    whole = small.run("whole", **flags)
    calls = itertools.count()
    # Of four micro-batches; embeddings are looked up again for the backward passes of the first layer and themselves.
    in_an_update = {"embed": 3 * 4, "head_loss": 4}[method]

    def stop(_: object, x: Tensor) -> Tensor:
        if next(calls) == 3 * in_an_update + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    with monkeypatch.context() as patched:
        spoiled(patched, method, stop)
        stopped = small.run("parts", **flags)
    assert (stopped.save_dir / "STOPPED").read_text() == f"SIGTERM after {finished} updates\n"
    resumed = small.run("parts", **flags, continue_from="auto")
    assert_same_bits(resumed.checkpoint().model_tensors, whole.checkpoint().model_tensors)
    assert_same_bits(resumed.checkpoint().optimizer_state, whole.checkpoint().optimizer_state)


def test_a_run_goes_on_in_the_other_order(small: SmallRun) -> None:
    flags = PER_LAYER | TRAINED | {"save_every": 0}
    whole = small.run("whole", **flags)
    small.stop("parts", 3, **flags, **BY_LAYER)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


@pytest.mark.parametrize(
    "case", ["full rank", *(pytest.param(case, marks=pytest.mark.slow) for case in ("sgd", "streaming", "clipping"))]
)
def test_ranks_sum_each_layer_once_an_update(small: SmallRun, case: str) -> None:
    """To the bit what two ranks compute by micro-batches, with equal weights on both."""
    flags = CASES[case] | {"num_training_steps": 5, "check_replicas": 1, "total_batch_size": 8, "batch_size": 2}
    assert_same_run(small.run_on(2, "by_micro_batch", **flags), small.run_on(2, "by_layer", **flags, **BY_LAYER))


# ---- refusals

Q_GALORE = "--optimizer q_galore_adamw8bit_per_layer --accumulate_by layer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grad_clipping 1", "--grad_clipping 1 cannot work with --optimizer q_galore_adamw8bit_per_layer and"),
        ("--use_hf_model", "--accumulate_by layer is for the project's own networks"),
        ("--recipe full_rank --sum_in_momentum", "there are those of one layer: leave one of them out"),
        ("--dtype float16", "Use --accumulate_by micro_batch, q_galore_adamw8bit, or a fixed --loss_scale"),
    ],
)
def test_what_cannot_be_had_is_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(f"{SEVEN_B} {Q_GALORE} {flags}".split())


def test_flags_of_activations_that_change_nothing_are_named() -> None:
    args = parse_args(f"{SEVEN_B} {Q_GALORE} --activation_checkpointing --int8_activations".split())
    named = "--activation_checkpointing, --int8_activations change nothing: --accumulate_by layer recomputes"
    assert any(named in warning for warning in args.warnings)
    model = build_training_on_meta(f"{Q_GALORE} --activation_checkpointing")
    assert not any(layer.gradient_checkpointing for layer in model.decoder_layers)


def build_training_on_meta(flags: str) -> Any:
    args = parse_args(f"--model_config 9m --dataset pydocs --batch_size 2 --device cpu {flags}".split())
    return build_training(args, torch.device("cpu"))[0]


# ---- compiled layers, and a GPU


def trained(folder: Path, device: str, flags: str, updates: int = 5, waits_from: int = 99) -> Any:
    """Losses, weights and states after some updates of four micro-batches.

    From update `waits_from` on it is an error to wait for the device inside an update.
    """
    config = folder / "model.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    argv = f"--model_config {config} --dataset {folder} --batch_size 4 --gradient_accumulation 4 --max_length 32"
    args = parse_args(f"{argv} --lr 1e-2 --device {device} {flags}".split(), 1)
    model, optimizer = build_training(args, torch.device(device))
    by_layer = LayerByLayer(model, optimizer) if args.by_layer else None
    losses = []
    for update in range(updates):
        ids = torch.randint(0, 256, (4, 4, 32), generator=torch.Generator().manual_seed(update)).to(device)
        if update >= waits_from:
            torch.cuda.set_sync_debug_mode("error")
        if by_layer is not None:
            by_layer.forward([(each, each) for each in ids], lambda _: None, lambda: True)
            loss = by_layer.backward(ids.numel(), lambda _: None)
        else:
            loss = torch.zeros((), device=device)
            for number, each in enumerate(ids, start=1):
                optimizer.is_last_micro_batch = number == len(ids)
                micro_loss = model(each, each).loss_sum
                assert micro_loss is not None
                micro_loss = micro_loss / ids.numel()
                loss += micro_loss.detach()
                micro_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update >= waits_from:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss)
    return losses, model.state_dict(), optimizer.state_dict()["state"]


QUANTIZED = "--optimizer q_galore_adamw8bit_per_layer"
ON_A_GPU = {
    "recipe": QUANTIZED,
    "full rank": f"{QUANTIZED} --recipe full_rank",
    "momentum in parts": f"{QUANTIZED} --recipe full_rank --momentum_rank 1/8",
    "int8 sums": f"{QUANTIZED} --grad_accum_dtype int8",
    "svd": f"{QUANTIZED} --recipe paper --rank 16 --update_proj_gap 3",
    "uncompiled": f"{QUANTIZED} --compile off",
    "not per layer": "--optimizer adam8bit --adam8bit_backend own",
}


@pytest.mark.parametrize("case", ["recipe", "not per layer"])
def test_compiled_layers_are_run_layer_by_layer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_layers = LlamaForCausalLM.compile_layers
    torch._dynamo.reset()
    # Without a C++ compiler: the same graphs, not lowered to machine code.
    monkeypatch.setattr(LlamaForCausalLM, "compile_layers", lambda model: compile_layers(model, "aot_eager"))
    flags = f"{ON_A_GPU[case]} --compile on --dtype float32"
    assert_same_bits(trained(tmp_path, "cpu", flags, 3), trained(tmp_path, "cpu", f"{flags} --accumulate_by layer", 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", ON_A_GPU)
def test_on_a_gpu_it_gives_the_bits_of_accumulation_by_micro_batches(case: str, tmp_path: Path) -> None:
    """Of the same kernels: layers that are not computed again, and graphs have the bits of plain calls."""
    make_reproducible()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            by_micro_batch = trained(tmp_path, "cuda", f"{ON_A_GPU[case]} --cuda_graphs off")
            by_layer = trained(tmp_path, "cuda", f"{ON_A_GPU[case]} --accumulate_by layer")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(by_micro_batch, by_layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_the_device_in_a_steady_update(tmp_path: Path) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        trained(tmp_path, "cuda", f"{ON_A_GPU['full rank']} --accumulate_by layer", 12, waits_from=8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_hidden_states_lie_in_page_locked_memory_until_they_are_gone() -> None:
    like = torch.empty(2, 5, 64, device="cuda")
    states = layer_by_layer.hidden_states(3, 4, like)
    host = list(states._host)  # type: ignore[attr-defined]
    assert [x.shape for x in host] == [(4, 2, 5, 64)] * 3 and all(x.is_pinned() for x in host)
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(4):
            states.write(1, number, torch.full_like(like, number))
        found = [x.clone() for x in states.read(1)]
    torch.cuda.synchronize()
    assert [float(x.mean()) for x in found] == [0, 1, 2, 3]
    del states
    assert not any(x.is_pinned() for x in host)
