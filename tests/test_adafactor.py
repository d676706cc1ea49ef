"""GaLoreAdafactor: Adafactor's updates, in a subspace where a group has a rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor, AdafactorSchedule

from qgalore import GaLoreAdamW, LowRankLinear, WeightFormat, convert_linears, low_rank_param_groups
from qgalore.optimizer.adafactor import AdafactorWeight, GaLoreAdafactor

FIXED: dict[str, Any] = {"lr": 0.02, "relative_step": False, "scale_parameter": False}
NAN = float("nan")


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12))


def inputs(update: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(update))


def train(model: nn.Module, optimizer: Any, updates: range, parts: int = 1) -> None:
    for update in updates:
        for index, part in enumerate(inputs(update).chunk(parts)):
            optimizer.is_last_micro_batch = index + 1 == parts
            (model(part)[:, :6] - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def low_rank(bits: int | None = None, attach: bool = True, **options: Any) -> tuple[Net, GaLoreAdafactor]:
    """`options` of the optimizer, those of the subspace under "subspace"; the gradients are taken in the backward."""
    subspace = {"rank": 4, "update_proj_gap": 3, **options.pop("subspace", {})}
    in_backward = options.pop("in_backward", False)
    model = Net()
    if bits is not None or attach:
        convert_linears(model, ["0", "2"], WeightFormat(bits=bits, group_size=8))
    optimizer = GaLoreAdafactor(low_rank_param_groups(model, ["0", "2"], **subspace), **FIXED | options)
    if attach:
        optimizer.attach(model, update_in_backward=in_backward)
    return model, optimizer


def values(model: nn.Module) -> list[Tensor]:
    found = [x.dequantized_weight(torch.float32) for x in model.modules() if isinstance(x, LowRankLinear)]
    return [tensor.detach().clone() for tensor in [*found, *(p for p in model.parameters() if p.is_floating_point())]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup_init": True},
        FIXED,
        FIXED | {"beta1": 0.9, "weight_decay": 0.1},
        FIXED | {"scale_parameter": True, "weight_decay": 0.1, "clip_threshold": 0.5, "decay_rate": -0.5},
        FIXED | {"scale_parameter": True, "eps": (1e-3, 0.5)},
    ],
)
def test_without_a_rank_it_is_adafactor(options: dict[str, Any]) -> None:
    theirs, ours = Net(), Net()
    train(theirs, Adafactor(theirs.parameters(), **options), range(6))
    train(ours, GaLoreAdafactor(ours.parameters(), **options), range(6))
    for expected, found, start in zip(theirs.parameters(), ours.parameters(), Net().parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(found, start)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_weights_are_not_read_by_the_host(beta1: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scale_parameter the size of each weight stays on its device: a step asks for no number."""
    model, optimizer = low_rank(8, scale_parameter=True, weight_decay=0.1, beta1=beta1)
    train(model, optimizer, range(1))
    before = values(model)
    for weight in optimizer._weights.values():
        monkeypatch.setattr(weight, "rate", None)
    read = AdafactorWeight._size
    made: list[Any] = []

    def size(self: AdafactorWeight) -> Tensor | None:
        found = read(self)
        made.append(NotForTheHost(found) if found is not None else None)
        return made[-1]

    monkeypatch.setattr(AdafactorWeight, "_size", size)
    train(model, optimizer, range(1, 2))
    assert len(made) == 6 and all(type(each) is NotForTheHost for each in made)
    assert not any(torch.equal(*pair) for pair in zip(before, values(model), strict=True))


class NotForTheHost(Tensor):
    """A tensor of which no number may be taken."""

    def __new__(cls, data: Tensor) -> NotForTheHost:
        return data.as_subclass(cls)

    def item(self) -> Any:
        raise AssertionError("a number was read from the device")

    __float__ = __bool__ = item


def test_the_schedule_of_transformers_shows_its_rate() -> None:
    rates = []
    for kind in (Adafactor, GaLoreAdafactor):
        model = Net()
        optimizer = kind(model.parameters(), warmup_init=True)
        schedule = AdafactorSchedule(optimizer)
        for update in range(3):
            model(inputs(update)).square().sum().backward()
            optimizer.step()
            schedule.step()
            rates.append(float(schedule.get_last_lr()[0]))
            optimizer.zero_grad()
    assert rates[:3] == pytest.approx(rates[3:], rel=1e-4) and rates[0] > 0


