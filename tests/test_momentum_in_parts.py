"""A momentum stored as low-rank factors and a rest of few bits: its error, its bytes, and updates made with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgalore import GaLoreAdamW8bit, QGaLoreAdamW8bit, low_rank_param_groups
from qgalore.config import SubspaceConfig, WeightFormat
from qgalore.layer.conversion import low_rank_linear
from qgalore.layer.quantization import quantize
from qgalore.update.directions import orthogonal_directions
from qgalore.update.momentum_in_parts import PartsFormat

SHAPES = [(96, 160), (160, 96), (64, 64), (97, 130)]
CPU = torch.device("cpu")


def decaying(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by the square of their number, as those of real momenta do about."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return u * torch.arange(1, min(shape) + 1).pow(-2.0) @ vt


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def error_of_direction(found: Tensor, exact: Tensor) -> float:
    return error(*(orthogonal_directions([x])[0] for x in (found, exact)))


def stored(momentum: Tensor, rank: int, bits: int, writes: int = 4) -> tuple[PartsFormat, dict[str, Tensor]]:
    """A state after the same momentum was written some times, which lets the subspace follow."""
    kind, state = PartsFormat((momentum.shape[0], momentum.shape[1]), rank, bits), dict[str, Tensor]()
    kind.init_state(state, 1, CPU)
    for _ in range(writes):
        kind.write(state, momentum.clone())
    return kind, state


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_it_is_nearer_than_naive_four_bits(shape: tuple[int, int]) -> None:
    momentum = decaying(shape)
    naive = error_of_direction(quantize(momentum, bits=4, group_size=128).dequantize(), momentum)
    errors = {bits: error_of_direction(kind.read(state), momentum) for bits in (8, 4, 2, 0)
              for kind, state in [stored(momentum, 8, bits)]}  # fmt: skip
    assert errors[8] < 0.1 * naive and errors[4] < 0.5 * naive
    assert errors[8] < errors[4] < errors[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_bounds_the_error(shape: tuple[int, int]) -> None:
    """Of what the factors leave, 4 bits lose at most a tenth and 2 bits less than a half, whatever the factors lost."""
    momentum = decaying(shape)
    without = {bits: error(kind.read(state), momentum) for bits in (8, 4, 2, 0)
               for kind, state in [stored(momentum, 8, bits)]}  # fmt: skip
    values = torch.linalg.svdvals(momentum)
    best = float(values[8:].norm() / values.norm())
    assert best < without[0] < 1.2 * best + 0.01, "power steps find the top singular directions"
    assert without[8] < 0.02 * without[0] and without[4] < 0.13 * without[0] and without[2] < 0.45 * without[0]


def test_one_power_step_an_update_follows_a_momentum_that_turns() -> None:
    turning = [decaying((96, 128), seed) for seed in range(2)]
    kind, state = stored(turning[0], 8, 0)
    momentum, errors = turning[0], []
    for _ in range(40):
        momentum = 0.9 * momentum + 0.1 * turning[1]
        kind.write(state, momentum.clone())
        best = torch.linalg.svdvals(momentum)
        errors.append(error(kind.read(state), momentum) / float(best[8:].norm() / best.norm()))
    assert max(errors[2:]) < 1.3


@pytest.mark.parametrize("bits", [8, 4, 2, 0])
def test_zeros_and_huge_and_tiny_values_stay_finite(bits: int) -> None:
    exact = decaying((64, 128))
    for factor in (0.0, 1e-15, 1e15):
        kind, state = stored(exact * factor, 8, bits)
        found = kind.read(state)
        assert error(found, exact * factor) < 0.2 if factor else not found.any()
    # And goes on from there: a subspace that was never seen starts from random rows.
    kind, state = stored(torch.zeros(64, 128), 8, bits)
    for _ in range(4):
        kind.write(state, exact.clone())
    assert error(kind.read(state), exact) < 0.2


@pytest.mark.parametrize("bits", [8, 4, 2, 0])
def test_a_skipped_update_keeps_every_bit_and_every_address(bits: int) -> None:
    kind, state = stored(decaying((96, 160)), 8, bits)
    before, addresses = copy.deepcopy(state), {key: value.data_ptr() for key, value in state.items()}
    kind.write(state, torch.full((96, 160), float("nan")), torch.tensor(True))
    assert all(torch.equal(state[key], before[key]) for key in before)
    kind.write(state, decaying((96, 160), 1), torch.tensor(False))
    assert addresses == {key: value.data_ptr() for key, value in state.items()}
    assert not torch.equal(state["exp_avg_left"], before["exp_avg_left"])
    expected = copy.deepcopy(before)
    kind.write(expected, decaying((96, 160), 1))
    assert all(torch.equal(state[key], expected[key]) for key in expected), "a flag changes no bit of an update"


@pytest.mark.parametrize(("bits", "expected"), [(8, 1 + 4 / 256), (4, 1 / 2 + 4 / 128), (2, 1 / 4 + 2 / 128), (0, 0.0)])
def test_bytes_of_a_value(bits: int, expected: float) -> None:
    kind, state = PartsFormat((512, 1024), 32, bits), dict[str, Tensor]()
    kind.init_state(state, 1, torch.device("meta"))
    factors = 32 * (512 + 1024) * (1 + 4 / 256) / (512 * 1024)
    columns = 4 / 512 if bits in (4, 2) else 0
    assert sum(x.nbytes for x in state.values()) / (512 * 1024) == pytest.approx(expected + factors + columns, rel=1e-3)


# ---- in an optimizer


def trained(steps: int = 12, skip: int = -1, **group: object) -> tuple[list[float], nn.Module, GaLoreAdamW8bit]:
    """Losses of a regression through two INT8 layers; the update `skip` is skipped."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(80, 96, bias=False), nn.Tanh(), nn.Linear(96, 64, bias=False))
    for name in ("0", "2"):
        setattr(net, name, low_rank_linear(net.get_submodule(name), WeightFormat(bits=8)))  # type: ignore[arg-type]
    options = {"rank": "full", "direction": "orthogonal", "galore_scale": 0.25} | group
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(net, ["0", "2"], **options), lr=0.05)
    optimizer.attach(net)
    return continued(net, optimizer, range(steps), skip), net, optimizer


