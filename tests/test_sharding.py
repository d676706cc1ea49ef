"""Ranks to which weights are dealt hold the bits of ranks that each have everything, and save them together."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run_pretrain
from peft_pretraining.build import build_training, shape_of
from peft_pretraining.checkpoint.store import Part, Unfinished
from peft_pretraining.checkpoint.tensor_file import stored_tensors
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.dealt_states import bytes_by_rank
from peft_pretraining.memory.lasting import GRADIENTS, lasting_bytes
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import start_world
from qgalore.optimizer import LowRankAdamW
from qgalore.subspace.methods import GRADIENT
from qgalore.update.gradient_sum import Gradient
from tests import test_layer_graphs
from tests.small_run import (
    FULL_RANK,
    OPTIMIZERS,
    RECIPE,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    build_on_rank,
    flags_of,
    on_ranks,
)
from tests.test_data_parallel import assert_close_weights, stop_after
from tests.test_skipped_updates import Fault, outcome

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
STREAMING = PER_LAYER | {"subspace": "streaming"}
LAZY = {"cos_threshold": 0.0, "queue_size": 2, "update_proj_gap": 1}
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS} | {
    "clipping": flags_of("galore_adamw8bit") | {"grad_clipping": 0.5},
    "sgd_clipping": flags_of("sgd") | {"grad_clipping": 0.5},
    "streaming": STREAMING,
    "recipe": PER_LAYER | RECIPE,
    "full_rank": {**FULL_RANK},
    "momentum_in_parts": FULL_RANK | {"momentum_rank": "1/8"},
    "fira": STREAMING | {"residual": "fira", "norm_growth": 1.01},
    "lazy": PER_LAYER | LAZY,
}
AT_ONCE = {"total_batch_size": 4}
"""One micro-batch of two sequences on each of two ranks: updates inside the backward pass."""
SUMMED: dict[str, dict[str, object]] = {
    "int8_sums": STREAMING | {"grad_accum_dtype": "int8"},
    "bfloat16_sums": flags_of("adamw") | {"grad_accum_dtype": "bfloat16"},
    "low_rank_method": {"method": "low_rank", "rank": 8, "optimizer": "adamw", "lr": 1e-2},
    "relora": {"method": "relora", "relora_every": 3, "relora_warmup": 0, "rank": 8, "optimizer": "adam", "lr": 1e-2},
}


def marked(cases: Iterable[str], *quick: str) -> list[Any]:
    """Cases as parameters, of which only some are tried in every change: each takes up to ten seconds."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path, layers=2)


def assert_sharding_changes_nothing(small: SmallRun, flags: dict[str, object]) -> None:
    flags = {"batch_size": 2, "num_training_steps": 6, "check_replicas": 1, "save_every": 3} | flags
    replicated = small.run_on(2, "replicated", **flags)
    sharded = small.run_on(2, "sharded", **flags, shard="optimizer")
    assert_same_run(replicated, sharded)
    names = {path.name for path in sharded.checkpoints[-1].iterdir()}
    assert {"optimizer_00001.safetensors", "optimizer_00001.json", "model_00001.safetensors"} <= names


@pytest.mark.parametrize("case", marked(CASES, "streaming"))
def test_updates_of_one_micro_batch(small: SmallRun, case: str) -> None:
    assert_sharding_changes_nothing(small, CASES[case] | AT_ONCE)


@pytest.mark.parametrize("case", marked(CASES | SUMMED, "muon", "clipping"))
def test_updates_of_several_micro_batches(small: SmallRun, case: str) -> None:
    assert_sharding_changes_nothing(small, (CASES | SUMMED)[case])


# ---- weights with their owners, too

