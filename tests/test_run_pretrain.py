"""The run as a whole, on a model of 0.1 M parameters: what the flags promise is what happens."""

from __future__ import annotations

import errno
import fcntl
import gzip
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import IO

import pytest
import torch
import torch.nn.functional as F

from peft_pretraining.build import build_data, build_training
from peft_pretraining.checkpoint.folder import lock_folder
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.models.network import CausalLM
from peft_pretraining.reporting.jsonl import METRICS_FILE, read_metrics
from peft_pretraining.runtime.deferred_metrics import DeferredMetrics
from peft_pretraining.runtime.world import World
from qgalore import LowRankLinear
from tests.small_run import (
    CONFIG,
    INT8_PRODUCTS,
    LOW_RANK,
    OPTIMIZERS,
    Q_GALORE,
    RECIPE,
    VOCAB,
    Result,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    flags_of,
    restored_process,
    write_text,
)

GALORE = flags_of("galore_adamw8bit")
Q_GALORE_PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def changed_shares(result: Result, first: int, last: int) -> dict[str, float]:
    """Of every weight, the share of its values that differ between two update steps."""
    before, after = result.weights(first), result.weights(last)
    assert before.keys() == after.keys()
    return {name: float((before[name] != after[name]).float().mean()) for name in before}


def assert_learns(result: Result) -> None:
    """The losses are finite, begin at that of a blind guess, and go down well beyond the noise between batches."""
    losses = result.losses
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3, losses
    assert result.eval_loss < losses[0] - 0.3


# ---- every optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_update_trains_every_parameter(tmp_path: Path, optimizer: str) -> None:
    result = SmallRun(tmp_path, layers=2).run("run", **flags_of(optimizer), num_training_steps=1, save_every=1)
    shares = changed_shares(result, 0, 1)
    assert len(shares) == 3 + 9 * 2
    # Of the embedding, only the rows of tokens that occur have a gradient.
    seen = shares.pop("model.embed_tokens.weight")
    assert seen > 0.3
    assert min(shares.values()) > 0.5, shares


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loss_goes_down(small: SmallRun, optimizer: str) -> None:
    result = small.run("run", **flags_of(optimizer), num_training_steps=10)
    assert_learns(result)
    assert [path.name for path in result.checkpoints] == ["step_00000010"]


@pytest.mark.parametrize("optimizer", ["galore_adamw8bit", "q_galore_adamw8bit"])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
def test_updates_inside_the_backward_pass_are_the_same_updates(small: SmallRun, optimizer: str, subspace: str) -> None:
    flags = flags_of(optimizer) | {"subspace": subspace}
    per_layer = flags | {"optimizer": f"{optimizer}_per_layer"}
    assert_same_run(small.run("all", **flags), small.run("per_layer", **per_layer))


