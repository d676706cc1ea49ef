"""The optimizers: plain AdamW, every mode trains everything, accumulation, updates inside the backward, state."""

import copy
import gc
import io
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qgalore import (
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LowRankLinear,
    QGaLoreAdamW8bit,
    WeightFormat,
    convert_linears,
    linear_names,
    low_rank_param_groups,
)
from qgalore.optimizer import LowRankAdamW
from qgalore.subspace import fit
from qgalore.update import moments
from qgalore.update.weight import HOST_STATE, Weight

VOCABULARY, HIDDEN, MLP, LENGTH = 13, 24, 40, 6
CLASSES: dict[str, type[LowRankAdamW]] = {
    "galore": GaLoreAdamW,
    "galore8bit": GaLoreAdamW8bit,
    "qgalore8bit": QGaLoreAdamW8bit,
}
FORMATS: dict[str, WeightFormat | None] = {
    "plain": None,  # nn.Linear as it is
    "float": WeightFormat(),
    "int8": WeightFormat(bits=8),
    "int4": WeightFormat(bits=4),
    "simulated": WeightFormat(bits=8, simulate=True),
}
SUBSPACES = [
    *itertools.product(["svd"], ["std", "reverse_std", "left", "right", "full"]),
    *itertools.product(["streaming"], ["std", "reverse_std", "left", "right"]),
]


# Each class with the storages that differ for it, where all of them would take too long.
PAIRS = [
    ("galore", "plain"), ("galore", "simulated"), ("galore8bit", "float"), ("galore8bit", "int8"),
    ("qgalore8bit", "plain"), ("qgalore8bit", "int8"), ("qgalore8bit", "int4"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _8bit_states_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MIN_8BIT_NUMEL", 0)


class Layer(nn.Module):
    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.self_attn = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, mlp, bias=False), nn.SiLU(), nn.Linear(mlp, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x)).tanh()
        return x + self.mlp(x)


class Net(nn.Module):
    """Token ids (B, L) -> the summed loss of guessing each next token."""

    def __init__(self, hidden: int = HIDDEN, mlp: int = MLP, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.Sequential(*(Layer(hidden, mlp) for _ in range(depth)))
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embed(tokens[:, :-1])))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def batch(update: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + update)
    start = torch.randint(0, VOCABULARY, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def build(
    name: str = "galore",
    storage: str = "float",
    *,
    attach: bool = True,
    update_in_backward: bool = False,
    hidden: int = HIDDEN,
    mlp: int = MLP,
    depth: int = 1,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
    **low_rank: Any,
) -> tuple[Net, LowRankAdamW]:
    net = Net(hidden, mlp, depth).to(dtype)
    names, format = linear_names(net), FORMATS[storage]
    assert len(names) == 3 * depth
    if format is not None:
        convert_linears(net, names, format)
    groups = low_rank_param_groups(net, names, **({"rank": 4, "update_proj_gap": 2} | low_rank))
    optimizer = CLASSES[name](groups, **({"lr": 0.02} | (options or {})))
    if attach:
        optimizer.attach(net, update_in_backward=update_in_backward)
    return net, optimizer


def backward(net: nn.Module, optimizer: torch.optim.Optimizer, update: int, accumulation: int = 1) -> float:
    tokens, total = batch(update), 0.0
    for number, part in enumerate(tokens.chunk(accumulation), start=1):
        if isinstance(optimizer, LowRankAdamW):
            optimizer.is_last_micro_batch = number == accumulation
        loss = net(part) / (tokens.shape[0] * (LENGTH - 1))
        loss.backward()
        total += float(loss.detach())
    return total


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, updates: range, accumulation: int = 1, clip: float = 0.0
) -> list[float]:
    losses = []
    for update in updates:
        losses.append(backward(net, optimizer, update, accumulation))
        if clip and isinstance(optimizer, LowRankAdamW):
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def values(net: nn.Module) -> dict[str, Tensor]:
    """All weights by name, quantized ones dequantized."""
    found = {name: value.detach().clone() for name, value in net.named_parameters()}
    for name, module in net.named_modules():
        if isinstance(module, LowRankLinear):
            found[f"{name}.weight"] = module.dequantized_weight(torch.float32).detach().clone()
    return found


