"""Block-wise 8-bit Adam: the map and the numbers of bitsandbytes, its rounding, and updates in parts."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.kernels.reference import rows
from qgalore.kernels.reference.adam import dynamic_map
from qgalore.update import moments
from tests.kernels.comparison import adam_step, normal, update_float_

BLOCK = 256
BETAS, EPS = (0.9, 0.995), 1e-8


def new_state(shape: tuple[int, ...], bits: int, device: torch.device) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    moments.init_moments(state, torch.Size(shape), bits, device)
    return state


def quantized(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // BLOCK), device=x.device)
    kernels.quantize_blocks_(codes, absmax, x, signed, BLOCK)
    return codes, absmax


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    expected = functional.create_dynamic_map(signed)
    assert torch.equal(dynamic_map(signed, torch.device("cpu")), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_the_map(signed: bool, device: torch.device) -> None:
    x = normal(3, 700).to(device) ** 5  # over many orders of magnitude
    x = x if signed else x.abs()
    codes, absmax = quantized(x, signed)
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    assert torch.equal(absmax, flat.abs().amax(1))
    scaled = (flat / absmax[:, None]).flatten()[: x.numel(), None]
    values = dynamic_map(signed, device)
    error = (values[codes.flatten().long()][:, None] - scaled).abs().squeeze(1)
    # A second moment above zero is never rounded down to zero; all others by brute force.
    free = torch.ones_like(error, dtype=torch.bool) if signed else codes.flatten() > 1
    assert torch.allclose(error[free], (values - scaled).abs().amin(1)[free], rtol=0, atol=1e-7)
    assert signed or (codes[x > 0] > 0).all()
    restored = kernels.dequantize_blocks(codes, absmax, signed, BLOCK)
    largest = x.abs() == absmax.repeat_interleave(BLOCK)[: x.numel()].view_as(x)
    assert torch.equal(restored[largest & (x > 0)], x[largest & (x > 0)])


def test_zeros_stay_zeros(device: torch.device) -> None:
    state = new_state((2, 3000), 8, device)
    for signed, name in ((True, "exp_avg"), (False, "exp_avg_sq")):
        codes, absmax = quantized(torch.zeros(2, 3000, device=device), signed)
        assert torch.equal(state[name], codes) and torch.equal(state[f"{name}_absmax"], absmax)
        assert (absmax == 0).all()
        assert (kernels.dequantize_blocks(codes, absmax, signed, BLOCK) == 0).all()


def test_blocks_of_another_size_are_refused() -> None:
    codes = torch.empty(2, 300, dtype=torch.uint8)
    for x, blocks in ((torch.zeros(2, 301), 3), (torch.zeros(2, 300), 2)):
        with pytest.raises(ValueError, match=f"{blocks} blocks do not hold x"):
            kernels.quantize_blocks_(codes, torch.empty(blocks), x, True, BLOCK)


LR, DECAY = 1e-2, 0.1
# bitsandbytes' quantizer for the CPU looks a value up by its upper 16 bits, so its code is the nearest but for this
# share of the block's largest magnitude; ours is the nearest.
LOOKUP_ERROR = 2.0**-15


def gradient(shape: tuple[int, int], step: int, spread: bool = True) -> Tensor:
    """With a direction that lasts and, where spread, with values over some orders of magnitude in each block."""
    grad = (normal(*shape, seed=99) + normal(*shape, seed=step)) * 1e-3
    return grad * normal(*shape, seed=7).abs() if spread else grad


def step_of_bitsandbytes(
    functional: ModuleType, weight: Tensor, state: dict[str, Tensor], step: int, spread: bool = True
) -> None:
    shape = (weight.shape[0], weight.shape[1])
    functional.optimizer_update_8bit_blockwise(
        "adam", gradient(shape, step, spread), weight, state["exp_avg"], state["exp_avg_sq"], *BETAS, 0.0, 0.0,
        EPS, step, LR, functional.create_dynamic_map(True), functional.create_dynamic_map(False),
        state["exp_avg_absmax"], state["exp_avg_sq_absmax"], weight_decay=DECAY,
    )  # fmt: skip


def step_of_ours(weight: Tensor, state: dict[str, Tensor], step: int, spread: bool = True) -> None:
    grad = gradient((weight.shape[0], weight.shape[1]), step, spread)
    direction = adam_step(state, grad, step, BETAS, EPS)
    update_float_(weight, direction, None, None, LR, 1 - LR * DECAY, None)


def copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("shape", [(64, 128), (37, 131)], ids=["whole blocks", "ragged block"])
def test_each_step_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight, state = normal(*shape), new_state(shape, 8, torch.device("cpu"))
    for step in range(1, 11):
        our_weight, ours, exact = weight.clone(), copy(state), new_state(shape, 32, torch.device("cpu"))
        for name in moments.MOMENTS:
            moments.write_moment(exact, name, moments.read_moment(state, name))
        step_of_ours(our_weight, ours, step)
        step_of_bitsandbytes(functional, weight, state, step)
        adam_step(exact, gradient(shape, step), step, BETAS, EPS)
        # The weight moves by moments that are not yet rounded to 8 bits, so only float32 rounding differs.
        assert torch.allclose(our_weight, weight, rtol=1e-5, atol=1e-7)
        for name in moments.MOMENTS:
            mine, theirs = moments.read_moment(ours, name), moments.read_moment(state, name)
            absmax = state[f"{name}_absmax"]
            assert torch.allclose(ours[f"{name}_absmax"], absmax, rtol=1e-6, atol=0)
            scale = absmax.repeat_interleave(BLOCK)[: mine.numel()].view_as(mine)
            our_error, their_error = (mine - exact[name]).abs() / scale, (theirs - exact[name]).abs() / scale
            assert (our_error <= their_error + 1e-6).all()
            assert (their_error <= our_error + 1.1 * LOOKUP_ERROR).all()
            # Values that the look-up resolves have the same code but for those half-way between two.
            large = mine.abs() > 0.02 * scale
            assert (ours[name] != state[name])[large].float().mean() < 0.02


@pytest.mark.parametrize("spread", [False, True])
def test_many_steps_stay_with_bitsandbytes(spread: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    shape, device = (64, 128), torch.device("cpu")
    weights = [normal(*shape) for _ in range(3)]
    states = [new_state(shape, bits, device) for bits in (8, 8, 32)]
    for step in range(1, 31):
        step_of_bitsandbytes(functional, weights[0], states[0], step, spread)
        for weight, state in zip(weights[1:], states[1:], strict=True):
            step_of_ours(weight, state, step, spread)
    theirs, ours, exact = (weight - normal(*shape) for weight in weights)
    # The measure is how far its 8 bits lead bitsandbytes from float32. Where a block has values of all sizes, most of
    # that is the error of its look-up in small ones, which ours does not make.
    assert (ours - exact).norm() < 1.05 * (theirs - exact).norm()
    assert (ours - theirs).norm() < (1.05 if spread else 0.5) * (theirs - exact).norm()
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_a_small_second_moment_does_not_make_a_large_step(device: torch.device) -> None:
    # Were it rounded to zero, a first moment over the root of one small gradient would be the step: up to hundreds.
    state = new_state((64, 128), 8, device)
    for step in range(1, 31):
        direction = adam_step(state, gradient((64, 128), step).to(device), step, BETAS, EPS)
        assert direction.abs().max() < 5  # in float32 it stays below 1.4


def test_8bit_stays_near_float32(device: torch.device) -> None:
    shape = (32, 256)
    exact, small = new_state(shape, 32, device), new_state(shape, 8, device)
    for step in range(1, 21):
        grad = (normal(*shape, seed=99) + normal(*shape, seed=step)).to(device)
        expected = adam_step(exact, grad, step, BETAS, EPS)
        found = adam_step(small, grad, step, BETAS, EPS)
    assert 0.001 < float((found - expected).norm() / expected.norm()) < 0.1


def test_step_is_adam(device: torch.device) -> None:
    state = new_state((3, 4), 32, device)
    grads = [normal(3, 4, seed=seed).to(device) for seed in range(4)]
    for step, grad in enumerate(grads, start=1):
        direction = adam_step(state, grad, step, BETAS, EPS)
    first, second = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
    for grad in grads:
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
    expected = first / (1 - BETAS[0] ** 4) / ((second / (1 - BETAS[1] ** 4)).sqrt() + EPS)
    assert torch.allclose(direction, expected, rtol=1e-5)


def test_small_weights_keep_float32_moments(device: torch.device) -> None:
    small, large = new_state((4095,), 8, device), new_state((4096,), 8, device)
    assert small["exp_avg"].dtype == torch.float32 and "exp_avg_absmax" not in small
    assert large["exp_avg"].dtype == large["exp_avg_sq"].dtype == torch.uint8
    assert large["exp_avg_absmax"].shape == (16,)
    held = sum(value.numel() * value.element_size() for value in large.values())
    assert held == 2 * (4096 + 16 * 4)


def test_moments_written_are_read(device: torch.device) -> None:
    for bits in (32, 8):
        # More values than are read or written at a time, and a last block that is not whole.
        for shape in ((16, 300), (3, 400_001)):
            state = new_state(shape, bits, device)
            before = dict(state)
            values = {"exp_avg": normal(*shape).to(device), "exp_avg_sq": normal(*shape, seed=1).to(device).square()}
            tolerance = 0.0 if bits == 32 else 0.05
            for name in moments.MOMENTS:
                moments.write_moment(state, name, values[name])
                read = moments.read_moment(state, name)
                assert torch.allclose(read, values[name], rtol=tolerance, atol=tolerance)
            assert all(state[key] is value for key, value in before.items()), "in place"


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("columns", [256, 512, 300])
def test_step_in_parts_equals_the_whole(
    columns: int, bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = torch.Size((20, columns))
    grad = normal(*shape).to(device)
    whole, parted = new_state(shape, bits, device), new_state(shape, bits, device)
    expected = adam_step(whole, grad, 1, BETAS, EPS)
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 3 * columns)
    parts = moments.row_parts(parted, shape)
    # Rows of 300 values share blocks of 256, so an 8-bit state of them cannot be parted.
    assert len(parts) == (1 if bits == 8 and columns == 300 else 7)
    found = [
        adam_step(moments.rows_of_state(parted, start, stop), grad[start:stop], 1, BETAS, EPS) for start, stop in parts
    ]
    assert torch.equal(torch.cat(found), expected)
    assert all(torch.equal(parted[key], value) for key, value in whole.items())
