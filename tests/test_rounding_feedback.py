"""What the rounding of a quantized weight loses goes into its momentum, in the amount that makes up for it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat
from qgalore.update import moments
from qgalore.update.directions import ORTHOGONAL_RMS, orthogonal_directions
from qgalore.update.rounding_feedback import BYTES_PER_VALUE
from tests.small_run import FULL_RANK, SmallRun, assert_same_bits, assert_same_run

BETA, LR = 0.9, 2e-3
SHAPES = [(24, 24), (16, 40), (40, 16)]


def polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def turnable(error: Tensor, factor: Tensor) -> Tensor:
    """The part of an error that turning an orthogonal factor can make up for."""
    if factor.shape[0] > factor.shape[1]:
        return turnable(error.T, factor.T).T
    inner = error @ factor.T
    return error - (inner + inner.T) / 2 @ factor


# ---- the rule


def layer_and_optimizer(
    share: float, shape: tuple[int, int] = (16, 40), seed: int = 0, beta: float = BETA, **format: Any
) -> tuple[LowRankLinear, QGaLoreAdamW8bit]:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    layer = LowRankLinear.from_linear(linear, WeightFormat(**{"bits": 8, "group_size": 32} | format))
    options = {"rank": "full", "direction": "orthogonal", "galore_scale": 1.0, "rounding_feedback": share}
    optimizer = QGaLoreAdamW8bit([{"params": [layer.weight], **options}], lr=LR, betas=(beta, 0.95), seed=seed)
    optimizer.attach(nn.Sequential(layer))
    return layer, optimizer


def update(layer: LowRankLinear, optimizer: QGaLoreAdamW8bit, gradient: Tensor, skip: bool = False) -> None:
    output = layer(torch.eye(layer.in_features))
    optimizer.skip_update_if(torch.tensor(skip))
    output.backward(gradient.T)
    optimizer.step()
    optimizer.zero_grad()


def momentum_of(layer: LowRankLinear, optimizer: QGaLoreAdamW8bit) -> Tensor:
    return moments.read_moment(optimizer.state[layer.weight], "exp_avg").clone()


@pytest.mark.parametrize("storage", [{}, {"bits": 4}, {"simulate": True}, {"stochastic_rounding": False}])
def test_one_update_feeds_its_own_error_once_over_the_next_ones(storage: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(16, 40, generator=generator)
    (plain, without), (layer, optimizer) = (layer_and_optimizer(share, **storage) for share in (0.0, 0.05))
    before = layer.dequantized_weight(torch.float32).clone()
    update(plain, without, gradient)
    update(layer, optimizer, gradient)
    # The update itself is the same; what it lost is in the momentum.
    assert_same_bits(plain.weight.data, layer.weight.data)
    momentum = momentum_of(plain, without)
    direction = orthogonal_directions([(BETA + 1) * (1 - BETA) * gradient])[0]
    error = before - LR * direction - layer.dequantized_weight(torch.float32)
    assert error.norm() > 1e-5
    fed = momentum_of(layer, optimizer) - momentum
    length = ORTHOGONAL_RMS * 40**0.5
    size = float((momentum * direction).sum()) / (length * 16)
    assert size == pytest.approx(float(torch.linalg.svdvals(momentum).mean()), rel=0.15)
    # A momentum keeps beta^(k + 1) of a change in Nesterov's of the k-th update from then on.
    displacement = sum(-LR * length * BETA ** (k + 1) for k in range(1, 500)) * fed / size
    assert fed.norm() < 0.5 * momentum.norm(), "it was cut"
    assert (displacement - 0.05 * error).norm() < 1e-3 * 0.05 * error.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_of_the_momentums_size_turns_its_factor_by_the_error(shape: tuple[int, int]) -> None:
    """Where all singular values are alike, what the rule's derivation asks for is so, for all that turning can do."""
    generator = torch.Generator().manual_seed(3)
    factor, error = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    factor, size, small = polar(factor), 3.0, 1e-5
    turned = (polar(size * factor + small * size * error) - factor) / small
    expected = turnable(error, factor)
    assert (turned - expected).norm() < 1e-3 * expected.norm()
    assert 0.4 * error.norm() ** 2 < expected.norm() ** 2 < 0.9 * error.norm() ** 2