def assert_same(net: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name


def assert_near(net: nn.Module, other: nn.Module, tolerance: float) -> None:
    expected = values(other)
    for name, value in values(net).items():
        assert (value - expected[name]).abs().max() <= tolerance, name


# ---- plain AdamW


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_full_rank_is_that_of_torch(decoupled: bool, attach: bool) -> None:
    net, other = Net(), Net()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = GaLoreAdamW(net.parameters(), decoupled_weight_decay=decoupled, **options)
    if attach:
        optimizer.attach(net)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    losses = train(net, optimizer, range(20))
    expected = train(other, kind(other.parameters(), **options), range(20))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_near(net, other, 1e-5)
    assert expected[-1] < 0.7 * expected[0]


def test_a_scalar_parameter_trains() -> None:
    parameters = [nn.Parameter(torch.tensor(2.0)) for _ in range(2)]
    optimizers = [GaLoreAdamW([parameters[0]], lr=0.1), torch.optim.AdamW([parameters[1]], lr=0.1, weight_decay=0.0)]
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            (parameter**2).backward()
            optimizer.step()
    assert parameters[0].item() == pytest.approx(parameters[1].item(), abs=1e-6)


@pytest.mark.parametrize("storage", ["plain", "int8"])
@pytest.mark.parametrize("direction", ["adam", "orthogonal"])
def test_the_whole_space_needs_no_projection_and_no_refresh(direction: str, storage: str) -> None:
    whole = {"rank": "full", "update_proj_gap": 200, "direction": direction}
    net, optimizer = build("qgalore8bit", storage, options={"lr": 0.01}, **whole)
    before = values(net)
    losses = train(net, optimizer, range(12))
    weights = list(optimizer.low_rank_weights())
    assert weights and all(weight.state["exp_avg"].shape == weight.shape for weight in weights)
    assert not any("basis" in key or key == "schedule" for weight in weights for key in weight.state)
    assert losses[-1] < losses[0] and not any(torch.equal(value, before[name]) for name, value in values(net).items())


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_whole_basis_is_full_rank_with_a_scaled_rate(proj_type: str) -> None:
    # With the identity as basis the projected gradient is the gradient.
    shape = (12, 12)
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    other = nn.Parameter(weight.detach().clone())
    group = {"params": [weight], "rank": 12, "scale": 0.25, "proj_type": proj_type}
    optimizer = GaLoreAdamW([group], lr=0.1, weight_decay=0.0)
    (low_rank,) = optimizer.low_rank_weights()
    low_rank.init_state()
    for side in low_rank.subspace.sides:
        low_rank.state[f"{side}_basis"] = torch.eye(12)
    low_rank.subspace.schedule.next_refresh = 10**9
    expected = torch.optim.AdamW([other], lr=0.025, weight_decay=0.0)
    for step in range(10):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        weight.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        expected.step()
    assert torch.allclose(weight, other, atol=1e-6)


def test_weight_decay_is_decoupled_from_the_projection() -> None:
    weight = nn.Parameter(torch.ones(8, 12))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(8, 12)
    optimizer.step()
    assert torch.allclose(weight, torch.full((8, 12), 0.95))


def test_l2_of_a_low_rank_weight_is_applied_or_refused() -> None:
    weight = nn.Parameter(torch.ones(8, 12))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": False}
    try:
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], **options)
    except ValueError as error:
        assert "decoupled_weight_decay" in str(error)
        return
    weight.grad = torch.zeros(8, 12)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(8, 12)), "a weight decay that does nothing"


# ---- every mode trains everything


@pytest.mark.parametrize(("subspace", "proj_type"), SUBSPACES)
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_changes_after_one_update(name: str, storage: str, subspace: str, proj_type: str) -> None:
    ways = [(False, 1), (True, 4)] if proj_type != "std" else itertools.product([False, True], [1, 4])
    for update_in_backward, accumulation in ways:
        net, optimizer = build(
            name, storage, update_in_backward=update_in_backward, subspace=subspace, proj_type=proj_type
        )
        before = values(net)
        backward(net, optimizer, 0, accumulation)
        assert all(parameter.grad is None for parameter in net.parameters())
        optimizer.step()
        for key, value in values(net).items():
            assert not torch.equal(value, before[key]), f"{key}, {update_in_backward=}, {accumulation=}"
            assert value.isfinite().all()