FULL = ["q_galore_adamw8bit_per_layer", "streaming", "recipe", "full_rank", "fira", "adam8bit", "galore_adamw", "lazy"]
# With a large eps Adam's step is linear in the gradient: it does not amplify rounding, and shows a wrong size as well.
LINEAR: dict[str, object] = {"lr": 1.0, "adam_eps": 1.0}
SUMMED_BY_OWNERS: dict[str, tuple[dict[str, object], float]] = {
    "adamw": (flags_of("adamw") | LINEAR, 1e-3),
    "svd_clipping": (flags_of("galore_adamw") | LINEAR | {"rotate_moments": True, "grad_clipping": 0.5}, 1e-3),
    "streaming": (flags_of("galore_adamw") | LINEAR | {"subspace": "streaming"}, 1e-3),
    "fira": (flags_of("galore_adamw") | LINEAR | {"subspace": "streaming", "residual": "fira"}, 1e-3),
    "int8_sums": (flags_of("galore_adamw") | LINEAR | {"rotate_moments": True, "grad_accum_dtype": "int8"}, 0.1),
    "bfloat16_sums": (flags_of("adamw") | LINEAR | {"grad_accum_dtype": "bfloat16"}, 0.02),
}
"""How far weights may end from those of replicated ranks, as a share of their way: sums over micro-batches have another
order (`tests/test_data_parallel.py` has what that makes, and what a mistake makes)."""


@pytest.mark.parametrize("case", marked(FULL, "q_galore_adamw8bit_per_layer"))
def test_gathered_layers_have_the_bits_of_those_that_stay(small: SmallRun, case: str) -> None:
    """Three layers for two buffers, and evaluations in which one rank has more batches than the other."""
    deep = SmallRun(small.folder / "deep", layers=3) if (small.folder / "deep").mkdir() is None else small
    flags = {"batch_size": 2, "num_training_steps": 6, "check_replicas": 1, "save_every": 3, "eval_every": 2}
    flags |= CASES[case] | AT_ONCE | {"eval_batch_size": 5}
    replicated = deep.run_on(2, "replicated", **flags)
    assert_same_run(replicated, deep.run_on(2, "full", **flags, shard="full"))


