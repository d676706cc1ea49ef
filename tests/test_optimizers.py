"""Optimizers by name: their groups, the numbers of the libraries that they stand for, one meaning of each method."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.build import build_model, build_training
from peft_pretraining.config.flag_groups import ModelArgs, SubspaceArgs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.optim.lr_schedule import set_learning_rate
from peft_pretraining.optim.protocol import TrainingOptimizer
from qgalore import LowRankLinear
from tests.small_run import OPTIMIZERS, VOCAB, SmallRun, assert_same_bits, flags_of

LIBRARIES = ("sgd", "adafactor")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("optimizers"))


def build(small: SmallRun, all_reduce: Any = None, **flags: object) -> tuple[nn.Module, TrainingOptimizer]:
    args = parse_args(small.argv("none", flags))
    return build_training(args, torch.device("cpu"), all_reduce)


def plain_model(small: SmallRun) -> nn.Module:
    """The same weights with no optimizer attached."""
    return build_model(ModelArgs(str(small.config), dtype="float32"))


def token_ids(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: Any, updates: range, clip: float = 0.0) -> list[Tensor]:
    """Updates on fixed batches, as the training loop makes them; returns the gradient's norms."""
    norms = []
    for update in updates:
        (model(token_ids(update), token_ids(update)).loss_sum / 30).backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        norms.append(optimizer.grad_norm().clone())
        optimizer.zero_grad()
    return norms


# ---- groups


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_groups_hold_every_parameter_once(small: SmallRun, name: str) -> None:
    model, optimizer = build(small, **flags_of(name) | {"lr": 0.01, "full_rank_lr": 0.002})
    full_rank, low_rank = optimizer.param_groups
    matrices = {model.get_submodule(linear).weight for linear in low_rank_names(model)}
    assert set(low_rank["params"]) == matrices and len(matrices) == 7
    assert set(full_rank["params"]) == set(model.parameters()) - matrices
    assert (full_rank["lr"], low_rank["lr"]) == (0.002, 0.01)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.5)
    assert (full_rank["lr"], low_rank["lr"]) == (0.001, 0.005)
    assert ("rank" in low_rank) == ("galore" in name) and "rank" not in full_rank


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sgd", "adam", "adafactor")])
@pytest.mark.parametrize("decay", [None, 0.0, 0.5])
def test_a_row_of_the_embeddings_that_no_token_reads_decays_as_asked(
    small: SmallRun, name: str, decay: float | None
) -> None:
    rates = {"lr": 0.01, "full_rank_lr": 0.1, "weight_decay": 0.2}
    own = {} if decay is None else {"full_rank_weight_decay": decay}
    model, optimizer = build(small, **flags_of(name) | rates | own)
    row = model.get_submodule("model.embed_tokens").weight[VOCAB - 1].clone()
    assert VOCAB - 1 not in token_ids(0)
    train(model, optimizer, range(1))
    left = 1 - 0.1 * (0.2 if decay is None else decay)
    torch.testing.assert_close(model.get_submodule("model.embed_tokens").weight[VOCAB - 1], row * left)
    assert optimizer.param_groups[1]["weight_decay"] == 0.2


