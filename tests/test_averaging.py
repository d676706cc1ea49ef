"""The mean of the last weights of a run: what it is of, what is evaluated and exported, and that it survives a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from peft_pretraining import averaging
from peft_pretraining.averaging import WeightAverage, Window
from peft_pretraining.build import build_data, build_model, build_training
from peft_pretraining.checkpoint.store import load_checkpoint
from peft_pretraining.commands.export import averaged_weights, export
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import evaluate
from peft_pretraining.runtime.world import World
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import QuantizedTensor, quantize
from tests.small_run import (
    CONFIG,
    FULL_RANK,
    INT8_PRODUCTS,
    Result,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    flags_of,
)

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
AVERAGED: dict[str, object] = {"num_training_steps": 4, "average_last": 0.5, "save_every": 1, "keep_checkpoints": 0}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def weights_of(result: Result, step: int) -> dict[str, Tensor]:
    """The weights in a checkpoint as floats; unlike `Result.weights` also those in 4 bits."""
    tensors, weights = result.checkpoint(step).model_tensors, result.weights(step)
    for name in [key.removesuffix("_qdata") for key in tensors if key.endswith("_qdata")]:
        bits, group_size = tensors[f"{name}_format"].tolist()
        stored = [tensors[f"{name}_{part}"] for part in ("qdata", "scale", "zero_point")]
        columns = stored[0].shape[1] * 8 // bits
        weights[name] = QuantizedTensor(*stored, columns, bits, group_size).dequantize(torch.float32)
    return weights


def mean_of(result: Result, *steps: int) -> dict[str, Tensor]:
    """In float64, of the weights in checkpoints."""
    each = [weights_of(result, step) for step in steps]
    return {name: torch.stack([weights[name].double() for weights in each]).mean(0) for name in each[0]}


# ---- what the mean is of


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        (Window(6, 1, 10), [7, 8, 9, 10]),
        (Window(0, 3, 10), [1, 4, 7, 10]),
        (Window(4, 3, 10), [7, 10]),
        (Window(3, 3, 10), [4, 7, 10]),
    ],
)
def test_the_last_update_counts_and_those_before_it_at_one_interval(window: Window, steps: list[int]) -> None:
    assert [step for step in range(12) if window.has(step)] == steps
    for step in range(12):
        assert window.count(step) == sum(each <= step for each in steps), step


def test_of_many_updates_64_count() -> None:
    argv = "--model_config configs/llama_60m.json --batch_size 8 --num_training_steps 3000 --average_last 0.3"
    window = averaging.window_of(parse_args(argv.split()).schedule)
    assert window == (2100, 15, 3000) and window.count(3000) == 60
    assert averaging.window_of(parse_args(argv.split()[:-2]).schedule) is None


MODES: dict[str, dict[str, object]] = {
    "int8": PER_LAYER,
    "int4": PER_LAYER | {"weight_bits": 4},
    "simulation": PER_LAYER | {"simulation": True},
    "int8_products": PER_LAYER | INT8_PRODUCTS | {"dtype": "bfloat16"},
    "full_rank": FULL_RANK | {"batch_size": 2, "dtype": "bfloat16"},
    "adamw": flags_of("adamw") | {"dtype": "bfloat16"},
    "hf": PER_LAYER | {"use_hf_model": True},
}


@pytest.mark.parametrize("mode", ["int8", "adamw"])
def test_training_is_the_same_with_and_without(small: SmallRun, mode: str) -> None:
    flags = MODES[mode] | {"num_training_steps": 4}
    plain, averaged = small.run("plain", **flags), small.run("averaged", **flags, average_last=0.5)
    one, other = plain.checkpoint(), averaged.checkpoint()
    assert_same_bits(one.model_tensors, other.model_tensors)
    assert_same_bits(one.optimizer_state, other.optimizer_state)
    assert [{k: v for k, v in line.items() if "averaged" not in k} for line in averaged.lines] == plain.lines
    assert "average" not in one.state and not [k for line in plain.lines for k in line if "averaged" in k]


def test_frozen_and_unchanged_weights_are_their_own_mean(small: SmallRun) -> None:
    result = small.run("run", **flags_of("adamw") | AVERAGED | {"lr": 1e-30})
    mean = result.checkpoint().state["average"]["mean"]
    assert_same_bits(mean, result.weights())


# ---- evaluation


def perplexity_of(small: SmallRun, flags: dict[str, object], weights: dict[str, Tensor]) -> float:
    """Of a float model with these weights, on the validation set of a run."""
    argv = [each for each in small.argv("run", flags) if each != "--use_hf_model"]
    args = parse_args(argv)
    world = World(0, 1, torch.device("cpu"))
    loader, eval_set = build_data(args, world)
    loader.close()
    model = build_model(args.model)
    dtype = getattr(torch, args.model.dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()})
    return evaluate(model, eval_set, "cpu").perplexity


def rounded(weights: dict[str, Tensor], bits: int, group_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """With matrices of the decoder as floats on the grid of their format."""
    return {
        name: quantize(value, bits, group_size).dequantize(dtype) if "proj" in name else value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_of_the_last_weights_is_saved_and_evaluated_in_both_forms(small: SmallRun, mode: str) -> None:
    flags = MODES[mode] | AVERAGED
    if mode == "int8":  # between the matrices of its MLP activations are padded, those of floats are not
        small.config.write_text(json.dumps(CONFIG | {"intermediate_size": 85}))
    result = small.run("run", **flags)
    assert result.checkpoint(2).state["average"]["count"] == 0
    for steps in ([3], [3, 4]):
        mean, expected = result.checkpoint(steps[-1]).state["average"]["mean"], mean_of(result, *steps)
        assert mean.keys() == expected.keys()
        for name, value in expected.items():
            assert mean[name].dtype == torch.float32
            torch.testing.assert_close(mean[name].double(), value, rtol=2e-6, atol=1e-7, msg=f"{steps} {name}")
    line, bfloat16 = result.lines[-1], flags.get("dtype") == "bfloat16"
    tolerance = 2e-3 if bfloat16 else 1e-5
    assert line["eval_averaged/perplexity"] == pytest.approx(perplexity_of(small, flags, mean), rel=tolerance)
    assert abs(line["eval_averaged/perplexity"] / line["eval/perplexity"] - 1) > 5 * tolerance
    assert line["eval_averaged/tokens"] == line["eval/tokens"]
    if not flags.get("weight_quant"):
        assert "eval_averaged_quantized/perplexity" not in line
        return
    bits, group_size = 4 if mode == "int4" else 8, 128 if mode == "int8_products" else 48
    on_grid = rounded(mean, bits, group_size, torch.bfloat16 if bfloat16 else torch.float32)
    again = line["eval_averaged_quantized/perplexity"]
    # A product in INT8 rounds activations, too.
    assert again == pytest.approx(
        perplexity_of(small, flags, on_grid), rel=2e-2 if mode == "int8_products" else tolerance
    )
    assert again != line["eval_averaged/perplexity"]


def test_the_model_gets_its_own_weights_back_even_after_a_failure(small: SmallRun) -> None:
    args = parse_args(small.argv("run", PER_LAYER | {"num_training_steps": 2, "average_last": 1.0}))
    model, _ = build_training(args, torch.device("cpu"))
    average = WeightAverage(args, World(0, 1, torch.device("cpu")), model)
    average.after_update(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.named_modules())
    with torch.no_grad():
        for name, value in average._mean.items() if average.state_dict() else ():
            value.add_(1.0 if "norm" in name else 0.1)
    ids = torch.arange(8)[None]
    for form in average.forms:
        with pytest.raises(RuntimeError, match="on purpose"), average.in_model(form):
            norm = model.get_submodule("model.norm").weight
            assert float(norm.detach()[0]) == 2.0 and torch.isfinite(model(ids).logits).all()
            raise RuntimeError("on purpose")
        assert_same_bits({**model.state_dict()}, before)
        assert list(model.named_modules()) == modules
    average.close()
    assert average.forms == [averaging.FLOATS, averaging.QUANTIZED]


# ---- stops, ranks


@pytest.mark.parametrize("mode", ["int8", "adamw"])
def test_a_resumed_run_has_the_mean_of_an_uninterrupted_one(small: SmallRun, mode: str) -> None:
    flags = MODES[mode] | {"num_training_steps": 6, "average_last": 0.8, "batch_size": 2}
    whole = small.run("whole", **flags)
    for at, micro_batch in ((1, 1), (4, 3)):
        small.stop("parts", at, micro_batch, **flags, continue_from="auto")
    parts = small.run("parts", **flags, continue_from="auto")
    assert_same_run(whole, parts)
    assert_same_bits(whole.checkpoint().state["average"], parts.checkpoint().state["average"])


def test_a_longer_interval_is_resumed_as_well(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "SNAPSHOTS", 3)
    flags = flags_of("adamw") | AVERAGED | {"num_training_steps": 9, "average_last": 0.9}  # 8 updates: after 3, 6 and 9
    whole = small.run("whole", **flags)
    small.stop("parts", 4, **flags)
    parts = small.run("parts", **flags, continue_from="auto")
    for name, value in mean_of(whole, 3, 6, 9).items():
        torch.testing.assert_close(
            parts.checkpoint().state["average"]["mean"][name].double(), value, rtol=2e-6, atol=1e-7
        )
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_two_ranks_evaluate_what_one_holds(small: SmallRun) -> None:
    flags = FULL_RANK | {"num_training_steps": 4, "average_last": 0.5, "lr": 1e-2}
    result = small.run_on(2, "run", **flags)
    mean, line = result.checkpoint().state["average"]["mean"], result.lines[-1]
    assert line["eval_averaged/perplexity"] == pytest.approx(perplexity_of(small, flags, mean), rel=1e-5)
    on_grid = perplexity_of(small, flags, rounded(mean, 8, 48, torch.float32))
    assert line["eval_averaged_quantized/perplexity"] == pytest.approx(on_grid, rel=1e-5)
    assert line["eval/perplexity"] != pytest.approx(on_grid, rel=1e-3)


class OtherRank(World):
    """The second of two, whose collectives add what the first would send."""

    sent: ClassVar[list[Tensor]] = []

    def all_reduce(self, tensor: Tensor) -> None:
        """See `World`."""
        tensor.add_(self.sent.pop(0))


def test_other_ranks_hold_nothing_and_are_sent_the_mean(small: SmallRun) -> None:
    args = parse_args(small.argv("run", PER_LAYER | {"num_training_steps": 2, "average_last": 1.0}))
    model, _ = build_training(args, torch.device("cpu"))
    average = WeightAverage(args, OtherRank(1, 2, torch.device("cpu")), model)
    average.after_update(1)
    assert average.forms == [averaging.FLOATS, averaging.QUANTIZED] and not average._mean and not average._snapshot
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for form in average.forms:
            OtherRank.sent = [
                torch.full((layer.out_features, layer.in_features), 0.01)
                if layer is not None
                else torch.ones(value.shape)
                for layer, value in weights_with_layers(model)
            ]
            with average.in_model(form):
                assert not OtherRank.sent
                # All tokens have one embedding: so they have one distribution.
                logits = model(ids).logits
                assert torch.equal(logits, logits[:, :1, :1].expand_as(logits))
            assert not torch.equal(model(ids).logits, logits)
    average.close()


def weights_with_layers(model: torch.nn.Module) -> list[tuple[LowRankLinear | None, Tensor]]:
    """The parameters, with the quantized layers that they are of."""
    layers = {layer.weight: layer for layer in model.modules() if isinstance(layer, LowRankLinear)}
    return [(layers.get(param), param) for param in model.parameters()]


def test_a_run_that_is_made_longer_goes_on_with_a_mean_of_the_same_updates(small: SmallRun) -> None:
    flags = flags_of("adamw") | {"scheduler": "constant", "average_last": 1.0}
    whole = small.run("whole", num_training_steps=5, **flags)
    small.run("parts", num_training_steps=3, **flags)
    parts = small.run("parts", num_training_steps=5, continue_from="auto", **flags)
    assert parts.checkpoint().state["average"]["count"] == 5
    assert_same_bits(whole.checkpoint().state["average"], parts.checkpoint().state["average"])


# ---- refusals


def test_a_mean_that_misses_updates_is_refused(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of("adamw") | {"num_training_steps": 8}
    small.stop("run", 5, **flags)
    assert small.main("run", **flags, average_last=0.5, continue_from="auto") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--average_last: " in message and "is after 5 updates and has no mean of those from update 4 on" in message
    assert "resume from a checkpoint of update 4 or before" in message
    # Before that part nothing is missing, however the run was averaged before.
    longer = flags | {"num_training_steps": 12, "continue_from": "auto"}
    assert small.run("run", **longer, average_last=0.5).lines[-1]["eval_averaged/perplexity"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--average_last 0.01", "--average_last 0.01 of 100 updates is 1, and a mean needs 2: give at least 0.02"),
        ("--average_last 1.5", "--average_last is 1.5, it must be at least 0 and at most 1"),
    ],
)
def test_what_makes_no_mean_is_a_sentence(flags: str, message: str) -> None:
    argv = f"--model_config configs/llama_60m.json --batch_size 8 --num_training_steps 100 {flags}".split()
    with pytest.raises(UserError) as error:
        parse_args(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "settled"),
    [("--warmup_steps 30", 30), ("--warmup_steps 0 --scheduler cosine_restarts --restart_cycles 4", 75)],
)
def test_a_part_in_which_the_rate_still_rises_is_a_warning(flags: str, settled: int) -> None:
    argv = (
        f"--model_config configs/llama_60m.json --batch_size 8 --num_training_steps 100 {flags} --average_last ".split()
    )
    share = (100 - settled) / 100
    assert not [x for x in parse_args([*argv, str(share)]).warnings if "--average_last" in x]
    (warning,) = [x for x in parse_args([*argv, str(share + 0.02)]).warnings if "--average_last" in x]
    assert f"reaches back to update {settled - 2}" in warning and f"up to update {settled}" in warning


# ---- export


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_has_the_mean(small: SmallRun, tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file

    small.config.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    result = small.run("run", **PER_LAYER, num_training_steps=4, average_last=0.5)
    mean = result.checkpoint().state["average"]["mean"]
    assert ("lm_head.weight" in mean) and torch.equal(mean["lm_head.weight"], mean["model.embed_tokens.weight"]) == tied
    export(result.checkpoints[-1], tmp_path / "averaged", "float32", averaged=True)
    written = load_file(tmp_path / "averaged" / "model.safetensors")
    assert_same_bits(
        dict(sorted(written.items())), {k: mean[k] for k in sorted(mean) if not tied or k != "lm_head.weight"}
    )
    export(result.checkpoints[-1], tmp_path / "last", "float32")
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert last.keys() == written.keys() and not any(torch.equal(last[name], written[name]) for name in last)


def test_an_export_of_no_mean_is_a_sentence(small: SmallRun) -> None:
    result = small.run("run", **flags_of("adamw") | AVERAGED)
    with pytest.raises(UserError, match="is after 2 updates, and averaging begins after 2: take a later checkpoint"):
        averaged_weights(result.checkpoint(2))
    plain = small.run("plain", num_training_steps=2)
    with pytest.raises(UserError, match="has no averaged weights: its run had no --average_last"):
        averaged_weights(load_checkpoint(plain.checkpoints[-1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_a_gpu_and_no_memory_is_taken_there(small: SmallRun) -> None:
    flags: dict[str, Any] = FULL_RANK | {"num_training_steps": 9, "average_last": 1.0, "device": "cuda"}
    args = parse_args(small.argv("run", flags))
    device = torch.device("cuda", 0)
    model, _ = build_training(args, device)
    average = WeightAverage(args, World(0, 1, device), model)
    average.after_update(1)  # allocates on the host
    average._wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.after_update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
    assert average.state_dict() is not None
    layers = {name: x for name, x in model.named_modules() if isinstance(x, LowRankLinear)}
    for name, layer in layers.items():
        assert torch.equal(average._mean[f"{name}.weight"], layer.dequantized_weight(torch.float32).cpu())
    average.close()