def test_large_float_matrices_are_gathered_from_one_owner(small: SmallRun) -> None:
    """Of more values than from which on embeddings and head are dealt by rows."""
    config = json.loads(small.config.read_text()) | {"hidden_size": 192, "intermediate_size": 512}
    small.config.write_text(json.dumps(config))
    flags = flags_of("adamw") | AT_ONCE | {"batch_size": 2, "num_training_steps": 3, "check_replicas": 1}
    replicated = small.run_on(2, "replicated", **flags)
    assert_same_run(replicated, small.run_on(2, "full", **flags, shard="full"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_agree_up_to_the_order_of_sums(small: SmallRun, ranks: int) -> None:
    flags, share = SUMMED_BY_OWNERS["streaming"]
    flags = {"batch_size": 1, "num_training_steps": 5, "check_replicas": 1, "save_every": 5} | flags
    flags |= {"total_batch_size": 2 * ranks, "data_lanes": 2 * ranks}
    replicated = small.run_on(ranks, "replicated", **flags)
    modes = OWNERS | {"rank": {"shard": "optimizer"}, "by_layer": {"shard": "full", "accumulate_by": "layer"}}
    for name, mode in modes.items():
        sharded = small.run_on(ranks, name, **flags | mode)
        assert sharded.losses == pytest.approx(replicated.losses, abs=5e-4)
        assert_close_weights(sharded, replicated, share)
        names = {path.name for path in sharded.checkpoints[-1].glob("optimizer_*.json")}
        assert names == {f"optimizer_{rank:05d}.json" for rank in range(1, ranks)}


OWNERS: dict[str, dict[str, object]] = {
    "full": {"shard": "full"},
    "optimizer": {"shard": "optimizer", "shard_sums": "owner"},
}
"""The modes in which owners sum each micro-batch."""


@pytest.mark.parametrize("mode", OWNERS)
@pytest.mark.parametrize("case", marked(SUMMED_BY_OWNERS, "streaming"))
def test_owners_sum_micro_batches(small: SmallRun, case: str, mode: str) -> None:
    flags, share = SUMMED_BY_OWNERS[case]
    flags = {"batch_size": 1, "num_training_steps": 5, "check_replicas": 1, "save_every": 5} | flags
    replicated = small.run_on(2, "replicated", **flags)
    sharded = small.run_on(2, mode, **flags | OWNERS[mode])
    assert sharded.losses == pytest.approx(replicated.losses, abs=5e-4)
    assert_close_weights(sharded, replicated, share)


IN_MOMENTUM: dict[str, dict[str, object]] = {
    "float32": {
        "optimizer": "galore_adamw", "recipe": "orthogonal", "weight_quant": None, "stochastic_round": None,
        "weight_group_size": None,
    },
    "per_layer": {},
}  # fmt: skip


@pytest.mark.parametrize("mode", OWNERS)
@pytest.mark.parametrize(
    ("case", "share", "of_loss"),
    [("float32", 1e-4, 1e-5), pytest.param("per_layer", 0.35, 2e-3, marks=pytest.mark.slow)],
)
def test_owners_add_micro_batches_to_their_momenta(
    small: SmallRun, case: str, share: float, of_loss: float, mode: str
) -> None:
    """As one rank does with micro-batches of the rows of both; `tests/test_momentum_sum.py` explains the shares."""
    flags = (
        FULL_RANK | {"sum_in_momentum": True, "num_training_steps": 5, "save_every": 5, "lr": 1e-2} | IN_MOMENTUM[case]
    )
    one = small.run("one", **flags | {"batch_size": 4})
    two = small.run_on(2, "two", **flags | OWNERS[mode] | {"batch_size": 2, "check_replicas": 1})
    assert two.losses == pytest.approx(one.losses, abs=of_loss)
    norms = [[line["train/grad_norm"] for line in run.train_lines] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert_close_weights(two, one, share)


@pytest.mark.parametrize("mode", marked(OWNERS, "optimizer"))
def test_all_owners_go_back_when_a_micro_batch_is_not_finite(small: SmallRun, mode: str) -> None:
    """Some of their momenta have gradients of the update already."""
    flags = FULL_RANK | {"sum_in_momentum": True, "num_training_steps": 4, "save_every": 2, "batch_size": 2, "lr": 1e-2}
    run = outcome(small, "run", Fault("gradient", (2,), rank=1), 2, flags | OWNERS[mode] | {"check_replicas": 1})
    assert "update 3: a gradient further down was not finite" in (small.folder / "run.log").read_text()
    assert [line["train/skipped"] for line in run.train_lines] == [0, 0, 1, 0]


def early_and_late(folder: Path, sum_in_momentum: bool) -> None:
    """A rank whose first two micro-batches reach two layers, and whose last one reaches one of them."""
    world = start_world("cpu", StopRequest())
    mesh = world.shard_mesh("optimizer")
    assert mesh is not None
    mesh.owners_sum = True
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(2)])
    options = {"rank": "full", "direction": "orthogonal", "sum_in_momentum": sum_in_momentum}
    optimizer = LowRankAdamW([{"params": list(layers.parameters()), **options}], lr=0.1)
    optimizer.attach(layers, mesh=mesh)
    before = [layer.weight.detach().clone() for layer in layers]
    for update in range(2):
        for number in range(3):
            optimizer.is_last_micro_batch = number == 2
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * update + 2 * number + world.rank))
            chosen = layers if number < 2 else layers[:1]
            torch.stack([layer(x).square().sum() for layer in chosen]).sum().backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
        for layer, old in zip(layers, before, strict=True):
            assert not torch.equal(layer.weight, old), "an early micro-batch's gradient is lost"
        before = [layer.weight.detach().clone() for layer in layers]
    (folder / f"weights_{world.rank}.json").write_text(json.dumps([layer.weight.tolist() for layer in layers]))
    world.close()


@pytest.mark.parametrize("sum_in_momentum", [False, True])
def test_what_only_early_micro_batches_reach_is_updated(tmp_path: Path, sum_in_momentum: bool) -> None:
    log = tmp_path / "log"
    assert on_ranks(2, early_and_late, tmp_path, sum_in_momentum, log=log) == [0, 0], log.read_text()
    assert (tmp_path / "weights_0.json").read_text() == (tmp_path / "weights_1.json").read_text()


# ---- layer by layer