@pytest.mark.parametrize(("shape", "side"), [((12, 20), 0), ((20, 12), 1)])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_with_a_rank_it_is_adafactor_of_the_projected_gradient(
    shape: tuple[int, int], side: int, beta1: float | None
) -> None:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    group = {"params": [weight], "rank": 5, "update_proj_gap": 1000, "galore_scale": 0.5}
    optimizer = GaLoreAdafactor([group], **FIXED, beta1=beta1)

    def gradient(update: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1 + update))

    weight.grad = gradient(0)
    optimizer.step()  # the basis that stays is found in the first update
    (low_rank,) = optimizer.low_rank_weights()
    basis = low_rank.subspace.bases(torch.float32)[side]
    assert basis is not None

    def project(grad: Tensor) -> Tensor:
        return basis @ grad if side == 0 else grad @ basis.T

    oracle = nn.Parameter(torch.zeros_like(project(weight.detach())))
    reference = Adafactor([oracle], **FIXED, beta1=beta1)
    moments = {name: value.clone() for name, value in optimizer.state[weight].items() if name.startswith("exp_avg")}
    assert moments.keys() == {"exp_avg_sq_row", "exp_avg_sq_col"} | ({"exp_avg"} if beta1 else set())
    reference.state[oracle] = {"step": 1, "RMS": 0, **moments}
    start = weight.detach().clone()
    for update in range(1, 4):
        weight.grad, oracle.grad = gradient(update), project(gradient(update))
        optimizer.step()
        reference.step()
    moved = oracle.detach()
    back = basis.T @ moved if side == 0 else moved @ basis
    torch.testing.assert_close(weight.detach() - start, 0.5 * back, atol=1e-5, rtol=1e-4)


def test_states_are_rows_and_columns_of_the_projected_gradient() -> None:
    model, optimizer = low_rank()
    train(model, optimizer, range(1))
    state = optimizer.state[optimizer.param_groups[1]["params"][0]]  # (16, 8) projected to (16, 4)
    assert {name: tuple(value.shape) for name, value in state.items() if name.startswith("exp_avg")} == {
        "exp_avg_sq_row": (16,), "exp_avg_sq_col": (4,),
    }  # fmt: skip
    bias = optimizer.state[next(p for p in model.parameters() if p.shape == (16,))]
    assert bias["exp_avg_sq"].shape == (16,) and "exp_avg" not in bias


def test_a_new_basis_turns_the_moments_on_its_side() -> None:
    _, optimizer = low_rank(attach=False, beta1=0.9, subspace={"proj_type": "left"})
    weight = next(optimizer.low_rank_weights())
    weight.init_state()
    for name in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"):
        weight.state[name].copy_(torch.rand(weight.state[name].shape))
    order, before = torch.tensor([2, 0, 3, 1]), {name: value.clone() for name, value in weight.state.items()}
    change = torch.eye(4)[order] * torch.tensor([1.0, -1.0, 1.0, -1.0])  # other signs say nothing of the squares
    weight.rotate_moments(change, "left", torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in weight.state.items())
    weight.rotate_moments(change, "left", None)
    assert torch.equal(weight.state["exp_avg_sq_row"], before["exp_avg_sq_row"][order])
    assert torch.equal(weight.state["exp_avg_sq_col"], before["exp_avg_sq_col"])
    assert torch.equal(weight.state["exp_avg"], change @ before["exp_avg"])


@pytest.mark.parametrize("shape", [(), (1,), (4, 3, 3, 3), (2, 3, 4)])
def test_parameters_of_any_shape_train(shape: tuple[int, ...]) -> None:
    start = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = Adafactor([theirs]), GaLoreAdafactor([ours])
    for update in range(3):
        theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(update))
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    ("beta1", "subspace"), [(None, {}), (0.9, {"subspace": "streaming"}), (None, {"proj_type": "full"})]
)
def test_it_trains_layers_and_goes_on_bit_for_bit(
    bits: int | None, in_backward: bool, beta1: float | None, subspace: dict[str, Any]
) -> None:
    options = {"bits": bits, "beta1": beta1, "subspace": subspace, "in_backward": in_backward}
    whole, optimizer = low_rank(**options)  # type: ignore[arg-type]
    before = values(whole)
    train(whole, optimizer, range(5))
    assert all(not torch.equal(old, new) for old, new in zip(before, values(whole), strict=True))
    resumed, other = low_rank(**options)  # type: ignore[arg-type]
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((whole, optimizer), (resumed, other)):
        train(model, each, range(5, 10))
    assert all(torch.equal(old, new) for old, new in zip(values(whole), values(resumed), strict=True))


