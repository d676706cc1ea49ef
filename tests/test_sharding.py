"""Ranks to which weights are dealt hold the bits of ranks that each have everything, and save them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import start_world
from tests import test_layer_graphs
from tests.small_run import FULL_RANK, OPTIMIZERS, RECIPE, SmallRun, assert_same_run, flags_of, on_ranks

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
    "relora": {"method": "relora", "relora_every": 3, "rank": 8, "optimizer": "adam", "lr": 1e-2},
}


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


@pytest.mark.parametrize("case", CASES)
def test_updates_of_one_micro_batch(small: SmallRun, case: str) -> None:
    assert_sharding_changes_nothing(small, CASES[case] | AT_ONCE)


@pytest.mark.parametrize("case", CASES | SUMMED)
def test_updates_of_several_micro_batches(small: SmallRun, case: str) -> None:
    assert_sharding_changes_nothing(small, (CASES | SUMMED)[case])


# ---- CUDA graphs, as recorded on a CPU


def losses_and_hash(folder: Path, flags: str, graphs: bool) -> None:
    """A rank that trains a little, and writes what came of it."""
    world = start_world("cpu", StopRequest())
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            test_layer_graphs.record_graphs(patch)
        else:
            test_layer_graphs.skip_for_kernels(patch)
        losses, digest, model = test_layer_graphs.trained(folder, "cpu", flags, mesh=world.shard_mesh("optimizer"))
        assert not graphs or model.model.run_layers.replays
    (folder / f"{'graphs' if graphs else 'plain'}_{world.rank}.json").write_text(json.dumps([losses, digest]))
    world.close()


@pytest.mark.parametrize("case", ["streaming", "svd", "full rank", "fira, limited", "int8 sums", "clipping"])
def test_graphs_of_dealt_weights_give_the_bits_of_plain_calls(case: str, tmp_path: Path) -> None:
    flags = f"{test_layer_graphs.CASES[case]} --dtype float32"
    for graphs in (False, True):
        log = tmp_path / "log"
        assert on_ranks(2, losses_and_hash, tmp_path, flags, graphs, log=log) == [0, 0], log.read_text()
    for rank in range(2):
        assert (tmp_path / f"plain_{rank}.json").read_text() == (tmp_path / f"graphs_{rank}.json").read_text()
