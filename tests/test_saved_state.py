"""Optimizer states saved and loaded: any number of times, under any ids, into copies; always to the bit."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from qgalore import GaLoreAdamW
from qgalore.optimizer import LowRankAdamW
from qgalore.optimizer.adafactor import GaLoreAdafactor
from qgalore.optimizer.saved_state import _GROUP_KEYS
from qgalore.update import moments
from qgalore.update.weight import HOST_STATE
from tests.test_optimizer import Net, assert_same, backward, build, round_trip, train

PAIRS = [("galore", "plain"), ("galore8bit", "float"), ("galore", "simulated"), ("qgalore8bit", "int8")]
every_pair = pytest.mark.parametrize(("name", "storage"), PAIRS)


@pytest.fixture(autouse=True)
def _8bit_states_for_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MIN_8BIT_NUMEL", 0)


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    return copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, entries in one.items():
        assert entries.keys() == other[key].keys()
        for name, value in entries.items():
            assert value.dtype == other[key][name].dtype and value.device == other[key][name].device
            assert torch.equal(value, other[key][name]), (key, name)


@pytest.fixture
def reference(name: str, storage: str) -> tuple[Net, LowRankAdamW]:
    """After seven updates without a stop; tests stop after four."""
    net, optimizer = build(name, storage)
    train(net, optimizer, range(7))
    return net, optimizer


def finish(net: Net, optimizer: LowRankAdamW, reference: tuple[Net, LowRankAdamW]) -> None:
    """The last three updates, after which all is as in the reference."""
    train(net, optimizer, range(4, 7))
    assert_same(net, reference[0])
    assert_same_state(optimizer.state_dict()["state"], reference[1].state_dict()["state"])


# ---- one object, several times


@every_pair
def test_a_roll_back_can_be_made_again_and_again(reference: tuple[Net, LowRankAdamW], name: str, storage: str) -> None:
    net, optimizer = build(name, storage)
    train(net, optimizer, range(4))
    weights, state = snapshot(net, optimizer)
    for _ in range(3):
        finish(net, optimizer, reference)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert_same_state(optimizer.state_dict()["state"], state["state"])


@every_pair
def test_a_state_is_loaded_at_once_and_after_steps(
    reference: tuple[Net, LowRankAdamW], name: str, storage: str
) -> None:
    """As accelerate does, which loads an optimizer's own state when it wraps it."""
    half, half_optimizer = build(name, storage)
    train(half, half_optimizer, range(4))
    net, optimizer = build(name, storage, attach=False)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.attach(net)
    train(net, optimizer, range(2))
    net.load_state_dict(round_trip(half.state_dict()))
    optimizer.load_state_dict(round_trip(half_optimizer.state_dict()))
    optimizer.load_state_dict(optimizer.state_dict())
    finish(net, optimizer, reference)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@every_pair
def test_a_copy_takes_a_state(reference: tuple[Net, LowRankAdamW], name: str, storage: str, how: str) -> None:
    net, optimizer = build(name, storage)
    train(net, optimizer, range(2))
    twin, copied = COPIES[how]((net, optimizer))
    train(net, optimizer, range(2, 4))
    copied.attach(twin)
    for _ in range(2):
        twin.load_state_dict(net.state_dict())
        copied.load_state_dict(optimizer.state_dict())
        finish(twin, copied, reference)


# ---- whose state is whose


def test_other_options_of_the_subspace_are_named() -> None:
    """As under torch, what was saved is taken: a run that is resumed with another rank should know."""
    net, optimizer = build("galore", "float")
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    rank = optimizer.param_groups[1]["rank"]
    optimizer.param_groups[1] |= {"rank": rank + 1, "update_proj_gap": 7}
    with pytest.warns(UserWarning, match=rf"with rank={rank}, here {rank + 1}; update_proj_gap=\d+, here 7: training"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["rank"] == rank


@every_pair
def test_ids_may_be_names_and_in_any_order(reference: tuple[Net, LowRankAdamW], name: str, storage: str) -> None:
    half, half_optimizer = build(name, storage)
    train(half, half_optimizer, range(4))
    saved = half_optimizer.state_dict()
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    for names in ({i: f"weight {i}" for i in ids}, {i: len(ids) - 1 - i for i in ids}, {i: (i, "x") for i in ids}):
        renamed = {
            "state": {names[index]: entries for index, entries in reversed(saved["state"].items())},
            "param_groups": [
                group | {"params": [names[index] for index in group["params"]]} for group in saved["param_groups"]
            ],
        }
        net, optimizer = build(name, storage)
        net.load_state_dict(half.state_dict())
        optimizer.load_state_dict(renamed)
        finish(net, optimizer, reference)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("name", "storage"), PAIRS[:3])