def test_matrices_of_the_mlp_may_have_a_rank_of_their_own(small: SmallRun) -> None:
    model, optimizer = build(small, **flags_of("q_galore_adamw8bit_per_layer") | {"rank": 24, "mlp_rank": 8})
    _, attention, mlp = optimizer.param_groups
    for group, part, rank in ((attention, "self_attn", 24), (mlp, "mlp", 8)):
        names = [name for name in low_rank_names(model) if f".{part}." in name]
        assert set(group["params"]) == {model.get_submodule(name).weight for name in names} and names
        assert group["rank"] == rank
    assert {key: value for key, value in attention.items() if key not in ("params", "rank")} == {
        key: value for key, value in mlp.items() if key not in ("params", "rank")
    }
    train(model, optimizer, range(2))
    for group in (attention, mlp):
        for param in group["params"]:
            assert group["rank"] in optimizer.state[param]["exp_avg"].shape  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "by_layer"),
    [
        ("24,8", {0: (24, 24), 1: (8, 8)}),
        ("24,full", {0: (24, 24), 1: ("full", "full")}),
        ("24", {0: (24, 8), 1: (24, 16)}),
    ],
)
def test_parts_of_the_layers_may_have_ranks_of_their_own(
    tmp_path: Path, flags: str, by_layer: dict[int, tuple[object, object]]
) -> None:
    options = {"rank": flags} | ({} if "," in flags else {"mlp_rank": "8,16"})
    model, optimizer = build(SmallRun(tmp_path, layers=2), **flags_of("q_galore_adamw8bit_per_layer") | options)
    found = {}
    for group in optimizer.param_groups[1:]:
        found |= dict.fromkeys(group["params"], group["rank"])
    names = low_rank_names(model)
    assert len(found) == len(names) and len(model.decoder_layers) == 2
    for name in names:
        assert found[model.get_submodule(name).weight] == by_layer[int(name.split(".")[2])][".mlp." in name], name
    before = [param.clone() for param in found]
    train(model, optimizer, range(2))
    assert all(not torch.equal(old, new) for old, new in zip(before, found, strict=True))


def test_layers_are_dealt_to_ranks_in_equal_parts() -> None:
    args = SubspaceArgs(rank="128,256,512")
    assert [x.rank for x in args.by_depth(8)] == [128] * 3 + [256] * 3 + [512] * 2
    assert [x.rank for x in args.by_depth(3)] == [128, 256, 512]
    assert args.config().rank == 512 and args.projects


def test_the_flags_of_the_subspace_arrive(small: SmallRun) -> None:
    flags = flags_of("q_galore_adamw8bit_per_layer") | {
        "rank": 16, "galore_scale": 0.25, "proj_type": "left", "proj_bits": 8, "proj_group_size": 24,
        "update_proj_gap": 7, "max_update_proj_gap": 21, "cos_threshold": 0.7, "gamma_proj": 3, "queue_size": 2,
        "svd_method": "randomized", "rotate_moments": True, "beta1": 0.8, "beta2": 0.9, "adam_eps": 1e-6,
        "weight_decay": 0.1, "grad_accum_dtype": "bfloat16", "norm_growth": 1.1, "direction": "orthogonal",
        "residual": "fira",
    }  # fmt: skip
    _, optimizer = build(small, **flags)
    group = optimizer.param_groups[1]
    expected = {
        "rank": 16, "galore_scale": 0.25, "proj_type": "left", "proj_quant": True, "proj_bits": 8,
        "proj_group_size": 24, "update_proj_gap": 7, "max_update_proj_gap": 21, "cos_threshold": 0.7,
        "gamma_proj": 3, "queue_size": 2, "subspace": "svd", "svd_method": "randomized", "rotate_moments": True,
        "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "accumulator_dtype": "bfloat16", "state_bits": 8,
        "norm_growth": 1.1, "direction": "orthogonal", "residual": "fira",
    }  # fmt: skip
    assert {name: group[name] for name in expected} == expected


