"""Bytes that ranks send in an update, counted where they are sent; and rows of embeddings that are not sent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import run_pretrain
from benchmarks.bench_scaling import counted_bytes
from benchmarks.compare_methods import CHECKPOINTING, q_galore_flags, setting_of, training_parser
from peft_pretraining.build import converter_of, shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.dealt_states import looked_up_by_name, prepare_mesh
from peft_pretraining.memory.passing import ROWS_OF_ALL, PassingBytes
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import network_on_meta
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import start_world
from qgalore.optimizer import LowRankAdamW
from qgalore.sharding.bucket import OwnedBucket
from qgalore.sharding.deal import row_ranges
from qgalore.sharding.looked_up_rows import LookedUpRows, sends_rows
from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.shards import Shards
from qgalore.update.weight import Weight
from tests.small_run import SmallRun, on_ranks
from tests.test_sharding import AT_ONCE, STREAMING
from tests.test_table_rows import with_config

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def two_ranks() -> Iterator[ShardMesh]:
    """A mesh of which this process is the first of two ranks, and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # type: ignore[no-untyped-call]
    yield ShardMesh(init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()


def flags_of_the_rows(model: str, extra: str = "") -> RunArgs:
    """The training that `benchmarks/bench_scaling.py` measures, on two GPUs."""
    parsed = training_parser("", "", model, "scaling.csv").parse_args([])
    setting = setting_of(model, f"q_galore{CHECKPOINTING}", parsed, torch.device("cpu"))
    return parse_args([*q_galore_flags(setting), "--shard", "optimizer", *extra.split()], 2)


def dealt(args: RunArgs, mesh: ShardMesh) -> tuple[Shards, list[Weight]]:
    """All weights of a run's model, dealt to ranks, without memory."""
    config = shape_of(args.model)
    assert config is not None
    prepare_mesh(mesh, args)
    model, convert = network_on_meta(config), converter_of(args)
    for param in model.parameters():
        param.data = param.data.to(torch.bfloat16)
    for name, _ in list(model.named_modules()):
        convert(model, name)
    optimizer = build_optimizer(model, args.optimizer, args.subspace, 0, mesh=mesh)
    assert isinstance(optimizer, LowRankAdamW)
    shards = optimizer.cycle.ranks
    assert isinstance(shards, Shards)
    return shards, optimizer.weights_of(model)


def wire_ratio(args: RunArgs, mesh: ShardMesh) -> float:
    """What a rank sends of gradients and weights in an update, beside the all-reduce of the bfloat16 gradient."""
    shards, weights = dealt(args, mesh)
    with counted_bytes() as sent:
        for weight in weights:
            gradient = torch.empty(weight.subspace.gradient_shape, dtype=torch.bfloat16, device="meta")
            shards.bucket([weight], [[gradient]], None).start()
        for weight in weights:
            shards.publish([weight], None)  # type: ignore[arg-type]  # which are of refreshes alone
        shards.finish()
    values = sum(weight.shape.numel() for weight in weights)
    return sent[0] / (2 * values)  # of which two ranks send all, each a half twice


def test_optimizer_states_of_7b_on_two_ranks_cost_two_fifths_of_an_all_reduce(two_ranks: ShardMesh) -> None:
    """An update of one micro-batch, as in scaling.csv. The codes are 0.240, their scales 0.004, gradients 0.120."""
    args = flags_of_the_rows("7b")
    ratio = wire_ratio(args, two_ranks)
    assert args.tokens_sent_at_once == 16 * 256 and ratio <= 0.4
    # Beside these the embeddings' rows of one micro-batch, and the head's gradient, and the weights of both.
    values, table = 6_738_415_616, 32_000 * 4096
    matrices = values - 2 * table - 65 * 4096
    codes, gradients = matrices * (1 + 4 / 256), 2 * 32 * 1024 * (4 * 4096 + 3 * 11008)
    tables = 2 * 2 * 2 * table + 2 * 2 * 65 * 4096 - 2 * table + 2 * 4096 * (2 * 4096 + 8)
    assert ratio == pytest.approx((codes + gradients + tables) / (4 * values), rel=1e-6)


def test_all_rows_are_sent_where_most_are_looked_up(two_ranks: ShardMesh) -> None:
    """As with 16 micro-batches that each rank sums."""
    micro_batches = "--gradient_accumulation 16 --total_batch_size 512"
    args = flags_of_the_rows("7b", micro_batches)
    assert args.tokens_sent_at_once == 16 * 16 * 256
    assert wire_ratio(args, two_ranks) == pytest.approx(0.4031, abs=1e-4)
    by_owners = flags_of_the_rows("7b", f"{micro_batches} --shard_sums owner")
    assert by_owners.tokens_sent_at_once == 16 * 256  # of each micro-batch


def test_of_a_tied_table_all_rows_have_gradients(tmp_path: Path) -> None:
    args = flags_of_the_rows("60m")
    assert looked_up_by_name(args) == {EMBEDDINGS: args.batch.batch_size * 256}
    tied = json.loads(Path(args.model.model_config).read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied.json").write_text(json.dumps(tied))
    assert looked_up_by_name(flags_of_the_rows("60m", f"--model_config {tmp_path / 'tied.json'}")) == {}


# ---- what becomes of the rows

ROWS, COLUMNS, LOOKED_UP = 4099, 64, 96


def gradient_of(rank: int, dtype: torch.dtype, looked_up: int = LOOKED_UP) -> Tensor:
    """That of a table in which a rank has looked up rows, some of them those of other ranks."""
    generator = torch.Generator().manual_seed(rank)
    numbers = torch.cat([torch.arange(8), torch.randperm(ROWS - 8, generator=generator)[: looked_up - 8] + 8])
    gradient = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    gradient[numbers] = torch.randn(looked_up, COLUMNS, generator=generator).mul(8).to(dtype)
    gradient[numbers[:4], ::2] = -0.0
    return gradient


def summed_both_ways(folder: Path, dtype: torch.dtype, special: float, replicas: int) -> None:
    """A rank that compares what it gets of rows that are sent with what it gets of a reduce of all.

    Bit for bit, but for the sign of zeros. Of more ranks than two gradients are whole numbers, whose sums are exact in
    every order.
    """
    world = start_world("cpu", StopRequest())
    mesh = ShardMesh(init_device_mesh("cpu", (replicas, world.world_size // replicas)))
    weight = Weight(torch.empty(ROWS, COLUMNS, dtype=dtype), seed=0)
    weight.name, weight.rows = EMBEDDINGS, row_ranges((ROWS, COLUMNS), mesh.size)[mesh.rank]
    mesh.looked_up = {EMBEDDINGS: LOOKED_UP}
    found = []
    for kind in (OwnedBucket, LookedUpRows):
        gradient = gradient_of(world.rank, dtype)
        gradient = gradient if world.world_size == 2 else gradient.round()
        gradient[5, 7] = special if world.rank == 1 else 1.0
        assert sends_rows([weight], [[gradient]], mesh)
        bucket = kind([weight], [[gradient]], mesh)
        with counted_bytes() as sent:
            bucket.start()
        [[rows]] = bucket.summed()
        assert rows.shape == (weight.rows[1] - weight.rows[0], COLUMNS)
        found.append(((rows + 0.0).view(torch.int16), sent[0]))
    (reduced, all_rows), (added, some_rows) = found
    assert reduced.equal(added), (reduced != added).sum()
    share, itemsize = (mesh.size - 1) / mesh.size, dtype.itemsize
    assert all_rows == ROWS * COLUMNS * itemsize * share
    assert some_rows == (mesh.size - 1) * LOOKED_UP * (COLUMNS * itemsize + 8)
    (folder / f"done_{world.rank}").touch()
    world.close()


@pytest.mark.parametrize("special", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_add_up_to_the_bits_of_a_reduce(dtype: torch.dtype, special: float, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert on_ranks(2, summed_both_ways, tmp_path, dtype, special, 1, log=log) == [0, 0], log.read_text()
    assert len(list(tmp_path.glob("done_*"))) == 2


@pytest.mark.parametrize("replicas", [1, 2])
def test_rows_of_four_ranks_add_up_to_those_of_a_reduce(replicas: int, tmp_path: Path) -> None:
    """Also where owners are replicated: two by two ranks."""
    log = tmp_path / "log"
    found = on_ranks(4, summed_both_ways, tmp_path, torch.bfloat16, float("inf"), replicas, log=log)
    assert found == [0] * 4, log.read_text()
    assert len(list(tmp_path.glob("done_*"))) == 4


def more_rows_than_said(folder: Path) -> None:
    """A rank of two, of which the other has looked up one row more than was said."""
    world = start_world("cpu", StopRequest())
    mesh = world.shard_mesh("optimizer")
    assert mesh is not None
    weight = Weight(torch.empty(ROWS, COLUMNS), seed=0)
    weight.name, weight.rows = EMBEDDINGS, row_ranges((ROWS, COLUMNS), mesh.size)[mesh.rank]
    mesh.looked_up = {EMBEDDINGS: LOOKED_UP}
    bucket = LookedUpRows([weight], [[gradient_of(mesh.rank, torch.float32, LOOKED_UP + mesh.rank)]], mesh)
    bucket.start()
    [[rows]] = bucket.summed()
    (folder / f"finite_{mesh.rank}").write_text(str(bool(rows.isfinite().all())))
    world.close()


def test_a_row_too_many_is_not_lost_in_silence(tmp_path: Path) -> None:
    """The rank that owns the first rows finds a gradient that is not finite, for which all skip the update."""
    log = tmp_path / "log"
    assert on_ranks(2, more_rows_than_said, tmp_path, log=log) == [0, 0], log.read_text()
    assert (tmp_path / "finite_0").read_text() == "False"


# ---- the memory that they take


def bytes_in_a_run(argv: list[str], folder: Path) -> int:
    """A rank that trains, and writes what rows of all ranks and the gradient took, and what the plan has for both."""
    start, found = LookedUpRows.start, set[tuple[int, int]]()

    def start_and_count(bucket: LookedUpRows) -> None:
        start(bucket)
        found.add((bucket._rows.nbytes + bucket._numbers.nbytes, bucket.buffer.nbytes))

    with mock.patch.object(LookedUpRows, "start", start_and_count):
        code = run_pretrain.main(argv)
    args = parse_args(argv, 2)
    config = shape_of(args.model)
    assert config is not None
    ((rows, gradient),) = found
    passing = PassingByLayer if args.by_layer else PassingBytes
    planned = passing(PlannedRun(args, config))
    numbers = [rows, gradient, planned.rows_of_embeddings(), planned.phases()[ROWS_OF_ALL]]
    (folder / f"bytes_{os.environ['RANK']}.json").write_text(json.dumps(numbers))
    return code


SUMS: dict[str, dict[str, object]] = {
    "one": STREAMING | AT_ONCE,
    "int8": STREAMING | {"batch_size": 1, "grad_accum_dtype": "int8"},
    "owner": STREAMING | {"batch_size": 1, "shard_sums": "owner"},
    "by_layer": STREAMING | {"batch_size": 1, "accumulate_by": "layer"},
}


@pytest.mark.parametrize("case", SUMS)
def test_rows_take_the_memory_that_is_planned(case: str, tmp_path: Path) -> None:
    """In the dtype in which the sum is sent: of one micro-batch and from INT8 sums bfloat16, else float32."""
    small, log = with_config(SmallRun(tmp_path)), tmp_path / "log"
    flags = {"batch_size": 2, "num_training_steps": 2, "shard": "optimizer", "dtype": "bfloat16"} | SUMS[case]
    assert on_ranks(2, bytes_in_a_run, small.argv("run", flags), tmp_path, log=log) == [0, 0], log.read_text()
    for rank in range(2):
        rows, gradient, planned_rows, phase = json.loads((tmp_path / f"bytes_{rank}.json").read_text())
        assert rows == planned_rows and phase >= rows + gradient