ELSEWHERE: dict[str, dict[str, Any]] = {
    "svd": {},
    "streaming": {"subspace": "streaming"},
    "two sides": {"proj_type": "full"},
    "full rank": {"rank": "full", "direction": "normuon", "update_proj_gap": None},
    "in parts": {"rank": "full", "direction": "orthogonal", "momentum_rank": 2, "update_proj_gap": None},
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize(("name", "storage"), PAIRS)
def test_torchs_default_device_changes_nothing(name: str, storage: str, case: str) -> None:
    """Scripts set it to a GPU; what is on no device here would be on that one. "meta" has no values to be wrong."""
    flags = {key: value for key, value in ({"update_proj_gap": 2} | ELSEWHERE[case]).items() if value is not None}
    low_rank = flags if "rank" in flags else {"rank": 4} | flags

    def trained(device: str) -> tuple[Net, LowRankAdamW]:
        net = Net()
        if FORMATS[storage] is not None:
            convert_linears(net, linear_names(net), FORMATS[storage])
        optimizer = CLASSES[name](low_rank_param_groups(net, linear_names(net), **low_rank), lr=0.02)
        batches = [batch(update) for update in range(4)]
        with torch.device(device):
            optimizer.attach(net, update_in_backward=True)
            for tokens in batches:
                net(tokens).backward()
                optimizer.step()
                assert optimizer.grad_norm().isfinite() and not optimizer.skipped()
                optimizer.load_state_dict(optimizer.state_dict())
        return net, optimizer

    assert_same(trained("meta")[0], trained("cpu")[0])


@pytest.mark.parametrize("after_attach", [False, True])
@pytest.mark.parametrize("storage", ["plain", "float", "simulated"])
def test_a_frozen_weight_stays_and_trains_when_it_is_free(storage: str, after_attach: bool) -> None:
    net, optimizer = build(storage=storage, attach=False)
    frozen = net.layers[0].self_attn.weight
    if after_attach:
        optimizer.attach(net)
    frozen.requires_grad_(False)
    if not after_attach:
        optimizer.attach(net)
    before = frozen.detach().clone()
    train(net, optimizer, range(2))
    assert torch.equal(frozen, before)
    frozen.requires_grad_()
    train(net, optimizer, range(2, 4))
    assert not torch.equal(frozen, before)


@pytest.mark.parametrize("subspace", ["svd", "streaming"])
@pytest.mark.parametrize(("name", "storage"), PAIRS)
def test_every_mode_learns(name: str, storage: str, subspace: str) -> None:
    net, optimizer = build(name, storage, update_in_backward=True, subspace=subspace, scale=1.0)
    losses = train(net, optimizer, range(20))
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_8bit_states_are_used_for_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MIN_8BIT_NUMEL", 4096)
    net, optimizer = build("galore8bit", hidden=48, mlp=96, rank=48)
    train(net, optimizer, range(2))
    dtypes = {
        name: optimizer.state[parameter]["exp_avg"].dtype
        for name, parameter in net.named_parameters()
        if "weight" in name
    }
    assert dtypes["layers.0.mlp.0.weight"] == torch.uint8  # 48 x 96 = 4608 values
    assert dtypes["layers.0.self_attn.weight"] == dtypes["layers.0.norm.weight"] == torch.float32


@pytest.mark.parametrize(("proj_type", "side", "gradient"), [
    ("std", "right", (40, 4)), ("reverse_std", "left", (4, 24)), ("left", "left", (4, 24)), ("right", "right", (40, 4)),
])  # fmt: skip
def test_projected_side(proj_type: str, side: str, gradient: tuple[int, int]) -> None:
    net, optimizer = build(proj_type=proj_type)
    train(net, optimizer, range(1))
    state = optimizer.state[net.layers[0].mlp[0].weight]  # (40, 24)
    assert f"{side}_basis" in state and state["exp_avg"].shape == gradient
    assert state[f"{side}_basis"].shape == (4, 40 if side == "left" else 24)


def test_projections_are_packed() -> None:
    net, optimizer = build("qgalore8bit", "int8", proj_type="left")
    train(net, optimizer, range(1))
    state = optimizer.state[net.layers[0].mlp[0].weight]
    assert state["left_basis"].dtype == torch.uint8 and state["left_basis"].shape == (4, 20)
    assert state["left_basis_scale"].dtype == state["left_basis_zero_point"].dtype == torch.bfloat16


# ---- equal ways to the same update


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
@pytest.mark.parametrize("storage", ["plain", "float"])
def test_the_split_into_micro_batches_changes_nothing(storage: str, subspace: str, update_in_backward: bool) -> None:
    nets = []
    for accumulation in (1, 2, 4):
        # A large eps keeps Adam from blowing the rounding of tiny gradients up to whole steps.
        net, optimizer = build(
            "galore", storage, update_in_backward=update_in_backward, subspace=subspace, options={"eps": 1e-3}
        )
        train(net, optimizer, range(8), accumulation)  # with refreshes inside
        assert all(weight.subspace.schedule.refreshes >= 2 for weight in optimizer.low_rank_weights())
        nets.append(net)
    assert_near(nets[1], nets[0], 2e-4)
    assert_near(nets[2], nets[0], 2e-4)


def test_the_split_changes_a_quantized_weight_by_rounding_alone() -> None:
    nets = []
    for accumulation in (1, 4):
        net, optimizer = build("qgalore8bit", "int8", update_in_backward=True, options={"eps": 1e-3})
        train(net, optimizer, range(3), accumulation)
        nets.append(net)
    for key, value in values(nets[0]).items():
        difference = (value - values(nets[1])[key]).abs()
        assert float((difference > 1e-4).float().mean()) < 0.03, key
        assert difference.max() < 0.01, key  # two steps of the grid


@pytest.mark.parametrize("subspace", ["svd", "streaming"])
@pytest.mark.parametrize("name", CLASSES)
def test_attached_equals_unattached(name: str, subspace: str) -> None:
    for storage, exact in (("plain", True), ("float", False)):
        attached, optimizer = build(name, storage, subspace=subspace, options={"eps": 1e-3})
        train(attached, optimizer, range(8))
        alone, optimizer = build(name, storage, attach=False, subspace=subspace, options={"eps": 1e-3})
        train(alone, optimizer, range(8))
        if exact:
            assert_same(attached, alone)
        else:  # the projected gradient is summed in another order
            assert_near(attached, alone, 2e-4 if name != "qgalore8bit" else 5e-3)


@pytest.mark.parametrize(("subspace", "accumulation"), [("svd", 2), ("streaming", 1)])
@pytest.mark.parametrize(("name", "storage"), PAIRS)
def test_updates_in_backward_equal_ordinary_ones(name: str, storage: str, subspace: str, accumulation: int) -> None:
    nets = []
    for update_in_backward in (False, True):
        net, optimizer = build(name, storage, update_in_backward=update_in_backward, subspace=subspace)
        train(net, optimizer, range(5), accumulation)
        nets.append(net)
    assert_same(*nets)


@pytest.mark.parametrize("subspace", ["svd", "streaming"])
def test_updates_in_backward_leave_norms_and_biases_for_step(subspace: str) -> None:
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=True, subspace=subspace)
    start = copy.deepcopy(net.state_dict())
    backward(net, optimizer, 0)
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    low_rank = {id(param) for group in optimizer.param_groups if "rank" in group for param in group["params"]}
    small = {name for name, param in net.named_parameters() if id(param) not in low_rank}
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == small
    assert all(torch.equal(before[name], start[name]) for name in small)
    assert not all(torch.equal(before[name], value) for name, value in start.items())


def test_forgetting_gradients_before_step_is_said_where_a_part_of_the_update_is_made() -> None:
    """Such a loop, without `step`, would train all but norms and biases."""
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(net, optimizer, 0)
        optimizer.step()
        optimizer.zero_grad()
        backward(net, optimizer, 1)
        with pytest.raises(UserWarning, match=r"norms and biases, which step\(\) updates, have not"):
            optimizer.zero_grad()
        net, optimizer = build("qgalore8bit", "int8")
        backward(net, optimizer, 0)
        optimizer.zero_grad()