VARIANTS: dict[str, dict[str, object]] = {
    "simulation": Q_GALORE_PER_LAYER | {"simulation": True},
    "int4_weights": Q_GALORE_PER_LAYER | {"weight_bits": 4},
    "int8_products": Q_GALORE_PER_LAYER | INT8_PRODUCTS,
    "int8_products_bfloat16": Q_GALORE_PER_LAYER | INT8_PRODUCTS | {"dtype": "bfloat16"},
    "hf_int8_products": Q_GALORE_PER_LAYER | INT8_PRODUCTS | {"use_hf_model": True},
    "fp8_products": Q_GALORE_PER_LAYER | {"fp8_products": True},
    "fp8_products_int4_bfloat16": Q_GALORE_PER_LAYER | {"fp8_products": True, "weight_bits": 4, "dtype": "bfloat16"},
    "fp8_weight_gradients": Q_GALORE_PER_LAYER | {"fp8_products": True, "fp8_weight_gradients": True},
    "fp8_head": Q_GALORE_PER_LAYER | {"fp8_products": True, "fp8_head": True, "fp8_weight_gradients": True},
    "hf_fp8_products": Q_GALORE_PER_LAYER | {"fp8_products": True, "use_hf_model": True},
    "nearest_rounding": Q_GALORE_PER_LAYER | {"stochastic_round": False},
    "float_weights": Q_GALORE_PER_LAYER | {"weight_quant": False, "stochastic_round": None},
    "int8_projections": Q_GALORE_PER_LAYER | {"proj_bits": 8},
    "full": GALORE | {"proj_type": "full"},
    "left": GALORE | {"proj_type": "left"},
    "right": GALORE | {"proj_type": "right"},
    "reverse_std": GALORE | {"proj_type": "reverse_std"},
    "streaming": Q_GALORE_PER_LAYER | {"subspace": "streaming"},
    "recipe": Q_GALORE_PER_LAYER | RECIPE,
    "randomized": GALORE | {"svd_method": "randomized"},
    "rotated_moments": GALORE | {"rotate_moments": True},
    "clipped_per_layer": Q_GALORE_PER_LAYER | {"grad_clipping": 1.0},
    "bfloat16_sums": Q_GALORE_PER_LAYER | {"grad_accum_dtype": "bfloat16", "batch_size": 2},
    "int8_sums": Q_GALORE_PER_LAYER | {"grad_accum_dtype": "int8", "batch_size": 2},
    "bfloat16": Q_GALORE_PER_LAYER | {"dtype": "bfloat16"},
    "bfloat16_adamw": flags_of("adamw") | {"dtype": "bfloat16"},
    "hf_adamw": flags_of("adamw") | {"use_hf_model": True},
    "hf_q_galore": Q_GALORE_PER_LAYER | {"use_hf_model": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_every_parameter(small: SmallRun, variant: str) -> None:
    result = small.run("run", **VARIANTS[variant], num_training_steps=10, save_every=10)
    assert_learns(result)
    shares = changed_shares(result, 0, 10)
    assert len(shares) == 3 + 9
    assert min(shares.values()) > 0.5, shares


def test_products_in_int8_follow_the_float_ones_and_are_others(small: SmallRun) -> None:
    flags = Q_GALORE_PER_LAYER | {"weight_group_size": None, "num_training_steps": 6}
    rounded, plain = small.run("rounded", **flags, int8_products=True), small.run("plain", **flags)
    differences = [abs(a - b) for a, b in zip(rounded.losses, plain.losses, strict=True)]
    assert differences[0] > 0, "the flag reached no layer"
    assert max(differences) < 0.02, (rounded.losses, plain.losses)
    state = rounded.checkpoint().model_tensors
    assert state["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 1)


@pytest.mark.parametrize("model", ["ours", "transformers"])
def test_a_head_in_fp8_follows_the_float_one_and_is_another(small: SmallRun, model: str) -> None:
    flags = Q_GALORE_PER_LAYER | {"fp8_products": True, "num_training_steps": 12}
    flags |= {"use_hf_model": True} if model == "transformers" else {}
    plain, head = small.run("plain", **flags), small.run("head", **flags, fp8_head=True)
    both = small.run("both", **flags, fp8_head=True, fp8_weight_gradients=True)
    for rounded in (head, both):
        differences = [abs(a - b) for a, b in zip(rounded.losses, plain.losses, strict=True)]
        assert differences[0] > 0, "the flag did not reach the head"
        # The first loss is of the same weights; the later ones are of two trainings that part.
        assert differences[0] < 1e-3 and max(differences) < 0.03, (rounded.losses, plain.losses)
        assert abs(sum(rounded.losses) - sum(plain.losses)) / 12 < 0.01
        assert rounded.eval_loss == pytest.approx(plain.eval_loss, abs=0.03)
    assert head.losses != both.losses, "the gradient of its weight is what it was"


def test_storage_of_weights_and_projections(small: SmallRun) -> None:
    name, hidden = "model.layers.0.self_attn.q_proj.weight", 64
    for bits, columns in ((8, hidden), (4, hidden // 2)):
        result = small.run(f"int{bits}", **Q_GALORE_PER_LAYER | {"weight_bits": bits}, num_training_steps=2)
        weight = result.checkpoint().model_tensors[f"{name}_qdata"]
        assert weight.dtype == torch.uint8 and weight.shape == (hidden, columns)
    states = result.checkpoint().optimizer_state["state"].values()
    bases = [state[key] for state in states for key in ("left_basis", "right_basis") if key in state]
    assert len(bases) == 7 and {basis.dtype for basis in bases} == {torch.uint8}
    assert {basis.shape for basis in bases} == {(32, 32)}, "32 basis vectors of 64 packed INT4 values"
    simulated = small.run("sim", **Q_GALORE_PER_LAYER | {"simulation": True, "weight_bits": 4}, num_training_steps=2)
    weight = simulated.checkpoint().model_tensors[name]
    assert weight.dtype == torch.float32
    assert all(8 <= len(row[:48].unique()) <= 16 and 4 <= len(row[48:].unique()) <= 16 for row in weight)


def test_simulation_follows_stored_integers(small: SmallRun) -> None:
    # Nearest rounding: both then compute the same grid from the same values up to the last float32 bit.
    flags = Q_GALORE_PER_LAYER | {"stochastic_round": False}
    stored, simulated = small.run("stored", **flags), small.run("simulated", **flags, simulation=True)
    assert simulated.losses == pytest.approx(stored.losses, abs=5e-3)


def test_the_hf_model_is_the_same_model(small: SmallRun) -> None:
    ours, theirs = small.run("ours", num_training_steps=6), small.run("hf", num_training_steps=6, use_hf_model=True)
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-4)
    assert theirs.eval_loss == pytest.approx(ours.eval_loss, abs=1e-4)
    assert theirs.checkpoint().model_tensors.keys() == ours.checkpoint().model_tensors.keys()


@pytest.mark.parametrize("optimizer", ["adamw", "q_galore_adamw8bit_per_layer"])
def test_activation_checkpointing_changes_no_bit(small: SmallRun, optimizer: str) -> None:
    plain = small.run("plain", **flags_of(optimizer), num_training_steps=6)
    assert_same_run(
        plain, small.run("thrifty", **flags_of(optimizer), num_training_steps=6, activation_checkpointing=True)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_sums_in_fewer_bits_stay_close(small: SmallRun, dtype: str) -> None:
    flags = GALORE | {"batch_size": 2, "num_training_steps": 5}
    exact, short = small.run("float32", **flags), small.run(dtype, **flags, grad_accum_dtype=dtype)
    assert short.losses != exact.losses
    assert short.losses == pytest.approx(exact.losses, abs=0.05)


# ---- what an update is


def first_update(small: SmallRun, **flags: object) -> tuple[CausalLM, list[torch.Tensor], list[torch.Tensor]]:
    """The model before the first update, and the token ids and labels of its micro-batches."""
    with restored_process():
        args = parse_args(small.argv("none", flags))
        world = World(0, 1, torch.device("cpu"))
        loader, _ = build_data(args, world)
        model, _ = build_training(args, world.device)
        batches = loader.next_update().micro_batches
    return model, [batch.input_ids for batch in batches], [batch.labels for batch in batches]


def plain_loss(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean nats a target, straight from the logits."""
    logits = model(input_ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "q_galore_adamw8bit_per_layer"])
def test_logged_loss_is_the_mean_over_the_whole_update(small: SmallRun, optimizer: str) -> None:
    # Documents of 1 to 40 words in rows of 32: the micro-batches have different numbers of targets.
    flags = flags_of(optimizer) | write_text(small.folder / "text") | {"batch_size": 2, "num_training_steps": 1}
    model, input_ids, labels = first_update(small, **flags)
    counts = {int((part[:, 1:] != -100).sum()) for part in labels}
    assert len(input_ids) == 4 and len(counts) > 1
    by_hand = plain_loss(model, torch.cat(input_ids), torch.cat(labels)).item()
    (line,) = small.run("run", **flags).train_lines
    assert line["train/loss"] == pytest.approx(by_hand, rel=1e-6)
    assert line["train/perplexity"] == pytest.approx(math.exp(by_hand), rel=1e-5)
    assert line["train/tokens"] == sum(int((part != -100).sum()) for part in labels)


def test_an_update_of_sgd_by_hand(small: SmallRun) -> None:
    flags: dict[str, object] = {"optimizer": "sgd", "lr": 0.5, "full_rank_lr": 0.25, "batch_size": 2}
    model, input_ids, labels = first_update(small, **flags)
    plain_loss(model, torch.cat(input_ids), torch.cat(labels)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    result = small.run("run", **flags, num_training_steps=1)
    assert result.train_lines[0]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    weights, low_rank = result.weights(), {f"{name}.weight" for name in low_rank_names(model)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - (0.5 if name in low_rank else 0.25) * parameter.grad
        torch.testing.assert_close(weights[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradient_norm_is_logged_as_it_was_before_clipping(small: SmallRun, optimizer: str) -> None:
    flags: dict[str, object] = {"optimizer": optimizer, "lr": 0.5, "num_training_steps": 1, "save_every": 1}
    free, clipped = small.run("free", **flags), small.run("clipped", **flags, grad_clipping=0.01)
    norms = [run.train_lines[0]["train/grad_norm"] for run in (free, clipped)]
    assert norms[1] == norms[0] > 0.1
    if optimizer == "sgd":
        before, after = clipped.weights(0), clipped.weights(1)
        moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
        assert float(moved) == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "galore_adamw", "q_galore_adamw8bit_per_layer"])
def test_8_x_1_is_4_x_2_is_2_x_4(small: SmallRun, optimizer: str) -> None:
    flags = flags_of(optimizer) | write_text(small.folder / "text") | {"num_training_steps": 4}
    runs = [small.run(f"by_{size}", **flags, batch_size=size) for size in (8, 4, 2)]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, abs=2e-3 if optimizer.startswith("q_") else 2e-4)
        assert [line["train/tokens"] for line in run.train_lines] == [
            line["train/tokens"] for line in runs[0].train_lines
        ]
        # One update from the same weights: only the order of float32 sums differs.
        assert run.losses[0] == pytest.approx(runs[0].losses[0], rel=1e-6)
        norms = [each.train_lines[0]["train/grad_norm"] for each in (run, runs[0])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw8bit_per_layer"])
def test_total_batch_size_is_honoured(small: SmallRun, optimizer: str) -> None:
    flags = flags_of(optimizer) | {"num_training_steps": 3, "max_length": 16}
    result = small.run("run", **flags, batch_size=2, total_batch_size=12)
    assert [line["train/tokens"] for line in result.train_lines] == [12 * 16, 24 * 16, 36 * 16]
    again = small.run("again", **flags, batch_size=2, total_batch_size=None, gradient_accumulation=6)
    assert_same_run(result, again)


# ---- counters


def test_everything_counts_updates(small: SmallRun) -> None:
    result = small.run(
        "run", batch_size=2, num_training_steps=10, warmup_steps=4, lr=0.008, full_rank_lr=0.004, min_lr_ratio=0.5,
        scheduler="linear", save_every=4, eval_every=3, keep_checkpoints=0,
    )  # fmt: skip
    lines = result.lines
    assert [line["update_step"] for line in result.train_lines] == list(range(1, 11))
    rates = [line["train/lr"] for line in result.train_lines]
    assert rates == pytest.approx([0, 0.002, 0.004, 0.006, *(0.008 - 0.004 * k / 6 for k in range(6))])
    assert [line["train/full_rank_lr"] for line in result.train_lines] == pytest.approx([rate / 2 for rate in rates])
    assert [line["update_step"] for line in lines if "eval/loss" in line] == [3, 6, 9, 10]
    assert [path.name for path in result.checkpoints if path.name != "step_00000000"] == [
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]
    # In the order in which things happened.
    assert [line["update_step"] for line in lines] == sorted(line["update_step"] for line in lines)


def test_max_train_tokens_counts_tokens(small: SmallRun) -> None:
    result = small.run("run", max_train_tokens="1.1K", num_training_steps=None)
    # 8 sequences of 32 tokens an update: 5 updates are the fewest that make 1100 tokens.
    assert [line["train/tokens"] for line in result.train_lines] == [256.0 * k for k in range(1, 6)]
    assert result.checkpoint().update_step == 5 and result.checkpoint().state["num_training_steps"] == 5


def test_intervals_between_refreshes_count_updates(small: SmallRun) -> None:
    flags = GALORE | {"update_proj_gap": 4, "gamma_proj": 1, "num_training_steps": 14}
    for accumulation in (1, 4):
        result = small.run(f"by_{accumulation}", **flags, batch_size=8 // accumulation)
        refreshed: dict[str, list[int]] = {}
        for line in result.train_lines:
            for name in line:
                if name.startswith("subspace/similarity/"):
                    refreshed.setdefault(name, []).append(line["update_step"])
        assert len(refreshed) == 7
        for steps in refreshed.values():
            regular = steps[1:]  # the first one builds the basis
            assert {b - a for a, b in itertools.pairwise(regular)} == {4}, steps
        total = sum(len(steps) for steps in refreshed.values())
        assert result.train_lines[-1]["subspace/refreshes"] == total


def test_log_every_thins_out_lines(small: SmallRun) -> None:
    all_lines = small.run("all", num_training_steps=7).train_lines
    thin = small.run("thin", num_training_steps=7, log_every=3).train_lines
    assert thin == [all_lines[2], all_lines[5]]


def test_an_update_takes_as_long_as_the_device_does(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    take = DeferredMetrics.take

    def from_a_slow_device(self: DeferredMetrics) -> tuple[int, dict[str, float]] | None:
        pending = take(self)
        time.sleep(0.5 if pending else 0.0)
        return pending

    monkeypatch.setattr(DeferredMetrics, "take", from_a_slow_device)
    result = small.run("slow", num_training_steps=4, eval_every=0, save_every=0)
    seconds = [line["time/update_seconds"] for line in read_metrics(result.save_dir) if "train/loss" in line]
    assert all(value >= 0.5 for value in seconds[1:]), seconds


def test_metrics_have_the_names_that_were_promised(tmp_path: Path) -> None:
    small = SmallRun(tmp_path, layers=2)
    always = {
        "update_step", "train/loss", "train/perplexity", "train/lr", "train/full_rank_lr", "train/grad_norm",
        "train/tokens", "throughput/tokens_per_second", "memory/peak_gb", "data/wait_fraction",
    }  # fmt: skip
    low_rank = {"subspace/refreshes", "subspace/refreshes_saved_fraction"}
    evaluation = {"eval/loss", "eval/perplexity", "eval/perplexity_official"}
    for optimizer, expected in (("adamw", always), ("q_galore_adamw8bit_per_layer", always | low_rank)):
        lines = read_metrics(small.run(optimizer, **flags_of(optimizer), num_training_steps=9).save_dir)
        train = [line for line in lines if "train/loss" in line]
        assert len(train) == 9
        for line in train:
            assert expected <= line.keys(), expected - line.keys()
            assert line["throughput/tokens_per_second"] > 0 and 0 <= line["data/wait_fraction"] <= 1
            assert line["memory/peak_gb"] > 0.01
            assert line["train/perplexity"] == pytest.approx(math.exp(line["train/loss"]))
        names = {name for line in train for name in line}
        similar = {name.removeprefix("subspace/similarity/") for name in names if name.startswith("subspace/sim")}
        layers = {f"model.layers.{i}.{part}" for i in (0, 1) for part in _matrices()}
        assert similar == (layers if "galore" in optimizer else set())
        assert evaluation <= lines[-1].keys()
        assert lines[-1]["eval/perplexity"] == pytest.approx(math.exp(lines[-1]["eval/loss"]))


def _matrices() -> list[str]:
    return [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


# ---- same seed, same bits


@pytest.mark.parametrize(
    "flags",
    [
        flags_of("adafactor"),
        Q_GALORE_PER_LAYER,
        Q_GALORE_PER_LAYER | {"subspace": "streaming", "grad_accum_dtype": "int8", "dtype": "bfloat16"},
    ],
    ids=["adafactor", "q_galore", "streaming"],
)
def test_same_seed_same_bits(small: SmallRun, flags: dict[str, object]) -> None:
    flags = flags | {"num_training_steps": 5}
    first = small.run("first", **flags)
    torch.manual_seed(17)  # global generators have no part in a run
    assert_same_run(first, small.run("second", **flags, workers=3))
    other = small.run("other", **flags, seed=1)
    assert other.losses != first.losses
    assert not torch.equal(*(run.weights()["lm_head.weight"] for run in (first, other)))


def test_a_run_without_saving_or_evaluating_has_the_same_updates(small: SmallRun) -> None:
    busy = small.run("busy", **Q_GALORE_PER_LAYER, eval_every=2, save_every=3)
    quiet = small.run("quiet", **Q_GALORE_PER_LAYER)
    assert busy.train_lines == quiet.train_lines
    assert_same_bits(busy.checkpoint().model_tensors, quiet.checkpoint().model_tensors)


# ---- bad input


def refusal(small: SmallRun, capsys: pytest.CaptureFixture[str], name: str = "run", **flags: object) -> str:
    """The message of a run that must be refused."""
    capsys.readouterr()
    assert small.main(name, **flags) == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("run_pretrain.py: ")
    return message


def test_token_ids_beyond_the_vocabulary(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    small.config.write_text(json.dumps(CONFIG | {"vocab_size": 200}))
    message = refusal(small, capsys)
    assert "255" in message and "vocabulary of 200" in message


def test_tokenizer_larger_than_the_vocabulary(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(small, capsys, **write_text(small.folder / "text", words=300))
    assert "--tokenizer" in message and "302" in message and "vocabulary of 256" in message


def test_dataset_without_data(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    empty = small.folder / "empty"
    empty.mkdir()
    text = write_text(small.folder / "text")
    assert f"--dataset {empty}" in refusal(small, capsys, **text | {"dataset": empty})
    (small.data / "validation.uint16").unlink()
    message = refusal(small, capsys)
    assert f"--dataset {small.data}" in message and "validation" in message
    (small.data / "train.uint16").write_bytes(b"")
    assert "train.uint16" in refusal(small, capsys)
    (small.folder / "text" / "c4-train.00000-of-00001.json.gz").write_bytes(b"this is no gzip")
    message = refusal(small, capsys, **text)
    assert f"--dataset {text['dataset']}" in message and "plain text" in message


def test_an_empty_validation_set_is_found_before_the_first_update(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(small.folder / "text")
    with gzip.open(small.folder / "text" / "c4-validation.00000-of-00001.json.gz", "wt") as file:
        file.write(json.dumps({"text": " "}) + "\n")
    assert "its validation set is empty" in refusal(small, capsys, **text)
    assert not (small.folder / "run" / METRICS_FILE).exists()


def test_too_few_rows_for_the_logical_shards(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    (small.data / "train.uint16").write_bytes(bytes(2 * 32 * 7))
    assert "--data_lanes 8" in refusal(small, capsys)


def test_a_tokenizer_file_that_is_none(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(small.folder / "text")
    broken = small.folder / "broken.json"
    broken.write_text("{")
    assert str(broken) in refusal(small, capsys, **text | {"tokenizer": broken})


def test_a_refused_run_leaves_no_folder(small: SmallRun) -> None:
    """Neither one that was made for it nor those above; what was there before stays, and so does what a run wrote."""
    new, there = small.folder / "new" / "deep" / "run", small.folder / "there"
    there.mkdir()
    for folder in (new, there):
        assert small.main("run", save_dir=folder, dataset=small.folder / "nothing", save_every=1) == 2
    assert not (small.folder / "new").exists() and there.is_dir() and not list(there.iterdir())
    small.run("new", num_training_steps=1)
    assert small.main("new", dataset=small.folder / "nothing", continue_from="auto") == 2
    assert {"step_00000001", METRICS_FILE} <= {path.name for path in (small.folder / "new").iterdir()}


def test_a_lock_whose_file_was_deleted_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends may delete it between the opening and the locking of another one."""
    flock, calls = fcntl.flock, itertools.count()

    def flock_after_another_has_ended(file: IO[str], operation: int) -> None:
        if next(calls) == 0:
            Path(file.name).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_another_has_ended)
    lock = lock_folder(tmp_path / "run")
    assert Path(lock.file.name).is_file() and next(calls) == 2
    with pytest.raises(UserError, match="another process is running there"):
        lock_folder(tmp_path / "run")
    lock.remove_unused()
    assert not (tmp_path / "run").exists()


def test_save_dir_that_cannot_be_written(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    (small.folder / "file").write_text("in the way")
    message = refusal(small, capsys, name="file/run")
    assert "--save_dir" in message and str(small.folder / "file" / "run") in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda" in refusal(small, capsys, device="cuda")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "q_galore_adamw8bit", "q_galore_adamw8bit_per_layer"])
def test_updates_that_are_not_finite_are_skipped_and_end_the_run(
    small: SmallRun, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    # Weights of 1e30 after the first update, whose squares overflow.
    flags = flags_of(optimizer) | {"lr": 1e30, "max_skipped_updates": 2, "save_every": 1, "keep_checkpoints": 0}
    flags |= {"num_training_steps": 9, "weight_quant": False, "stochastic_round": None}
    message = refusal(small, capsys, **flags)
    assert "--max_skipped_updates 2: 3 updates in a row" in message
    result = small.result("run")
    skipped = [line["train/skipped"] for line in result.train_lines]
    assert skipped[0] == 0 and skipped[-3:] == [1, 1, 1] and sum(skipped) == 3
    last_good = len(skipped) - 3
    for name, weight in result.weights(last_good).items():
        assert weight.isfinite().all(), name
        assert torch.equal(result.weights(last_good + 1)[name], weight)


def test_low_rank_layers_are_only_those_of_the_decoder(small: SmallRun) -> None:
    model, _, _ = first_update(small, **Q_GALORE_PER_LAYER)
    found = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert found == set(low_rank_names(model)) and len(found) == 7
    plain, _, _ = first_update(small, **flags_of("adamw"), **{"num_training_steps": 1})
    assert not any(isinstance(module, LowRankLinear) for module in plain.modules())
    assert set(LOW_RANK) & set(Q_GALORE) == set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_locked_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(file: IO[str], operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path).release()
    said = capsys.readouterr().err
    assert f"warning: --save_dir {tmp_path}: its file system has no locks ({os.strerror(number)})" in said


def test_a_folder_that_a_network_file_system_has_locked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may say so as POSIX's other locks do."""

    def refuse(file: IO[str], operation: int) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="another process is running there"):
        lock_folder(tmp_path)