def continued(net: nn.Module, optimizer: GaLoreAdamW8bit, steps: range, skip: int = -1) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 80, generator=torch.Generator().manual_seed(step))
        target = torch.sin(x @ torch.randn(80, 64, generator=torch.Generator().manual_seed(99)) / 4)
        loss = (net(x) - target).square().mean()
        optimizer.skip_update_if(torch.tensor(step == skip))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("direction", ["orthogonal", "normuon"])
def test_it_trains_as_a_momentum_in_eight_bits_does(direction: str) -> None:
    whole, *_ = trained(25, direction=direction)
    assert whole[-1] < 0.95 * whole[0]
    for rank, bits in ((8, 4), (0.25, 2)):
        parts, *_ = trained(25, direction=direction, momentum_rank=rank, momentum_rest_bits=bits)
        assert parts[-1] == pytest.approx(whole[-1], rel=0.03)


def test_a_state_goes_on_where_it_was_saved() -> None:
    whole, _, _ = trained(8, momentum_rank=8)
    first, net, optimizer = trained(5, momentum_rank=8)
    _, net2, other = trained(0, momentum_rank=8)
    net2.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert first + continued(net2, other, range(5, 8)) == whole


def test_a_skipped_update_leaves_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, optimizer = trained(3, momentum_rank=8)
    _, _, skipped = trained(4, 3, momentum_rank=8)
    for one, two in zip(optimizer.state.values(), skipped.state.values(), strict=True):
        assert "exp_avg_left" in one
        assert all(torch.equal(one[key], two[key]) for key in one if key != "step")


def test_small_and_narrow_matrices_keep_a_whole_momentum() -> None:
    net = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 512, bias=False))
    groups = low_rank_param_groups(net, ["0", "1", "2"], rank="full", direction="orthogonal", momentum_rank=32)
    optimizer = GaLoreAdamW8bit(groups)
    for _ in range(2):  # of both kinds in one batch
        net(torch.ones(4, 128)).sum().backward()
        optimizer.step()
    states = [optimizer.state[net.get_submodule(name).weight] for name in "012"]
    assert "exp_avg_left" in states[0] and states[1]["exp_avg"].dtype == torch.float32
    assert states[2]["exp_avg"].dtype == torch.uint8 and states[2]["exp_avg_absmax"].any()


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"rank": 8}, "momentum_rank=4 stores the momentum of a full rank in parts, and rank=8 projects it: give the rank"),
    ({"direction": "adam"}, "direction='adam' needs every value of it and a second moment"),
    ({"momentum_rank": 2.5}, "momentum_rank=2.5 must be a whole number of dimensions, or a share of the shorter side"),
    ({"momentum_rank": -1}, "momentum_rank=-1 must be at least 0"),
    ({"momentum_rest_bits": 3}, "momentum_rest_bits=3 is unknown: it must be one of 8, 4, 2, 0"),
    ({"momentum_rank": 0, "momentum_rest_bits": 2}, "momentum_rest_bits=2 is about a momentum in parts: give"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    weight = nn.Parameter(torch.ones(64, 96))
    group = {"rank": "full", "direction": "orthogonal", "momentum_rank": 4} | options
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW8bit([{"params": [weight], **group}])


def test_a_state_of_another_format_is_refused() -> None:
    _, _, optimizer = trained(2, momentum_rank=8)
    for change in (
        lambda state: state.pop("exp_avg_rest"),
        lambda state: state.update(exp_avg_left=state["exp_avg_left"][:4]),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][0])
        _, _, other = trained(0, momentum_rank=8)
        with pytest.raises(ValueError, match=r"does not have the momentum of .* in factors of rank 8"):
            other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({"momentum_rank": 8}, {}, r"has a momentum in parts, and its param group no momentum_rank"),
        ({}, {"momentum_rank": 8}, r"does not have the momentum of"),
        ({"momentum_rank": 8}, {"momentum_rank": 8, "momentum_rest_bits": 0}, r"and a rest in 0 bits"),
        ({"momentum_rank": 8}, {"momentum_rank": 8, "momentum_rest_bits": 8}, r"and a rest in 8 bits"),
    ],
)
def test_a_state_is_not_taken_for_one_of_other_options(
    saved: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    (_, _, optimizer), (_, _, other) = trained(1, **saved), trained(0, **options)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict() | {"param_groups": other.state_dict()["param_groups"]})


def test_a_share_of_the_shorter_side() -> None:
    config = SubspaceConfig(rank="full", direction="normuon", momentum_rank=1 / 16)
    assert [config.momentum_dimensions(shape) for shape in ((512, 1376), (4096, 11008), (8, 64))] == [32, 256, 1]
    assert SubspaceConfig(rank="full").momentum_dimensions((512, 512)) == 0
