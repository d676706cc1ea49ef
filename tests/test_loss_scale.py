"""The loss scale: its rule, and an optimizer that sees nothing of it but overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qgalore.update import loss_scale
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.loss_scale import LossScale
from tests.small_run import assert_same_bits
from tests.test_optimizer import batch, build
from tests.test_skipped_updates import snapshot, spoil


def test_the_rule_is_that_of_torch(device: torch.device) -> None:
    """Update by update as in `torch.amp.GradScaler`, over two ways up and one down."""
    scale, (value, made) = LossScale(device), (torch.full((1,), 2.0**16, device=device), torch.zeros(1, device=device))
    made = made.to(torch.int32)
    for update in range(2 * loss_scale.GROWTH_INTERVAL + 20):
        skipped = torch.tensor(update in (3, 4, 11), device=device)
        torch._amp_update_scale_(value, made, skipped.float().view(1), 2.0, 0.5, 2000)
        scale.update_(skipped)
        if update < 20 or update % 1000 > 990 or update % 1000 < 20:
            assert (scale.value.item(), scale.state_dict()["updates_since"]) == (value.item(), made.item())
    assert scale.value == 2.0**15 and scale.inverse == 2.0**-15


def test_it_does_not_fall_below_one_and_says_when_it_cannot_fall() -> None:
    scale = LossScale("cpu")
    for update in range(20):
        assert bool(scale.can_fall()) == (update < 16)
        scale.update_(torch.tensor(True))
    assert scale.value == 1.0


def test_a_scale_that_would_overflow_stays() -> None:
    scale = LossScale("cpu")
    scale.load_state_dict({"scale": 2.0**127, "updates_since": loss_scale.GROWTH_INTERVAL - 1})
    scale.update_(torch.tensor(False))
    assert scale.state_dict() == {"scale": 2.0**127, "updates_since": 0}


def test_a_fixed_scale_stays() -> None:
    scale = LossScale("cpu", 1024)
    scale.update_(torch.tensor(True))
    scale.load_state_dict({"scale": 2.0, "updates_since": 1})
    assert scale.value == 1024 and not scale.can_fall() and scale.state_dict() == {}
    for wrong in (0.5, 2.0**25, float("nan")):
        with pytest.raises(ValueError, match="a fixed loss scale is from 1 to"):
            LossScale("cpu", wrong)


def test_its_tensors_keep_their_addresses(device: torch.device) -> None:
    """CUDA graphs read them there."""
    scale = LossScale(device)
    before = scale.value.data_ptr(), scale.inverse.data_ptr()
    scale.update_(torch.tensor(True, device=device))
    scale.load_state_dict({"scale": 8.0, "updates_since": 1})
    assert (scale.value.data_ptr(), scale.inverse.data_ptr()) == before and scale.inverse == 0.125


MODES: dict[str, dict[str, Any]] = {
    "streaming": {"subspace": "streaming", "direction": "orthogonal"},
    "svd": {"subspace": "svd", "options": {"accumulator_dtype": "bfloat16", "norm_growth": 1.01}},
    "residual": {"subspace": "streaming", "residual": "fira"},
    "int8 sums": {"subspace": "streaming", "options": {"accumulator_dtype": "int8"}},
    "rows": {"subspace": "streaming", "options": {"second_moment": "row", "norm_growth": 1.01}},
}


def train(
    scale: LossScale | None, accumulation: int, clip: bool = False, **mode: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The state after some updates with a scale that moves, and the norm of each gradient."""
    net, optimizer = build("qgalore8bit", "int8", attach=False, **mode)
    optimizer.attach(net, update_in_backward=not clip, loss_scale=scale)
    norms = []
    for update in range(7):
        for micro_step in range(accumulation):
            optimizer.is_last_micro_batch = micro_step == accumulation - 1
            loss = net(batch(accumulation * update + micro_step))
            (loss if scale is None else scale.scaled(loss)).backward()
        if clip:
            optimizer.clip_grad_norm_(2.0)
        optimizer.step()
        norms.append(float(optimizer.grad_norm()))
        assert not optimizer.skipped()
        if scale is not None:
            scale.update_(torch.tensor(update == 3))
        optimizer.zero_grad()
    return snapshot(net, optimizer), norms