def full_size_floats(net: Net) -> list[Tensor]:
    """Float tensors as large as an MLP matrix that are no weights."""
    own = {value.data_ptr() for value in net.state_dict().values()}
    found = [value for value in gc.get_objects() if type(value) is Tensor and value.is_floating_point()]
    shapes = {(MLP, HIDDEN), (HIDDEN, MLP)}
    return [value for value in found if tuple(value.shape) in shapes and value.data_ptr() not in own]


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_only_projected_gradients_are_kept_between_micro_batches(storage: str, update_in_backward: bool) -> None:
    net, optimizer = build("qgalore8bit", storage, update_in_backward=update_in_backward, update_proj_gap=1000)
    train(net, optimizer, range(8), 2)
    known = {id(value) for value in full_size_floats(net)}
    optimizer.is_last_micro_batch = False
    for part in batch(8).chunk(2):
        net(part).backward()
    assert not [value for value in full_size_floats(net) if id(value) not in known]
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("accumulator_dtype", ["bfloat16", "int8"])
def test_sums_of_gradients_may_be_smaller(accumulator_dtype: str) -> None:
    exact, small = (
        build("galore", options={"accumulator_dtype": kind, "eps": 1e-3}) for kind in ("float32", accumulator_dtype)
    )
    expected, losses = train(*exact, range(8), 4), train(*small, range(8), 4)
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("storage", ["plain", "float", "int8"])
def test_a_backward_pass_after_the_last_is_refused_and_not_lost(storage: str, update_in_backward: bool) -> None:
    net, optimizer = build(storage=storage, update_in_backward=update_in_backward)
    net(batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"head\.weight got another gradient .*is_last_micro_batch = False"):
        net(batch(1)).backward()
    optimizer.zero_grad()
    train(net, optimizer, range(2))


def test_a_layer_of_several_reentrant_checkpoints_gets_the_sum_of_its_gradients() -> None:
    trained = []
    for attach in (False, True):
        net, optimizer = build(storage="float", attach=attach)
        optimizer.is_last_micro_batch = False
        x = net.embed(batch(0))
        for _ in range(3):
            x = checkpoint(net.layers[0], x, use_reentrant=True)
        net.head(x).square().mean().backward()
        optimizer.step()
        trained.append(net)
    assert_near(*trained, 1e-5)


def test_a_weight_reached_in_an_early_micro_batch_alone_is_updated() -> None:
    for update_in_backward in (False, True):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        optimizer = GaLoreAdamW(net.parameters(), lr=0.1)
        optimizer.attach(net, update_in_backward=update_in_backward)
        before = net[0].weight.detach().clone()
        optimizer.is_last_micro_batch = False
        net(torch.ones(2, 8)).sum().backward()
        optimizer.is_last_micro_batch = True
        net[1](torch.ones(2, 8)).sum().backward()
        optimizer.step()
        assert not torch.equal(net[0].weight, before), "as with one expert of several"


# ---- clipping and schedules


@pytest.mark.parametrize("attach", [False, True])
def test_clipping_scales_all_gradients(attach: bool) -> None:
    # Where eps is large, a step is proportional to its gradient, so that a scale shows.
    options: dict[str, Any] = {"lr": 1e3, "eps": 1e3}
    clipped, plain = Net(), Net()
    optimizer, other = GaLoreAdamW(clipped.parameters(), **options), GaLoreAdamW(plain.parameters(), **options)
    if attach:
        optimizer.attach(clipped)
    start = values(plain)
    train(clipped, optimizer, range(1), clip=0.1)
    backward(plain, other, 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert norm > 0.2
    other.step()
    assert float(other.grad_norm()) == pytest.approx(float(norm), rel=1e-5)
    for key, value in values(clipped).items():
        wanted = (values(plain)[key] - start[key]) * (0.1 / norm)
        assert torch.allclose(value - start[key], wanted, rtol=1e-2, atol=1e-6), key


def test_a_small_gradient_is_not_clipped() -> None:
    net, optimizer = build()
    other, other_optimizer = build()
    train(net, optimizer, range(3), clip=1e6)
    train(other, other_optimizer, range(3))
    assert_near(net, other, 1e-7)


def test_norm_is_that_of_this_update_alone() -> None:
    net, optimizer = build()
    backward(net, optimizer, 0)
    first = float(optimizer.grad_norm())
    assert first > 0
    optimizer.step()
    optimizer.zero_grad()
    backward(net, optimizer, 1)
    fresh, fresh_optimizer = build()
    train(fresh, fresh_optimizer, range(1))
    backward(fresh, fresh_optimizer, 1)
    assert float(optimizer.grad_norm()) == float(fresh_optimizer.grad_norm())


def test_an_update_that_is_given_up_leaves_no_trace() -> None:
    net, optimizer = build()
    other, other_optimizer = build()
    (net(batch(5)) * float("nan")).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    train(net, optimizer, range(4), clip=1.0)
    train(other, other_optimizer, range(4), clip=1.0)
    assert_same(net, other)


def test_clipping_is_refused_where_updates_are_made_already() -> None:
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=True)
    backward(net, optimizer, 0)
    with pytest.raises(RuntimeError, match="needs all gradients at once: attach with update_in_backward=False"):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_learning_rate_schedules_of_torch_work(update_in_backward: bool) -> None:
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=update_in_backward)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: float(update % 2))
    for update in range(4):
        before = values(net)
        train(net, optimizer, range(update, update + 1))
        changed = [key for key, value in values(net).items() if not torch.equal(value, before[key])]
        assert len(changed) == (len(before) if update % 2 else 0)
        schedule.step()


def test_step_calls_a_closure() -> None:
    net, optimizer = build(attach=False)

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(batch(0))
        loss.backward()
        return float(loss.detach())

    before = values(net)
    loss = optimizer.step(closure)
    assert loss is not None and loss > 0
    assert all(not torch.equal(value, before[key]) for key, value in values(net).items())