BY_LAYER = ["adamw", "streaming", "full_rank", "recipe", "fira", "momentum_in_parts", "int8_sums", "bfloat16_sums"]
QUICK_BY_LAYER = {("streaming", "optimizer"), ("full_rank", "full"), ("muon", "optimizer")}
PAIRS = [(case, shard) for case in [*BY_LAYER, "lazy"] for shard in ("optimizer", "full")]
PAIRS += [("muon", "optimizer"), ("adafactor", "optimizer")]


@pytest.mark.parametrize(
    ("case", "shard"), [pytest.param(*each, marks=[] if each in QUICK_BY_LAYER else pytest.mark.slow) for each in PAIRS]
)
def test_sums_of_one_layer_at_a_time_have_the_bits_of_replicas(small: SmallRun, case: str, shard: str) -> None:
    """Each rank sums what it has of a layer, and sends it once: also to the owners of weights that are gathered."""
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | {"num_hidden_layers": 3}))
    flags = {"batch_size": 1, "num_training_steps": 6, "check_replicas": 1, "save_every": 3, "eval_every": 3}
    flags |= (CASES | SUMMED)[case] | {"accumulate_by": "layer"}
    replicated = small.run_on(2, "replicated", **flags)
    assert_same_run(replicated, small.run_on(2, shard, **flags, shard=shard))


@pytest.mark.parametrize("optimizer", marked(["q_galore_adamw8bit_per_layer", "adamw"], "adamw"))
def test_a_gathered_run_skips_what_one_rank_finds_not_finite(small: SmallRun, optimizer: str) -> None:
    flags: dict[str, object] = flags_of(optimizer) | {"batch_size": 2, "num_training_steps": 5, "save_every": 2}
    flags |= AT_ONCE | {"check_replicas": 1}
    fault = Fault("gradient", (3,), rank=1)
    replicated = outcome(small, "replicated", fault, 2, flags)
    assert_same_run(replicated, outcome(small, "full", fault, 2, flags | {"shard": "full"}))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard"), [(1, "none"), (2, "optimizer"), (2, "full"), (4, "full")])