def test_a_change_is_cut_to_a_share_of_the_momentums_norm() -> None:
    layer, optimizer = layer_and_optimizer(1.0, bits=4, stochastic_rounding=False)
    optimizer.param_groups[0]["lr"] = 1e-7
    gradient = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    plain, without = layer_and_optimizer(0.0, bits=4, stochastic_rounding=False)
    without.param_groups[0]["lr"] = 1e-7
    # Off the grid, so that there is an error much larger than a step.
    for each in (layer, plain):
        each.weight_scale.mul_(1.01)  # type: ignore[union-attr]
    update(plain, without, gradient)
    update(layer, optimizer, gradient)
    momentum = momentum_of(plain, without)
    change = momentum_of(layer, optimizer) - momentum
    bound = math.sqrt((1 - BETA**2) / 2) / BETA * momentum.norm()
    assert 0.9 * bound < change.norm() < 1.001 * bound


@pytest.mark.parametrize("beta", [0.8, 0.9, 0.95])
def test_errors_larger_than_many_steps_come_to_half_of_the_momentum(beta: float) -> None:
    """They made it grow by up to a third an update, until it was infinite, where a change could be as large as it."""
    (plain, without), (layer, optimizer) = (
        layer_and_optimizer(share, (24, 96), bits=4, beta=beta) for share in (0.0, 1.0)
    )
    ratios = []
    for number in range(120):
        gradient = torch.randn(24, 96, generator=torch.Generator().manual_seed(number))
        for each, its in ((plain, without), (layer, optimizer)):
            its.param_groups[0]["lr"] = 1e-4
            update(each, its, gradient)
        ratios.append(float(momentum_of(layer, optimizer).norm() / momentum_of(plain, without).norm()))
    assert 1.25 < sum(ratios[60:]) / 60 < 1.7, "the root of two, and more where errors are alike"


@pytest.mark.parametrize("lr", [0.0, 1e-30])
def test_nothing_is_fed_where_nothing_is_stepped(lr: float) -> None:
    layer, optimizer = layer_and_optimizer(1.0)
    optimizer.param_groups[0]["lr"] = lr
    for number in range(3):
        update(layer, optimizer, torch.randn(16, 40, generator=torch.Generator().manual_seed(number)))
    assert momentum_of(layer, optimizer).isfinite().all()


# ---- what it is for