# ---- state


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize(("subspace", "update_in_backward"), [("svd", False), ("streaming", True)])
@pytest.mark.parametrize(("name", "storage"), PAIRS)
def test_ten_updates_and_ten_more_equal_twenty(
    name: str, storage: str, subspace: str, update_in_backward: bool
) -> None:
    options: dict[str, Any] = {
        "update_in_backward": update_in_backward, "subspace": subspace, "queue_size": 2, "cos_threshold": 0.1,
    }  # fmt: skip
    whole, whole_optimizer = build(name, storage, **options)
    train(whole, whole_optimizer, range(20))
    half, half_optimizer = build(name, storage, **options)
    train(half, half_optimizer, range(10))
    again, again_optimizer = build(name, storage, **options)
    again.load_state_dict(round_trip(half.state_dict()))
    again_optimizer.load_state_dict(round_trip(half_optimizer.state_dict()))
    train(again, again_optimizer, range(10, 20))
    assert_same(again, whole)
    for parameter, other in zip(whole.parameters(), again.parameters(), strict=True):
        expected, found = whole_optimizer.state[parameter], again_optimizer.state[other]
        assert expected.keys() == found.keys()
        assert all(
            torch.equal(value, found[key]) and value.dtype == found[key].dtype for key, value in expected.items()
        )
    if subspace == "svd":
        assert any(weight.subspace.schedule.saved for weight in again_optimizer.low_rank_weights())


@pytest.mark.parametrize("name", CLASSES)
def test_state_is_tensors_alone_and_keeps_its_dtypes(name: str) -> None:
    net, optimizer = build(name, dtype=torch.bfloat16, hidden=48, mlp=96, rank=48)
    train(net, optimizer, range(3))
    state = optimizer.state_dict()["state"]
    assert len(state) == len(list(net.parameters()))
    assert all(type(value) is Tensor for entries in state.values() for value in entries.values())
    other, again = build(name, dtype=torch.bfloat16, hidden=48, mlp=96, rank=48)
    again.load_state_dict(round_trip(optimizer.state_dict()))
    for parameter, original in zip(other.parameters(), net.parameters(), strict=True):
        for key, value in optimizer.state[original].items():
            loaded = again.state[parameter][key]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), key
            assert key not in ("exp_avg", "exp_avg_sq") or value.dtype in (torch.float32, torch.uint8)


def test_loaded_state_is_not_shared() -> None:
    net, optimizer = build()
    train(net, optimizer, range(2))
    other, again = build()
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    before = copy.deepcopy(saved)
    train(other, again, range(3))
    for index, entries in saved["state"].items():
        assert all(torch.equal(value, before["state"][index][key]) for key, value in entries.items())


@pytest.mark.parametrize("attach", [False, True])
def test_a_state_of_something_else_is_refused(attach: bool) -> None:
    _net, optimizer = build("qgalore8bit", attach=attach)

    def without_ranks(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return kind([{"params": group["params"]} for group in optimizer.param_groups])

    for kind in (torch.optim.AdamW, GaLoreAdamW):
        with pytest.raises(ValueError, match=r"group . is with.* rank, that of the state to load is without a rank"):
            optimizer.load_state_dict(without_ranks(kind).state_dict())
    with pytest.raises(ValueError, match="group 1 is without a rank, that of the state to load is with a rank"):
        without_ranks(GaLoreAdamW).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="lacks accumulator_dtype, state_bits"):
        without_ranks(GaLoreAdamW).load_state_dict(without_ranks(torch.optim.AdamW).state_dict())
    larger, saved = build("qgalore8bit", hidden=48)
    train(larger, saved, range(1))
    with pytest.raises(ValueError, match=r"is that of a gradient of shape .* another model"):
        optimizer.load_state_dict(saved.state_dict())


def test_a_loaded_state_forgets_the_gradients_of_before() -> None:
    trained = []
    for in_flight in (False, True):
        net, optimizer = build(update_proj_gap=7)
        train(net, optimizer, range(10))
        weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        if in_flight:
            update = 10
            while not any(weight.subspace.due for weight in optimizer.low_rank_weights()):
                train(net, optimizer, range(update, update + 1))
                update += 1
            assert update > 10
            backward(net, optimizer, update)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(net, optimizer, range(10, 14))
        trained.append(net)
    assert_same(*trained)