def test_weights_of_owners_are_gone_on_with_in_any_mode(small: SmallRun, ranks: int, shard: str) -> None:
    """From the checkpoint of gathered layers as from that of replicated ones."""
    flags = STREAMING | AT_ONCE | {"num_training_steps": 3}
    small.run_on(2, "whole", **flags)
    small.run_on(2, "parts", **flags, shard="full")
    for name in ("whole", "parts"):
        again = flags | {"num_training_steps": 5, "continue_from": "auto", "batch_size": 4 // ranks}
        argv = small.argv(name, again)
        assert on_ranks(ranks, run_pretrain.main, [*argv, "--shard", shard]) == [0] * ranks
    assert_same_run(small.result("whole"), small.result("parts"))


def bytes_after_build(argv: list[str], folder: Path) -> None:
    """A rank that builds a run and writes what its weights take, and what it should take by the plan."""
    args, world, model, optimizer = build_on_rank(argv)
    stored = sum(each.nbytes() for each in storages([*model.parameters(), *model.buffers()]))
    elsewhere = sum(optimizer.is_elsewhere(param) for param in model.parameters())
    config = shape_of(args.model)
    assert config is not None
    planned = bytes_by_rank(PlannedRun(args, config), 2)[world.rank]
    (folder / f"bytes_{world.rank}.json").write_text(json.dumps([stored, elsewhere, planned.stored, planned.gathered]))
    world.close()


def test_no_rank_keeps_the_matrices_of_others(small: SmallRun) -> None:
    """But room for two layers, which the plan counts with the bases that are not there yet."""
    deep = json.loads(small.config.read_text()) | {"num_hidden_layers": 8}
    small.config.write_text(json.dumps(deep))
    argv = small.argv("run", FULL_RANK | {"shard": "full", "batch_size": 2})
    log = small.folder / "log"
    assert on_ranks(2, bytes_after_build, argv, small.folder, log=log) == [0, 0], log.read_text()
    found = [json.loads((small.folder / f"bytes_{rank}.json").read_text()) for rank in range(2)]
    tables_and_norms = 4 * (2 * deep["vocab_size"] + 2 * 8 + 1) * deep["hidden_size"]
    for stored, elsewhere, planned, gathered in found:
        room = planned + gathered
        assert room <= stored - tables_and_norms < 1.1 * room, "rows of 16 and parts of 256 bytes"
        assert elsewhere == 28
    assert 5 * found[0][3] < found[0][2] + found[1][2], "all matrices of eight layers"


def tensors_of(gradient: Gradient) -> list[Tensor]:
    return [gradient] if isinstance(gradient, Tensor) else [gradient.qdata, gradient.scale, gradient.zero_point]


def bytes_of_sums(argv: list[str], folder: Path) -> None:
    """A rank that has two micro-batches of an update, and writes what their sums take, and should take by the plan."""
    args, world, model, optimizer = build_on_rank(argv)
    optimizer.is_last_micro_batch = False
    for micro_batch in range(2):
        generator = torch.Generator().manual_seed(2 * micro_batch + world.rank)
        ids = torch.randint(0, 256, (2, 32), generator=generator)
        loss = model(ids, ids).loss_sum
        assert loss is not None
        loss.backward()
    sums = [
        each.stored
        for weight in optimizer.weights_of(model)
        for name, each in (weight.gradient._sums | weight.gradient._totals).items()
        if name == GRADIENT and not each.empty
    ]
    found = sum(each.nbytes() for each in storages([part for each in sums for part in tensors_of(each)]))
    config = shape_of(args.model)
    assert config is not None
    planned = lasting_bytes(run := PlannedRun(args, config))[GRADIENTS]
    own = bytes_by_rank(run, 2)[world.rank].sums
    (folder / f"bytes_{world.rank}.json").write_text(json.dumps([found, own, planned, str(run.sum_dtype)]))
    world.close()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("mode", [*OWNERS, "rank"])
def test_sums_take_what_the_plan_says(small: SmallRun, mode: str, dtype: str) -> None:
    """Those of embeddings and head, which are dealt by rows, too; of `--shard_sums rank` every rank has all."""
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | {"vocab_size": 4099}))
    flags = FULL_RANK | {"batch_size": 2, "grad_accum_dtype": dtype} | OWNERS.get(mode, {"shard": "optimizer"})
    log = small.folder / "log"
    assert on_ranks(2, bytes_of_sums, small.argv("run", flags), small.folder, log=log) == [0, 0], log.read_text()
    found = [json.loads((small.folder / f"bytes_{rank}.json").read_text()) for rank in range(2)]
    for nbytes, own, planned, summed_in in found:
        assert summed_in == f"torch.{dtype}"
        assert nbytes == (planned if mode == "rank" else own)
    if mode != "rank":
        assert max(own for _, own, *_ in found) == found[0][2], "the plan is of the fullest rank"