def drift(share: float, shape: tuple[int, int], seed: int, updates: int = 40) -> float:
    """How far a quantized weight is from the float one of the same gradients, root of mean square."""
    layer, optimizer = layer_and_optimizer(share, shape, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    ideal, momentum = layer.dequantized_weight(torch.float32).clone(), torch.zeros(shape)
    lasting = 0.3 * torch.randn(shape, generator=generator)
    for _ in range(updates):
        gradient = lasting + torch.randn(shape, generator=generator)
        momentum = BETA * momentum + (1 - BETA) * gradient
        ideal = ideal - LR * orthogonal_directions([BETA * momentum + (1 - BETA) * gradient])[0]
        update(layer, optimizer, gradient)
    return float((layer.dequantized_weight(torch.float32) - ideal).square().mean().sqrt())


@pytest.mark.parametrize(("shape", "at_most"), [((24, 24), 0.85), ((12, 96), 0.7), ((96, 12), 0.7)])
def test_weights_stay_nearer_to_those_that_are_not_rounded(shape: tuple[int, int], at_most: float) -> None:
    without, half, whole = (sum(drift(share, shape, seed) for seed in range(2)) for share in (0.0, 0.5, 1.0))
    assert whole < half < without and whole < at_most * without


# ---- modes

FEEDBACK = FULL_RANK | {"rounding_feedback": 1.0, "lr": 1e-2}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def test_a_skipped_update_changes_nothing() -> None:
    layer, optimizer = layer_and_optimizer(1.0)
    gradients = [torch.randn(16, 40, generator=torch.Generator().manual_seed(number)) for number in range(2)]
    update(layer, optimizer, gradients[0])
    codes, momentum = layer.weight.data.clone(), momentum_of(layer, optimizer)
    update(layer, optimizer, gradients[1], skip=True)
    assert torch.equal(layer.weight.data, codes) and torch.equal(momentum_of(layer, optimizer), momentum)
    update(layer, optimizer, gradients[1])
    assert not torch.equal(layer.weight.data, codes) and not torch.equal(momentum_of(layer, optimizer), momentum)


def test_a_flag_on_the_device_keeps_weight_and_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not look at the flag."""
    from qgalore.update.finite_checks import UpdateChecks

    monkeypatch.setattr(UpdateChecks, "skip_for_kernels", lambda checks: checks.skip)
    test_a_skipped_update_changes_nothing()


@pytest.mark.parametrize(
    "flags", [{}, {"simulation": True}, {"weight_bits": 4, "cautious_decay": True, "weight_decay": 0.5}]
)
def test_updates_inside_the_backward_pass_are_the_same_updates(small: SmallRun, flags: dict[str, object]) -> None:
    flags = FEEDBACK | {"num_training_steps": 3} | flags
    per_layer = small.run("per_layer", **flags)
    assert_same_run(per_layer, small.run("all", **flags | {"optimizer": "q_galore_adamw8bit"}))
    plain = small.run("plain", **flags | {"rounding_feedback": 0.0})
    assert plain.losses[:2] == per_layer.losses[:2] and plain.losses[2] != per_layer.losses[2]


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(small: SmallRun) -> None:
    flags = FEEDBACK | {"num_training_steps": 5, "batch_size": 2, "grad_accum_dtype": "int8"}
    whole = small.run("whole", **flags)
    small.stop("parts", 3, micro_batch=2, **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


# ---- refusals

ARGV = "--model_config configs/llama_60m.json --batch_size 8 --optimizer q_galore_adamw8bit --recipe orthogonal "
ARGV += "--rounding_feedback 0.5 "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--weight_quant",
            "--rounding_feedback 0.5 feeds errors into a momentum of the weight's shape, and --rank 224 projects it: "
            "give the rank full, or leave it out",
        ),
        (
            "--weight_quant --rank full --mlp_rank 64",
            "--rounding_feedback 0.5 feeds errors into a momentum of the weight's shape, and --mlp_rank 64 projects it",
        ),
        (
            "--rank full --no-weight_quant",
            "--rounding_feedback 0.5 is about quantized weights: leave it or --no-weight_quant out",
        ),
        *(
            (
                f"--weight_quant --rank full --direction {direction}",
                "--rounding_feedback 0.5 is worked out for an orthogonalised momentum, and not for --direction "
                f"{direction}: use the direction orthogonal, or leave one out",
            )
            for direction in ("adam", "normuon")
        ),
        (
            "--weight_quant --rank full --rounding_feedback 2",
            "--rounding_feedback is 2, it must be at least 0 and at most 1",
        ),
    ],
)
def test_what_it_cannot_be_combined_with_is_a_sentence(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_args([*ARGV.split(), *flags.split()])
    assert message in str(error.value)
    assert str(error.value).count("--rounding_feedback") == 1


def test_an_optimizer_refuses_what_it_cannot_feed() -> None:
    linear = LowRankLinear.from_linear(nn.Linear(8, 8, bias=False), WeightFormat())
    options: dict[str, Any] = {"params": [linear.weight], "rank": "full", "rounding_feedback": 1.0}
    with pytest.raises(ValueError, match="is worked out for an orthogonalised momentum, and not for direction='adam'"):
        QGaLoreAdamW8bit([options])
    optimizer = QGaLoreAdamW8bit([options | {"direction": "orthogonal"}])
    with pytest.raises(ValueError, match=r"rounding_feedback=1\.0 is about quantized weights, and .* is float: leave"):
        optimizer.attach(nn.Sequential(linear))
    with pytest.raises(ValueError, match=r"needs a momentum, and betas\[0\] is 0"):
        layer_and_optimizer(1.0, beta=0.0)
    with pytest.raises(ValueError, match=r"rounding_feedback=1\.5 must be at least 0 and at most 1"):
        layer_and_optimizer(1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_host_does_not_wait_and_the_error_is_that_of_the_kernel() -> None:
    layers = []
    for device in ("cpu", "cuda"):
        linear = nn.Linear(256, 64, bias=False, device=device)
        linear.weight.data.copy_(0.05 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
        layer = LowRankLinear.from_linear(linear, WeightFormat(8, 64))
        options = {"rank": "full", "direction": "orthogonal", "galore_scale": 1.0, "rounding_feedback": 1.0}
        optimizer = QGaLoreAdamW8bit([{"params": [layer.weight], **options}], lr=LR, betas=(BETA, 0.95))
        optimizer.attach(nn.Sequential(layer))
        for number in itertools.count():
            gradient = torch.randn(256, 64, generator=torch.Generator().manual_seed(number)).to(device)
            layer(torch.eye(256, device=device)).backward(gradient)
            if number == 4:
                break
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if device == "cuda":  # beside it the direction and what Newton-Schulz leaves
            assert torch.cuda.max_memory_allocated() - before < (BYTES_PER_VALUE + 8) * gradient.numel() + (1 << 20)
        layers.append((layer.dequantized_weight(torch.float32).cpu(), momentum_of(layer, optimizer).cpu()))
    for one, other in zip(*layers, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()