@pytest.mark.parametrize("attach", [False, True])
def test_micro_batches_make_one_update(attach: bool) -> None:
    found = []
    for parts in (1, 2):
        model, optimizer = low_rank(attach=attach)
        train(model, optimizer, range(4), parts)
        found.append(values(model))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_a_gradient_that_is_not_finite_changes_nothing(beta1: float | None) -> None:
    model, optimizer = low_rank(attach=False, beta1=beta1)
    train(model, optimizer, range(3))
    before = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    model(inputs(3)).sum().backward()
    next(model.parameters()).grad[0, 0] = NAN  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped()
    assert all(torch.equal(old, new) for old, new in zip(before[0], values(model), strict=True))
    for index, state in optimizer.state_dict()["state"].items():
        moments = [name for name in state if name.startswith("exp_avg")]
        assert moments and all(torch.equal(state[name], before[1][index][name]) for name in moments)


def test_low_precision_weights_train() -> None:
    model = Net().bfloat16()
    optimizer = GaLoreAdafactor(model.parameters(), **FIXED)
    before = values(model)
    for update in range(3):
        model(inputs(update).bfloat16()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(old, new) for old, new in zip(before, values(model), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "lr=0.1 with relative_step=True, which finds the rate itself: set relative_step=False"),
        ({"relative_step": False}, "lr=None with relative_step=False must be a finite number, at least 0"),
        (FIXED | {"lr": NAN}, "lr=nan with relative_step=False must be a finite number"),
        (FIXED | {"warmup_init": True}, "warmup_init=True is about the rate of relative_step=True"),
        (FIXED | {"eps": 1e-8}, "eps=1e-08 must be two finite numbers"),
        (FIXED | {"eps": (1e-30, NAN)}, r"eps=\(1e-30, nan\) must be two finite numbers"),
        (FIXED | {"beta1": 1.0}, "beta1=1.0 must be None or a number, at least 0 and less than 1"),
        (FIXED | {"clip_threshold": 0.0}, "clip_threshold=0.0 must be a finite number, more than 0"),
        (FIXED | {"decay_rate": 0.8}, "decay_rate=0.8 must be a finite number, less than 0"),
        (FIXED | {"weight_decay": -0.1}, "weight_decay=-0.1 must be a finite number, at least 0"),
        (FIXED | {"group": {"weight_decay": NAN}}, "weight_decay=nan must be a finite number, at least 0"),
        (FIXED | {"group": {"rank": 2, "subspace": "streaming"}}, "beta1=None keeps none: give beta1, or svd"),
        (FIXED | {"group": {"rank": 2, "direction": "orthogonal"}}, "direction='orthogonal' has no second moment"),
        (FIXED | {"group": {"rank": 5}}, r"rank=5 is larger than the (left|right) side"),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    group = {"params": [nn.Parameter(torch.ones(4, 4))], **options.get("group", {})}
    with pytest.raises(ValueError, match=message):
        GaLoreAdafactor([group], **{name: value for name, value in options.items() if name != "group"})


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameter = [nn.Parameter(torch.ones(4, 4))]
    adam, adafactor, moving = GaLoreAdamW(parameter), GaLoreAdafactor(parameter), GaLoreAdafactor(parameter, beta1=0.9)
    for optimizer in (adam, adafactor, moving):
        parameter[0].grad = torch.ones(4, 4)
        optimizer.step()
    with pytest.raises(ValueError, match="lacks beta1, clip_threshold"):
        adafactor.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="lacks betas"):
        adam.load_state_dict(adafactor.state_dict())
    state = moving.state_dict()
    with pytest.raises(ValueError, match=r"gradient of shape \(4, 4\) under Adafactor with beta1=None"):
        adafactor.load_state_dict({**state, "param_groups": adafactor.state_dict()["param_groups"]})