def test_projections_are_quantized_only_where_asked(small: SmallRun) -> None:
    for name in ("galore_adamw", "q_galore_adamw8bit"):
        for asked in (True, False, None):
            _, optimizer = build(small, **flags_of(name) | {"proj_quant": asked})
            # The name of a q_galore optimizer asks for it.
            assert optimizer.param_groups[1]["proj_quant"] is (name[0] == "q" if asked is None else asked)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_low_rank_optimizers_replace_layers(small: SmallRun, name: str) -> None:
    model, _ = build(small, **flags_of(name))
    replaced = [layer for layer, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert replaced == (low_rank_names(model) if "galore" in name else [])
    codes = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(codes) == (7 if name.startswith("q_galore") else 0)


def test_weights_are_rounded_as_asked(small: SmallRun) -> None:
    for flags, bits, stochastic, simulate in (
        (flags_of("q_galore_adamw8bit"), 8, True, False),
        (flags_of("q_galore_adamw8bit") | {"stochastic_round": False, "weight_bits": 4}, 4, False, False),
        (flags_of("q_galore_adamw8bit") | {"simulation": True}, 8, True, True),
        (flags_of("galore_adamw"), None, True, False),  # bfloat16 weights
    ):
        chosen = parse_args(small.argv("none", flags)).quantization.weight_format
        assert (chosen.bits, chosen.stochastic_rounding, chosen.simulate) == (bits, stochastic, simulate)


# ---- the numbers of the libraries


def reference(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adafactor":
        from transformers.optimization import Adafactor

        options: dict[str, Any] = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
        return Adafactor(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8, weight_decay=0.1)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor"])
def test_equals_the_library(small: SmallRun, name: str, clip: float) -> None:
    beta1 = None if name == "adafactor" else 0.8
    ours, optimizer = build(small, optimizer=name, lr=0.01, weight_decay=0.1, beta1=beta1)
    theirs = plain_model(small)
    expected = reference(name, theirs)
    norms = train(ours, optimizer, range(5), clip)
    for update in range(5):
        theirs.zero_grad()
        (theirs(token_ids(update), token_ids(update)).loss_sum / 30).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or 1e9)
        assert norms[update].item() == pytest.approx(norm.item(), rel=1e-4), "the norm before clipping"
        assert norm > 0.3
        expected.step()
    for (parameter, value), reference_value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Adam divides by the root of tiny second moments: a last bit of the gradient is 1e-4 of a step of 0.01.
        torch.testing.assert_close(value, reference_value, rtol=1e-4, atol=2e-5, msg=parameter)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(small: SmallRun) -> None:
    """Also after a state has gone from one pair to another."""
    flags: dict[str, Any] = {"optimizer": "muon", "lr": 0.01, "full_rank_lr": 0.002, "weight_decay": 0.1}
    ours, optimizer = build(small, **flags)
    theirs, start = plain_model(small), plain_model(small)
    matrices = [theirs.get_submodule(name).weight for name in low_rank_names(theirs)]
    chosen = set(matrices)
    rest = [parameter for parameter in theirs.parameters() if parameter not in chosen]
    expected = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.002, betas=(0.9, 0.95), weight_decay=0.1),
    )
    train(ours, optimizer, range(2), 0.3)
    other, resumed = build(small, **flags)
    other.load_state_dict(ours.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in resumed.param_groups] == [0.002, 0.01]
    train(other, resumed, range(2, 4), 0.3)
    for update in range(4):
        theirs.zero_grad()
        (theirs(token_ids(update), token_ids(update)).loss_sum / 30).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        for library in expected:
            library.step()
    for value, expected_value, first in zip(other.parameters(), theirs.parameters(), start.parameters(), strict=True):
        # Muon orthogonalises in bfloat16, which makes much of a last bit.
        assert (value - expected_value).norm() < 0.1 * (expected_value - first).norm()


@pytest.mark.parametrize("name", LIBRARIES)
def test_momentum_is_off_unless_asked_for(small: SmallRun, name: str) -> None:
    for beta1, expected in ((None, False), (0.9, True)):
        model, optimizer = build(small, optimizer=name, beta1=beta1)
        train(model, optimizer, range(2))
        state = optimizer.state_dict()["state"]
        kept = any("momentum_buffer" in s and s["momentum_buffer"] is not None for s in state.values())
        assert (kept or any("exp_avg" in s for s in state.values())) == expected