@pytest.mark.parametrize("storage", ["plain", "int8"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(how: str, storage: str) -> None:
    net, optimizer = build("qgalore8bit", storage, options={"seed": 3})
    train(net, optimizer, range(3))
    pair = (net, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    copied.attach(other)
    train(other, copied, range(3, 6))
    train(net, optimizer, range(3, 6))
    assert_same(other, net)


def test_a_group_added_later_trains() -> None:
    net, optimizer = build(attach=False)
    extra = nn.Parameter(torch.ones(8, 12))
    optimizer.add_param_group({"params": [extra], "rank": 3})
    extra.grad = torch.ones(8, 12)
    train(net, optimizer, range(2))
    assert not torch.equal(extra, torch.ones(8, 12))


# ---- subspaces in training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
def test_refreshes_find_the_top_subspace_of_a_lasting_gradient(subspace: str, quant: bool, side: str) -> None:
    m, n, rank = 30, 50, 5
    U, _, Vh = torch.linalg.svd(torch.randn(m, n, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    spectrum = torch.cat((torch.linspace(8, 5, rank), torch.linspace(1.0, 0.1, m - rank)))
    grad = U * spectrum @ Vh
    top = U[:, :rank].T if side == "left" else Vh[:rank]
    weight = nn.Parameter(torch.zeros(m, n))
    group = {"params": [weight], "rank": rank, "update_proj_gap": 2, "subspace": subspace, "quant": quant}
    optimizer = GaLoreAdamW([group | {"proj_type": side}], lr=1e-3)
    (low_rank,) = optimizer.low_rank_weights()
    for _ in range(24):
        weight.grad = grad.clone()
        optimizer.step()
    basis = low_rank.subspace.stored.read(side)
    assert basis is not None
    found = torch.linalg.qr(basis.T)[0].T
    assert float((found @ top.T).square().sum()) / rank > (0.98 if quant else 0.999)
    assert low_rank.subspace.schedule.refreshes > 2
    metrics = optimizer.subspace_metrics()
    assert float(metrics[f"subspace/similarity/{low_rank.name}"]) > 0.95


def trained_weight(**group: Any) -> tuple[nn.Parameter, LowRankAdamW, Weight]:
    """A single low-rank weight just before the second refresh of its subspace."""
    parameter = nn.Parameter(torch.zeros(30, 50))
    optimizer = GaLoreAdamW8bit([{"params": [parameter], "rank": 5, "update_proj_gap": 4} | group], lr=1e-3)
    (weight,) = optimizer.low_rank_weights()
    while weight.subspace.schedule.refreshes < 1 or not weight.subspace.schedule.due(weight.step):
        parameter.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(weight.step))
        optimizer.step()
    optimizer.subspace_metrics()
    return parameter, optimizer, weight


@pytest.mark.parametrize("name", ["galore", "qgalore8bit"])
def test_an_svd_with_other_signs_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that are not rotated belong to the old vectors, whose signs a solver chooses anew each time."""
    original, calls = fit.fit_svd, 0

    def fit_svd(*args: Any) -> Tensor | None:
        nonlocal calls
        calls, basis = calls + 1, original(*args)
        signs = torch.randn(4, 1, generator=torch.Generator().manual_seed(calls)).sign()
        return basis if basis is None or calls <= 3 else basis * signs

    nets = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(fit, "fit_svd", fit_svd)
        net, optimizer = build(name, options={"lr": 0.01}, subspace="svd", rotate_moments=False)
        train(net, optimizer, range(12))
        nets.append(net)
    assert calls > 6
    assert_same(*nets)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sketch_is_made_with_the_momentum_in_rows_of_unit_length(side: str) -> None:
    _, _, weight = trained_weight(subspace="streaming", proj_type=side)
    momentum = moments.read_moment(weight.state, "exp_avg")
    momentum = momentum if side == "left" else momentum.T
    expected = momentum / momentum.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight.subspace._test_matrix(side, torch.float32, weight._momentum), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
def test_a_gradient_that_is_not_finite_changes_nothing(subspace: str, quant: bool, bad: float) -> None:
    parameter, optimizer, weight = trained_weight(subspace=subspace, quant=quant)
    before, value = {key: entry.clone() for key, entry in weight.state.items()}, parameter.detach().clone()
    parameter.grad = torch.ones(30, 50)
    parameter.grad[3, 4] = bad
    optimizer.step()
    assert bool(optimizer.skipped())
    assert torch.equal(parameter, value)
    for key in before.keys() - {"step", "schedule", "similarities"}:
        assert torch.equal(weight.state[key], before[key]), key
    # The run goes on, and the next refresh works.
    for _ in range(8):
        parameter.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(weight.step))
        optimizer.step()
        assert not bool(optimizer.skipped())
    assert not torch.equal(parameter, value)
    assert any(not torch.equal(weight.state[key], entry) for key, entry in before.items() if "basis" in key)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("quant", [False, True])
def test_a_failed_svd_keeps_the_basis_and_is_counted(
    quant: bool, rotate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter, optimizer, weight = trained_weight(quant=quant, rotate_moments=rotate)
    before = {key: entry.clone() for key, entry in weight.state.items() if "basis" in key}
    monkeypatch.setattr(fit, "fit_svd", lambda *_: None)
    parameter.grad = torch.ones(30, 50)
    optimizer.step()
    assert all(torch.equal(weight.state[key], entry) for key, entry in before.items())
    assert int(weight.state["failures"]) == 1
    assert float(optimizer.subspace_metrics()["subspace/failures"]) == 1
    assert weight.subspace.schedule.refreshes == 2 and not weight.subspace.schedule.due(weight.step)


@pytest.mark.parametrize("kind", [GaLoreAdamW, QGaLoreAdamW8bit])
@pytest.mark.parametrize("fails", [True, False])
def test_a_refresh_that_failed_or_is_skipped_keeps_moments_and_basis_to_the_bit(
    kind: type[GaLoreAdamW], fails: bool
) -> None:
    weight = nn.Parameter(torch.zeros(30, 50))
    optimizer = kind([{"params": [weight], "rank": 5, "subspace": "streaming"}], lr=1e-3)
    (low_rank,) = optimizer.low_rank_weights()
    for seed in range(3):
        weight.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    before = {key: value.clone() for key, value in low_rank.state.items()}
    sketch = torch.randn(5, 30, generator=torch.Generator().manual_seed(3))
    if fails:
        sketch[2, 3] = float("nan")
    low_rank.subspace.schedule.refreshes = 1
    skip = None if fails else torch.tensor(True)
    low_rank.subspace.refresh_from_sketches({"left": sketch}, low_rank.rotate_moments, skip)
    for key, value in before.items():
        if key == "schedule":
            continue
        expected = value + 1 if key == "failures" and fails else value
        assert torch.equal(low_rank.state[key], expected), key
    low_rank.subspace.refresh_from_sketches({"left": torch.randn(5, 30)}, low_rank.rotate_moments, torch.tensor(False))
    assert all(not torch.equal(low_rank.state[key], before[key]) for key in ("left_basis", "exp_avg"))


def test_moments_are_rotated_where_asked() -> None:
    moments = []
    for rotate in (False, True):
        _, optimizer = trained = build(rotate_moments=rotate, subspace="streaming")
        train(*trained, range(5))
        moments.append([weight.state["exp_avg"] for weight in optimizer.low_rank_weights()])
    assert any(not torch.equal(plain, rotated) for plain, rotated in zip(*moments, strict=True))


def test_the_lazy_rule_saves_refreshes_of_a_lasting_subspace() -> None:
    U, S, Vh = torch.linalg.svd(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    S[4:] *= 0.01
    counts = {}
    for gamma in (1, 2):
        weight = nn.Parameter(torch.zeros(20, 30))
        group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "gamma_proj": gamma, "queue_size": 2}
        optimizer = GaLoreAdamW([group], lr=1e-3)
        for _ in range(40):
            weight.grad = U * S @ Vh
            optimizer.step()
        metrics = optimizer.subspace_metrics()
        counts[gamma] = metrics["subspace/refreshes"], metrics["subspace/refreshes_saved_fraction"]
    assert counts[1] == (20.0 + 1, 0.0) or counts[1] == (20.0, 0.0)
    assert counts[2][0] <= 8 and counts[2][1] > 0.5


def test_metrics_name_the_layers_and_do_not_need_every_gradient() -> None:
    net, optimizer = build(depth=2)
    net.layers[0](torch.randn(2, 3, HIDDEN)).sum().backward()  # the second layer is not used
    optimizer.step()
    metrics = optimizer.subspace_metrics()
    assert "subspace/similarity/layers.0.self_attn" in metrics
    assert "subspace/similarity/layers.1.self_attn" not in metrics
    assert not [key for key in optimizer.subspace_metrics() if "similarity" in key], "once each"


def test_refreshes_are_staggered() -> None:
    net, optimizer = build(depth=2, subspace="streaming", update_proj_gap=6)
    made = []
    for update in range(20):
        before = [weight.subspace.schedule.refreshes for weight in optimizer.low_rank_weights()]
        train(net, optimizer, range(update, update + 1))
        after = [weight.subspace.schedule.refreshes for weight in optimizer.low_rank_weights()]
        made.append(sum(after) - sum(before))
    assert max(made) <= 2 and max(made[8:]) == 1
    assert sum(made[8:14]) == 6


# ---- refusals


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_quantized_weight_needs_attach(storage: str) -> None:
    net, optimizer = build("qgalore8bit", storage, attach=False)
    net(batch(0)).backward()
    with pytest.raises(
        ValueError, match=r"is quantized and no LowRankLinear of the model holds it: call attach\(model"
    ):
        optimizer.step()
    with pytest.raises(ValueError, match="call attach"):
        optimizer.attach(Net())


@pytest.mark.parametrize("attach", [False, True])
def test_a_rank_that_is_too_large_names_the_parameter(attach: bool) -> None:
    with pytest.raises(ValueError, match=r"rank=25 is larger than the (left|right) side of (\S+), of shape \(24, 24\)"):
        train(*build(attach=attach, rank=25), range(1))
    if attach:
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn"):
            build(rank=25)


def test_a_vector_cannot_have_a_rank() -> None:
    with pytest.raises(ValueError, match=r"of shape \(5,\) is not a matrix"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(5))], "rank": 2}])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("proj_type", "std_reverse", "proj_type='std_reverse' is unknown: it must be one of std, reverse_std, left"),
        ("subspace", "qr", "subspace='qr' is unknown: it must be one of svd, streaming"),
        ("svd_method", "fast", "svd_method='fast' is unknown"),
        ("quant_n_bit", 3, "quant_n_bit=3 is unknown: it must be one of 4, 8"),
        ("rank", 0, "rank=0 must be at least 1"),
        ("update_proj_gap", 0, "update_proj_gap=0 must be at least 1"),
        ("quant_group_size", -1, "quant_group_size=-1 must be at least 2"),
        ("scale", 0.0, "scale=0.0 must be more than 0"),
        ("proj_bits", 3, "proj_bits=3 is unknown: it must be one of 4, 8"),
        ("queue_size", 0, "queue_size=0 must be at least 1"),
        ("rank", 2.5, "rank=2.5 must be a whole number, at least 1"),
        ("rank", "8", "rank='8' must be a whole number, at least 1"),
        ("update_proj_gap", float("inf"), "update_proj_gap=inf must be a whole number, at least 1"),
        ("scale", float("nan"), "scale=nan must be a finite number, more than 0"),
        ("galore_scale", float("inf"), "galore_scale=inf must be a finite number, more than 0"),
        ("cos_threshold", float("nan"), "cos_threshold=nan must be a finite number, at least 0 and at most 1"),
        ("dim", 4, "dim=4: the gradients of matrices alone are projected here"),
    ],
)
def test_values_that_make_no_sense_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{key: value})


def test_two_sides_cannot_stream() -> None:
    with pytest.raises(ValueError, match="proj_type='full' projects both sides, and subspace='streaming' follows one"):
        build(subspace="streaming", proj_type="full")


NAN, INFINITE = float("nan"), float("inf")
RATES = ("lr", "eps", "weight_decay")
IMPOSSIBLE = [
    *[(name, value) for name in RATES for value in (-1e-8, NAN, INFINITE, "1", None)],
    ("lr", torch.tensor(NAN)),
    ("norm_growth", NAN),
    *[("betas", value) for value in ((0.9, 1.0), (NAN, 0.9), (-0.1, 0.9), (0.9,), 0.9, (0.9, "0.9"))],
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
@pytest.mark.parametrize("of_a_group", [False, True])
def test_impossible_rates_are_refused_where_they_are_given(name: str, value: object, of_a_group: bool) -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    wanted = "two numbers, each at least 0 and less than 1" if name == "betas" else "a finite number, at least 0"
    with pytest.raises(ValueError, match=rf"^{name}=.* must be {wanted}$"):
        if of_a_group:
            GaLoreAdamW([{"params": params, name: value}])
        else:
            GaLoreAdamW([{"params": params, name: 0.0}], **{name: value})  # also where every group has its own


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    optimizer = GaLoreAdamW([nn.Parameter(torch.ones(2, 2))], lr=0.5)
    for name, value, text in (
        ("lr", float("nan"), "lr=nan must be a finite number"),
        ("accumulator_dtype", "float16", "'float16' is unknown: it must be one of float32, bfloat16, int8"),
        ("state_bits", 4, "state_bits=4 is unknown: it must be one of 32, 8"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(0.25)})
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.25]


def test_an_unknown_dtype_of_sums_is_named() -> None:
    with pytest.raises(ValueError, match="'flaot32' is unknown: it must be one of float32, bfloat16, int8"):
        build(options={"accumulator_dtype": "flaot32"})


def test_a_rank_of_none_is_no_rank() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": None}], lr=0.1)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.allclose(weight, torch.full((4, 4), 0.9), atol=1e-4)


def test_attaching_again_changes_nothing() -> None:
    once, once_optimizer = build("galore", "float")
    twice, twice_optimizer = build("galore", "float")
    twice_optimizer.attach(twice)
    train(once, once_optimizer, range(3))
    train(twice, twice_optimizer, range(3))
    assert_same(once, twice)


@pytest.mark.parametrize("storage", ["plain", "float", "int8"])
def test_an_optimizer_that_is_gone_leaves_the_model_to_autograd(storage: str) -> None:
    net, optimizer = build(storage=storage)
    train(net, optimizer, range(1))
    del optimizer
    gc.collect()
    net(batch(1)).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in net.parameters())
    assert all(module.sink is None for module in net.modules() if isinstance(module, LowRankLinear))


@pytest.mark.parametrize("storage", ["float", "int8"])
def test_detaching_late_takes_nothing_from_the_next_optimizer(storage: str) -> None:
    net, first = build(storage=storage)
    second = GaLoreAdamW(low_rank_param_groups(net, linear_names(net), rank=4), lr=0.02)
    second.attach(net)
    first.detach()
    before = values(net)
    train(net, second, range(1))
    assert all(not torch.equal(value, before[key]) for key, value in values(net).items())


def test_two_attached_optimizers_are_told_of_each_other() -> None:
    net, _first = build()
    second = GaLoreAdamW(net.parameters())
    second.attach(net)
    with pytest.raises(RuntimeError, match=r"another optimizer has taken the gradient of .*detach"):
        net(batch(0)).backward()


def test_a_wrapper_that_would_not_sum_the_gradients_is_refused(tmp_path: Path) -> None:
    net, optimizer = build(attach=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(ValueError, match=r"DistributedDataParallel does not see .*all_reduce"):
            optimizer.attach(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_all_reduce_sees_projected_gradients_alone() -> None:
    seen: list[int] = []

    def all_reduce(value: Tensor) -> None:
        seen.append(value.numel())
        value.mul_(2.0)  # as if another rank had the same

    doubled, optimizer = build(attach=False, update_proj_gap=1000, options={"lr": 1e3, "eps": 1e3})
    optimizer.attach(doubled, all_reduce=all_reduce)
    plain, other = build(update_proj_gap=1000, options={"lr": 1e3, "eps": 1e3})
    start = values(plain)
    train(doubled, optimizer, range(1))
    train(plain, other, range(1))
    assert HIDDEN * MLP not in seen and 4 * MLP in seen
    for key, value in values(doubled).items():
        assert torch.allclose(value - start[key], 2 * (values(plain)[key] - start[key]), rtol=1e-2, atol=1e-6), key


# ---- a model of transformers


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_model_of_transformers_trains(update_in_backward: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    names = linear_names(model)
    assert len(names) == 14
    convert_linears(model, names, WeightFormat(bits=8))
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, names, rank=8, update_proj_gap=5), lr=0.02)
    optimizer.attach(model, update_in_backward=update_in_backward)
    tokens = (torch.arange(16) * torch.tensor([[1], [3], [5], [7]])) % 64
    start, losses = values(model), []
    for _ in range(15):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(value, start[key]) for key, value in values(model).items())


# ---- determinism


@pytest.mark.parametrize("name", CLASSES)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    nets: list[Net] = []
    for seed in (0, 0, 1):
        net, optimizer = build(name, "int8", options={"seed": seed})
        torch.manual_seed(len(nets) + 17)  # no global generator is used
        train(net, optimizer, range(4))
        nets.append(net)
    assert_same(nets[0], nets[1])
    assert any(not torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[2].parameters(), strict=True))


@pytest.mark.parametrize("subspace", ["streaming", "svd"])
def test_states_stay_in_their_tensors_over_refreshes(subspace: str) -> None:
    # CUDA graphs know the tensors by their addresses.
    weight = nn.Parameter(torch.zeros(30, 50))
    optimizer = QGaLoreAdamW8bit([{"params": [weight], "rank": 5, "subspace": subspace, "update_proj_gap": 2}], lr=1e-3)
    (low_rank,) = optimizer.low_rank_weights()
    places: list[dict[str, int]] = []
    for seed in range(6):
        weight.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        places.append({key: value.data_ptr() for key, value in low_rank.state.items() if key not in HOST_STATE})
    assert low_rank.subspace.schedule.refreshes > 2
    assert all(place == places[0] for place in places)


def test_what_it_cannot_train_is_refused_by_name() -> None:
    double = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match="parameter weight is float64: updates are made in float32"):
        GaLoreAdamW(double.parameters()).attach(double)
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = GaLoreAdamW(table.parameters())
    optimizer.attach(table)
    with pytest.raises(ValueError, match="parameter weight has a sparse gradient: use a layer with sparse=False"):
        table(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize("wrong", ["dtype", "shared"])
def test_a_refused_attach_leaves_nothing_on_the_model(wrong: str) -> None:
    net, optimizer = build("galore8bit", "int8", attach=False)
    if wrong == "dtype":
        net.head.weight.data = net.head.weight.data.double()
    else:
        net.second = nn.Module()
        net.second.weight = net.layers[0].self_attn.weight
    with pytest.raises(ValueError, match=r"is float64|are one parameter"):
        optimizer.attach(net, update_in_backward=True)
    assert not optimizer.update_in_backward
    assert not any(module.sink for module in net.modules() if isinstance(module, LowRankLinear))
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())