def test_states_of_distributed_checkpoints_go_on(
    reference: tuple[Net, LowRankAdamW], name: str, storage: str, flat: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    half, half_optimizer = build(name, storage)
    train(half, half_optimizer, range(4))
    saved = round_trip(get_optimizer_state_dict(half, half_optimizer, options=options))
    for updates_before in (0, 2):
        net, optimizer = build(name, storage)
        train(net, optimizer, range(updates_before))
        net.load_state_dict(half.state_dict())
        set_optimizer_state_dict(net, optimizer, saved, options=options)
        assert_same(net, half)
        finish(net, optimizer, reference)


@pytest.mark.parametrize(("name", "storage"), PAIRS[3:])
def test_distributed_checkpoints_of_quantized_weights(
    reference: tuple[Net, LowRankAdamW], name: str, storage: str
) -> None:
    half, half_optimizer = build(name, storage)
    train(half, half_optimizer, range(4))
    net, optimizer = build(name, storage)
    net.load_state_dict(half.state_dict())
    for flat in (False, True):  # torch drops what belongs to parameters without requires_grad
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = get_optimizer_state_dict(half, half_optimizer, options=options)
        with pytest.raises(
            ValueError, match=r"has none of the quantized weights \(layers\.0\.self_attn\.weight is one"
        ):
            set_optimizer_state_dict(net, optimizer, state, options=options)
    optimizer.load_state_dict(round_trip(get_optimizer_state_dict(half, half_optimizer)))
    finish(net, optimizer, reference)


def test_names_of_parameters_are_kept_as_torch_keeps_them() -> None:
    states: list[dict[str, Any]] = []
    for kind in (GaLoreAdamW, torch.optim.AdamW):
        net, other = Net(), Net()
        optimizer = kind(net.named_parameters(), lr=0.01)
        train(net, optimizer, range(2))
        saved = optimizer.state_dict()
        saved["param_groups"][0]["param_names"] = [f"old {name}" for name, _ in net.named_parameters()]
        again = kind(other.named_parameters(), lr=0.02)
        again.load_state_dict(saved)
        states.append(again.state_dict())
        unnamed = {"state": saved["state"], "param_groups": [dict(saved["param_groups"][0])]}
        del unnamed["param_groups"][0]["param_names"]
        named = kind(Net().named_parameters())
        named.load_state_dict(unnamed)
        states.append(named.state_dict())
    ours, theirs = states[:2], states[2:]
    for one, other_state in zip(ours, theirs, strict=True):
        assert one["param_groups"][0]["param_names"] == other_state["param_groups"][0]["param_names"]
        assert one["state"].keys() == other_state["state"].keys()


def test_a_state_of_no_parameter_is_refused() -> None:
    net, optimizer = build()
    train(net, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"]["elsewhere"] = saved["state"].pop(0)
    with pytest.raises(ValueError, match="entries of parameters that its param groups do not have: elsewhere"):
        optimizer.load_state_dict(saved)


# ---- what is kept, and what is left alone


def test_groups_need_the_keys_of_a_new_optimizer() -> None:
    adam, adafactor = (kind([nn.Parameter(torch.ones(2))]).defaults.keys() for kind in (GaLoreAdamW, GaLoreAdafactor))
    assert set(_GROUP_KEYS) == adam | adafactor


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_states_from_before_a_key_existed_go_on(storage: str) -> None:
    """And those with keys that torch added."""
    trained = []
    for without in ((), ("norm_growth", "direction", "residual")):
        net, optimizer = build("qgalore8bit", storage)
        train(net, optimizer, range(3))
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group |= {} if without else {"differentiable": False, "from_later": 1}
            for key in without:
                group.pop(key, None)
        optimizer.load_state_dict(saved)
        train(net, optimizer, range(3, 6))
        assert all("norm_growth" in group for group in optimizer.param_groups)
        assert "direction" in optimizer.param_groups[1] and "direction" not in optimizer.param_groups[0]
        trained.append(net)
    assert_same(*trained)


def test_asking_for_the_state_changes_nothing() -> None:
    net, optimizer = build("qgalore8bit", "int8")
    assert optimizer.state_dict()["state"] == {} and not optimizer.state, "a weight without state has no entry"
    train(net, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    assert_same_state(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(("name", "storage"), PAIRS[:3])
def test_an_update_that_torch_makes_of_zeros_is_no_refresh(name: str, storage: str) -> None:
    """`get_optimizer_state_dict` of a new optimizer makes one, to have states."""
    net, optimizer = build(name, storage, subspace="streaming", update_proj_gap=100)
    before = copy.deepcopy(net.state_dict())
    get_optimizer_state_dict(net, optimizer)
    assert_same_state({0: dict(net.state_dict())}, {0: before})
    weights = list(optimizer.low_rank_weights())
    starts = [copy.deepcopy(weight.subspace.stored.read(*weight.subspace.sides)) for weight in weights]
    assert [(weight.step, weight.subspace.schedule.refreshes) for weight in weights] == [(1, 0)] * len(weights)
    assert weights[0].subspace.schedule.next_refresh == 1 and optimizer.subspace_metrics()["subspace/refreshes"] == 0
    train(net, optimizer, range(4))
    for weight, start in zip(weights, starts, strict=True):
        found = weight.subspace.stored.read(*weight.subspace.sides)
        assert weight.subspace.schedule.refreshes == 1 and found is not None and not torch.equal(found, start)


def test_the_state_is_in_the_order_of_the_groups() -> None:
    """Whichever weights were updated first, so that files of equal runs are equal."""
    net, optimizer = build("galore", "float", update_in_backward=True)
    train(net, optimizer, range(1))
    count = sum(1 for _ in net.parameters())
    assert list(optimizer.state_dict()["state"]) == list(range(count))


def test_the_dict_that_is_loaded_stays_as_it_is() -> None:
    net, optimizer = build("qgalore8bit", "int8")
    train(net, optimizer, range(3))
    saved = round_trip(optimizer.state_dict())
    saved["param_groups"] = [{k: v for k, v in g.items() if k != "norm_growth"} for g in saved["param_groups"]]
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(net, optimizer, range(3, 5))
    assert saved["param_groups"] == before["param_groups"]
    assert_same_state(saved["state"], before["state"])


def test_hooks_see_the_state_as_it_was_saved() -> None:
    """In its own dtypes, and what a hook makes of it is loaded."""
    net, optimizer = build("galore", "float", dtype=torch.bfloat16)
    train(net, optimizer, range(2))
    saved, seen = optimizer.state_dict(), list[dict[str, Tensor]]()

    def with_another_moment(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        moment = torch.full_like(state["state"][0]["exp_avg"], 1 / 3)
        return state | {"state": state["state"] | {0: state["state"][0] | {"exp_avg": moment}}}

    optimizer.register_load_state_dict_pre_hook(with_another_moment)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.extend(loaded.state.values()))
    optimizer.load_state_dict(saved)
    assert len(seen) == len(saved["state"])
    for entries, expected in zip(seen, saved["state"].values(), strict=True):
        assert all(entries[key].dtype == value.dtype for key, value in expected.items())
        assert all(entries[key].device.type == "cpu" for key in HOST_STATE if key in entries)
        assert entries["exp_avg"].dtype == torch.float32
    first = optimizer.param_groups[0]["params"][0]
    assert (optimizer.state[first]["exp_avg"] == torch.tensor(1 / 3)).all()


@pytest.mark.parametrize("wrong", ["kind", "groups", "parameters", "shape", "type"])
def test_a_refused_state_leaves_the_optimizer_as_it_was(wrong: str) -> None:
    net, optimizer = build("galore8bit")
    train(net, optimizer, range(3))
    saved, message = copy.deepcopy(optimizer.state_dict()), ""
    if wrong == "kind":
        del saved["param_groups"][1]["rank"]
        message = "param group 1 is with a rank, that of the state to load is without a rank"
    elif wrong == "groups":
        saved["param_groups"].pop()
        message = "the optimizer has 2 param groups, the state to load 1"
    elif wrong == "parameters":
        saved["param_groups"][1]["params"].pop()
        message = "param group 1 has 3 parameters, that of the state to load 2"
    elif wrong == "shape":
        other, larger = build("galore8bit", hidden=48)
        train(other, larger, range(1))
        saved, message = larger.state_dict(), "is that of a gradient of shape"
    else:
        saved["state"][0]["step"] = 3
        message = "the state of parameter 0 has a int as step where a tensor should be"
    twin, copied = copy.deepcopy((net, optimizer))
    copied.attach(twin)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    train(net, optimizer, range(3, 6))
    train(twin, copied, range(3, 6))
    assert_same(net, twin)


def test_a_gradient_in_flight_is_forgotten_by_each_load() -> None:
    net, optimizer = build("galore", "int8", update_proj_gap=50)
    train(net, optimizer, range(2))
    weights, state = snapshot(net, optimizer)
    for _ in range(2):
        backward(net, optimizer, 9)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    other, again = build("galore", "int8", update_proj_gap=50)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(net, optimizer, range(2, 4))
    train(other, again, range(2, 4))
    assert_same(net, other)