@pytest.mark.parametrize(
    ("mode", "accumulation", "clip", "in_kernels"),
    [("streaming", 1, False, False), ("streaming", 2, True, True), ("svd", 1, True, False), ("svd", 2, False, True),
     ("residual", 1, False, True), ("residual", 2, False, False), ("int8 sums", 2, False, False),
     ("rows", 1, False, False), ("rows", 2, True, False)],
)  # fmt: skip
def test_a_power_of_two_changes_no_bit(
    mode: str, accumulation: int, clip: bool, in_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: gradients are scaled up to their update, where moments, clipping and limits see nothing of it."""
    if in_kernels:
        monkeypatch.setattr(UpdateChecks, "skip_for_kernels", lambda checks: checks.skip)
    options = MODES[mode]
    assert_same_bits(train(None, accumulation, clip, **options), train(LossScale("cpu"), accumulation, clip, **options))


def test_an_overflow_leaves_no_trace_and_the_next_update_has_half_the_scale() -> None:
    scale = LossScale("cpu")
    net, optimizer = build("qgalore8bit", "int8", attach=False, subspace="streaming")
    optimizer.attach(net, loss_scale=scale)
    for update in range(5):
        before = snapshot(net, optimizer)
        if update == 2:
            spoil(net, "embed", at_micro_batch=1)
        scale.scaled(net(batch(update))).backward()
        optimizer.step()
        assert bool(optimizer.skipped()) == (update == 2)
        scale.update_(optimizer.skipped())
        same = all(
            torch.equal(value, before[name]) for name, value in snapshot(net, optimizer).items() if name in before
        )
        assert same == (update == 2)
        optimizer.zero_grad()
    assert scale.value == 2.0**15


@pytest.mark.parametrize("mode", ["streaming", "residual"])
def test_float16_trains_about_as_float32_does(mode: str) -> None:
    """The rounding of the weights is stochastic: what differs is noise. Without a scale gradients of 1e-8 are lost."""
    losses: dict[object, float] = {}
    without = [(torch.float16, False)] if mode == "streaming" else []
    for dtype, scaled in [(torch.float32, False), (torch.float16, True), *without]:
        scale = LossScale("cpu") if scaled else None
        options = {"options": {"eps": 1e-15}} | MODES[mode]
        net, optimizer = build("qgalore8bit", "int8", attach=False, dtype=dtype, **options)
        optimizer.attach(net, loss_scale=scale)
        for update in range(15):
            loss = net(batch(update)) * 1e-8
            (loss if scale is None else scale.scaled(loss)).backward()
            optimizer.step()
            if scale is not None:
                scale.update_(optimizer.skipped())
            optimizer.zero_grad()
        with torch.no_grad():
            losses[dtype, scaled] = float(net(batch(99)).double()) / batch(99)[:, 1:].numel()
    assert abs(losses[torch.float16, True] - losses[torch.float32, False]) < 0.05, losses
    assert not without or losses[torch.float16, False] > losses[torch.float16, True] + 0.2, losses


def test_moments_are_rotated_in_float32() -> None:
    """Second moments of 1e-12 are nothing in float16, and a direction over a root of nothing is without bound."""
    net, optimizer = build(
        "galore", "float", attach=False, dtype=torch.float16, subspace="streaming", rotate_moments=True
    )
    scale = LossScale("cpu")
    optimizer.attach(net, loss_scale=scale)
    for update in range(6):
        scale.scaled(net(batch(update)) * 1e-6).backward()
        optimizer.step()
        scale.update_(optimizer.skipped())
        optimizer.zero_grad()
    for weight in optimizer.low_rank_weights():
        assert weight.subspace.schedule.refreshes > 1 and weight.subspace.dtype == torch.float16
        assert 0 < weight.state["exp_avg_sq"].mean() < 1e-8 and (weight.state["exp_avg_sq"] > 0).float().mean() > 0.9


def test_momenta_that_take_gradients_before_the_update_are_refused() -> None:
    net, optimizer = build("qgalore8bit", "int8", attach=False)
    optimizer.param_groups[1]["sum_in_momentum"] = True
    with pytest.raises(ValueError, match="a loss_scale that changes would change what they are worth"):
        optimizer.attach(net, loss_scale=LossScale("cpu"))