STOPPED: dict[str, dict[str, object]] = {
    "owners_sum": STREAMING | {"shard": "full"},
    "by_layer": STREAMING | {"shard": "full", "accumulate_by": "layer"},
    "owners_momenta": FULL_RANK | {"shard": "optimizer", "sum_in_momentum": True, "lr": 1e-2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(small: SmallRun, case: str) -> None:
    flags = STOPPED[case] | {"num_training_steps": 6, "eval_every": 3, "batch_size": 2}
    whole = small.run_on(2, "whole", **flags)
    argv = small.argv("parts", flags | {"continue_from": "auto"})
    assert on_ranks(2, stop_after, 3, argv) == [0, 0]
    assert on_ranks(2, run_pretrain.main, argv) == [0, 0]
    assert_same_run(whole, small.result("parts"))


# ---- embeddings and head


BY_ROWS: dict[str, dict[str, object]] = {
    "q_galore": PER_LAYER | AT_ONCE,
    "full_rank": FULL_RANK | {"full_rank_second_moment": "row", "norm_growth": 0},
    "adam8bit": flags_of("adam8bit") | {"grad_accum_dtype": "bfloat16"},
    "int8_sums": STREAMING | {"grad_accum_dtype": "int8"},
    "adam": flags_of("adam") | {"weight_decay": 0.1},
    "limited": PER_LAYER | AT_ONCE | {"norm_growth": 1.01, "lr": 1.0, "adam_eps": 1.0},
    "clipping": flags_of("galore_adamw") | {"grad_clipping": 0.5, "lr": 1.0, "adam_eps": 1.0},
}
"""Of the last two the norm of a gradient is a factor, and that of rows is summed in another order."""


@pytest.mark.parametrize("case", marked(BY_ROWS, "q_galore", "int8_sums"))
def test_embeddings_and_head_are_dealt_by_rows(small: SmallRun, case: str) -> None:
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | {"vocab_size": 4099}))
    flags = {"batch_size": 2, "num_training_steps": 4, "check_replicas": 1, "save_every": 2} | BY_ROWS[case]
    replicated = small.run_on(2, "replicated", **flags)
    sharded = small.run_on(2, "sharded", **flags, shard="optimizer")
    one, two = replicated.checkpoint(), sharded.checkpoint()
    if case in ("limited", "clipping"):
        assert sharded.losses == pytest.approx(replicated.losses, rel=1e-6)
        assert_close_weights(sharded, replicated, 1e-4)
    else:
        assert sharded.losses == replicated.losses
        assert_same_bits(one.model_tensors, two.model_tensors, "model")
        assert_same_bits(one.optimizer_state, two.optimizer_state, "optimizer")
    norms = [[line["train/grad_norm"] for line in run.train_lines] for run in (sharded, replicated)]
    # Sums of a quarter of a million squares in float32.
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    part = stored_tensors(sharded.checkpoints[-1] / "optimizer_00001.safetensors")
    moments = {name: each.shape for name, each in part.items() if name.endswith("/exp_avg")}
    assert [shape for shape in moments.values() if shape[0] in (2047, 2051)], "rows of both tables, as whole blocks"
    small.copy("sharded", "alone")  # of which one rank makes the whole again
    again = flags | {"num_training_steps": 5, "batch_size": flags.get("total_batch_size", 8), "continue_from": "auto"}
    for name in ("replicated", "alone"):
        small.run(name, **again)
    if case not in ("limited", "clipping"):
        assert_same_bits(
            small.result("replicated").checkpoint().model_tensors, small.result("alone").checkpoint().model_tensors
        )


@pytest.mark.slow
def test_a_rank_that_owns_rows_alone_saves_them(small: SmallRun) -> None:
    """A layer has seven matrices: of eight ranks one has rows of embeddings and head, and no matrix."""
    small.config.write_text(
        json.dumps(json.loads(small.config.read_text()) | {"vocab_size": 4099, "num_hidden_layers": 1})
    )
    flags = PER_LAYER | {"num_training_steps": 2, "shard": "optimizer", "batch_size": 1}
    run = small.run_on(8, "run", **flags)
    state = run.checkpoint().optimizer_state["state"]
    tables = [each["exp_avg"].shape for each in state.values() if each["exp_avg"].shape[0] == 4099]
    assert len(tables) == 2
    again = small.run(
        "run", **flags | {"num_training_steps": 3, "shard": "none", "batch_size": 8, "continue_from": "auto"}
    )
    assert again.checkpoint().update_step == 3


@pytest.mark.parametrize("where", marked(["gradient", "loss"], "gradient"))
@pytest.mark.parametrize("optimizer", marked(["q_galore_adamw8bit_per_layer", "adamw", "sgd"], "adamw"))
def test_what_one_rank_finds_not_finite_all_skip(small: SmallRun, optimizer: str, where: str) -> None:
    """Per layer the gradient of the lowest weight comes too late, and the run goes back."""
    flags: dict[str, object] = flags_of(optimizer) | {"batch_size": 4, "num_training_steps": 5, "save_every": 2}
    fault = Fault(where, (3,), rank=1)
    replicated = outcome(small, "replicated", fault, 2, flags | {"check_replicas": 1})
    sharded = outcome(small, "sharded", fault, 2, flags | {"check_replicas": 1, "shard": "optimizer"})
    assert_same_run(replicated, sharded)
    goes_back = where == "gradient" and optimizer.endswith("per_layer")
    assert ("going back" in (small.folder / "sharded.log").read_text()) == goes_back
    assert goes_back or [line["train/skipped"] for line in sharded.train_lines] == [0, 0, 0, 1, 0]