# ---- one meaning of each method


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_goes_on_and_follows_the_schedule(small: SmallRun, name: str) -> None:
    flags = flags_of(name) | {"lr": 0.01}
    model, optimizer = build(small, **flags)
    train(model, optimizer, range(4))
    saved = {key: value.clone() for key, value in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    again, loaded = build(small, **flags)
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for each, weights in ((optimizer, model), (loaded, again)):
        set_learning_rate(each, 0.3)
        train(weights, each, range(4, 7))
    assert loaded.param_groups[0]["lr"] == pytest.approx(0.003)
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))
    assert_same_bits(loaded.state_dict()["state"], optimizer.state_dict()["state"])
    # A rate of nothing moves nothing: it is the one that is used.
    set_learning_rate(loaded, 0.0)
    train(again, loaded, range(7, 8))
    assert_same_bits(again.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("name", LIBRARIES)
def test_gradients_are_summed_over_ranks_once_when_the_last_micro_batch_is_in(small: SmallRun, name: str) -> None:
    sums: list[Tensor] = []

    def all_reduce(tensor: Tensor) -> None:
        sums.append(tensor)
        tensor.mul_(2)  # another rank with the same batch

    model, optimizer = build(small, all_reduce, optimizer=name)
    alone = plain_model(small)
    for micro_batch in range(3):
        optimizer.is_last_micro_batch = micro_batch == 2
        for each in (model, alone):
            (each(token_ids(micro_batch), token_ids(micro_batch)).loss_sum / 90).backward()
        assert len(sums) == (len(list(model.parameters())) if micro_batch == 2 else 0)
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * other.grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_with_a_gradient_that_is_not_finite_is_skipped(small: SmallRun, name: str, bad: float) -> None:
    model, optimizer = build(small, **flags_of(name))
    train(model, optimizer, range(2))
    assert not optimizer.skipped()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {
        (index, key): value.clone()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor) and key.startswith(("exp_avg", "momentum"))
    }
    assert moments or name == "sgd"
    # A loss that is not finite: everything in the backward pass is.
    (model(token_ids(5), token_ids(5)).loss_sum * bad).backward()
    optimizer.step()
    assert optimizer.skipped()
    optimizer.zero_grad()
    assert_same_bits(dict(model.state_dict()), weights)
    state = optimizer.state_dict()["state"]
    assert_same_bits({(index, key): state[index][key] for index, key in moments}, moments)
    train(model, optimizer, range(5, 6))
    assert not optimizer.skipped() and optimizer.grad_norm().isfinite()
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_subspaces_have_metrics(small: SmallRun, name: str) -> None:
    model, optimizer = build(small, **flags_of(name))
    train(model, optimizer, range(2))
    assert bool(optimizer.subspace_metrics()) == ("galore" in name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_do_not_outlive_the_update(small: SmallRun, name: str) -> None:
    model, optimizer = build(small, **flags_of(name))
    train(model, optimizer, range(1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.grad_norm().isfinite()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_keeps_the_weights_of_a_training_that_is_over(small: SmallRun, name: str) -> None:
    """A run that goes back to its newest checkpoint builds another model and optimizer on the same device."""

    def trained() -> list[weakref.ref[Any]]:
        model, optimizer = build(small, lambda gradient: None, **flags_of(name))
        train(model, optimizer, range(1))
        return [weakref.ref(optimizer), *(weakref.ref(param) for param in model.parameters())]

    trained()  # What a library logs while it is first imported keeps these frames, for pytest shows its records.
    left = trained()
    gc.collect()
    assert not [found for found in left if found() is not None]


@pytest.mark.parametrize("name", ["sgd", "muon", "adamw", "galore_adamw8bit_per_layer"])
@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_one_of_several_flags_skips_an_update(small: SmallRun, name: str, flags: tuple[bool, bool]) -> None:
    """An update that the run is to leave out stays left out where its loss is finite."""
    model, optimizer = build(small, **flags_of(name))
    train(model, optimizer, range(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for flag in flags:
        optimizer.skip_update_if(torch.tensor(flag))
    train(model, optimizer, range(1, 2))
    assert bool(optimizer.skipped()) == any(flags)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert bool(changed) != any(flags)
    train(model, optimizer, range(2, 3))
    assert not optimizer.skipped(), "a flag holds for one update"