# ---- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_a_checkpoint_in_parts_is_gone_on_with_by_any_ranks(small: SmallRun, ranks: int, shard: str) -> None:
    """As from one file: the run that goes on cannot tell who wrote what it reads."""
    flags = STREAMING | {"num_training_steps": 3, "total_batch_size": 8}
    small.run_on(2, "whole", **flags)
    small.run_on(2, "parts", **flags, shard="optimizer")
    for name in ("whole", "parts"):
        argv = small.argv(name, flags | {"num_training_steps": 5, "continue_from": "auto", "batch_size": 2})
        assert on_ranks(ranks, run_pretrain.main, [*argv, "--shard", shard]) == [0] * ranks
    assert small.result("parts").checkpoint().update_step == 5
    assert_same_run(small.result("whole"), small.result("parts"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["q_galore_adamw8bit_per_layer", "adafactor", "muon"])
def test_a_stopped_run_goes_on_with_the_same_bits(small: SmallRun, case: str) -> None:
    flags = flags_of(case) | {"num_training_steps": 6, "eval_every": 3, "batch_size": 2, "shard": "optimizer"}
    whole = small.run_on(2, "whole", **flags)
    argv = small.argv("parts", flags | {"continue_from": "auto"})
    assert on_ranks(2, stop_after, 3, argv) == [0, 0]
    assert on_ranks(2, run_pretrain.main, argv) == [0, 0]
    assert_same_run(whole, small.result("parts"))


def main_that_waits_for_the_next_update(argv: list[str]) -> int:
    """A rank whose files are not written before the update after the save has been made."""
    update, write, made = run_pretrain.Run.update, Unfinished.write, threading.Event()

    def update_and_note(run: run_pretrain.Run) -> bool:
        goes_on = update(run)
        if run.update_step == 2:
            made.set()
        return goes_on

    def write_later(unfinished: Unfinished, number: int, *part: Any) -> Part:
        if unfinished.target.name == "step_00000002":
            assert made.wait(60), "training stood still"
        return write(unfinished, number, *part)

    run_pretrain.Run.update = update_and_note  # type: ignore[method-assign]
    Unfinished.write = write_later  # type: ignore[method-assign]
    return run_pretrain.main(argv)


@pytest.mark.parametrize("shard", marked(["optimizer", "full"], "optimizer"))
def test_training_goes_on_while_a_copy_is_written(small: SmallRun, shard: str) -> None:
    flags = PER_LAYER | AT_ONCE | {"num_training_steps": 4, "save_every": 2, "batch_size": 2}
    replicated = small.run_on(2, "replicated", **flags)
    argv = small.argv("sharded", flags | {"shard": shard})
    assert on_ranks(2, main_that_waits_for_the_next_update, argv) == [0, 0]
    one, two = replicated.checkpoint(2), small.result("sharded").checkpoint(2)
    assert_same_bits(one.model_tensors, two.model_tensors)
    assert_same_bits(one.optimizer_state, two.optimizer_state)
    assert_same_run(replicated, small.result("sharded"))


@pytest.mark.slow
def test_a_missing_or_damaged_part_is_named_and_an_older_checkpoint_taken(small: SmallRun) -> None:
    flags = PER_LAYER | {"num_training_steps": 4, "save_every": 2, "shard": "optimizer", "batch_size": 2}
    whole = small.run_on(2, "run", **flags)
    before = whole.checkpoint()
    newest = whole.checkpoints[-1]
    for name in ("optimizer_00001.safetensors", "model_00001.safetensors", "optimizer_00001.json"):
        kept = small.folder / "kept"
        shutil.copytree(newest, kept)
        (newest / name).unlink()
        log = small.folder / f"log_{name}"
        argv = small.argv("run", flags | {"continue_from": "auto"})
        assert on_ranks(2, run_pretrain.main, argv, log=log) == [0, 0]
        assert f"step_00000004 refused: {name} is missing: take an older checkpoint" in log.read_text()
        again = small.result("run").checkpoint()
        assert_same_bits(again.model_tensors, before.model_tensors)
        assert_same_bits(again.optimizer_state, before.optimizer_state)
        shutil.rmtree(kept)


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Of tensors, each once."""
    return list({each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}.values())


def loads_its_own_part(argv: list[str], folder: Path) -> None:
    """A rank that makes an update and loads the state that it then has, which is not the whole one."""
    args, world = parse_args(argv, 2), start_world("cpu", StopRequest())
    model, optimizer = build_training(args, world.device, None, world.shard_mesh("optimizer"))
    optimizer.load_state_dict(optimizer.state_dict())  # of no update yet
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(world.rank))
    model(ids, ids).loss_sum.backward()
    optimizer.step()
    optimizer.zero_grad()
    try:
        optimizer.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        (folder / f"refused_{world.rank}").write_text(str(error))
    world.close()


def test_the_state_of_one_rank_is_refused_in_a_sentence(small: SmallRun) -> None:
    log = small.folder / "log"
    argv = small.argv("run", {"shard": "optimizer"})
    assert on_ranks(2, loads_its_own_part, argv, small.folder, log=log) == [0, 0], log.read_text()
    for rank in range(2):
        assert "of one rank alone" in (small.folder / f"refused_{rank}").read_text()


# ---- CUDA graphs, as recorded on a CPU


def losses_and_hash(folder: Path, flags: str, graphs: bool, owners_sum: bool, shard: str) -> None:
    """A rank that trains a little, and writes what came of it."""
    world = start_world("cpu", StopRequest())
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            test_layer_graphs.record_graphs(patch)
        else:
            test_layer_graphs.skip_for_kernels(patch)
        mesh = world.shard_mesh(shard)
        assert mesh is not None
        mesh.owners_sum = owners_sum
        own = folder / f"of_rank_{world.rank}"  # a folder in which no other rank writes the model's configuration
        own.mkdir(exist_ok=True)
        losses, digest, model = test_layer_graphs.trained(own, "cpu", f"{flags} --shard {shard}", mesh=mesh)
        assert not graphs or model.model.run_layers.replays or (owners_sum and "accumulation" not in flags)
    (folder / f"{'graphs' if graphs else 'plain'}_{world.rank}.json").write_text(json.dumps([losses, digest]))
    world.close()


GRAPHS = ["streaming", "svd", "full rank", "fira, limited", "int8 sums", "clipping"]
GRAPHS_OF_OWNERS = ["sums", "int8 sums", "bfloat16 sums, svd", "clipping"]
GRAPHS_OF_GATHERED = ["streaming", "checkpointing", "full rank", "svd", "sums", "clipping"]
CASES_OF_GRAPHS = [
    *((case, False, "optimizer") for case in GRAPHS),
    *((case, True, "optimizer") for case in GRAPHS_OF_OWNERS),
    *((case, False, "full") for case in GRAPHS_OF_GATHERED),
    *((case, True, "full") for case in GRAPHS_OF_OWNERS),
]
QUICK_GRAPHS = {("streaming", False, "optimizer"), ("sums", True, "optimizer"), ("streaming", False, "full")}


@pytest.mark.parametrize(
    ("case", "owners_sum", "shard"),
    [pytest.param(*each, marks=[] if each in QUICK_GRAPHS else pytest.mark.slow) for each in CASES_OF_GRAPHS],
)
def test_graphs_of_dealt_weights_give_the_bits_of_plain_calls(
    case: str, owners_sum: bool, shard: str, tmp_path: Path
) -> None:
    flags = f"{test_layer_graphs.CASES[case]} --dtype float32"
    for graphs in (False, True):
        log = tmp_path / "log"
        assert on_ranks(2, losses_and_hash, tmp_path, flags, graphs, owners_sum, shard, log=log) == [0, 0], (
            log.read_text()
        )
    for rank in range(2):
        assert (tmp_path / f"plain_{rank}.json").read_text() == (tmp_path / f"graphs_{rank}.json").read_text()
