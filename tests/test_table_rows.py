"""With `--shard full` a rank keeps its rows of embeddings and head, and a pass has the whole of them for a moment."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import run_pretrain
from benchmarks.bench_scaling import counted_bytes
from peft_pretraining.accumulation.layer_by_layer import LayerByLayer
from peft_pretraining.build import shape_of
from peft_pretraining.checkpoint.tensor_file import stored_tensors
from peft_pretraining.checkpoint.weight_source import open_source
from peft_pretraining.memory.lasting import lasting_bytes
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.ops.linear_cross_entropy import linear_cross_entropy
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import start_world
from qgalore.sharding.deal import row_ranges
from tests import test_layer_graphs
from tests.small_run import CONFIG, FULL_RANK, Result, SmallRun, assert_same_bits, build_on_rank, flags_of, on_ranks
from tests.test_data_parallel import assert_close_weights, stop_after
from tests.test_sharding import AT_ONCE, STREAMING, marked, storages
from tests.test_skipped_updates import Fault, outcome

VOCABULARY, HIDDEN = 4099, 64
TABLE_BYTES = 4 * VOCABULARY * HIDDEN
"""Of one table in float32; its rows are dealt as 2,051 and 2,048, whole blocks of an 8-bit state."""


@pytest.fixture
def large(tmp_path: Path) -> SmallRun:
    """A run whose tables are large enough to be dealt by rows."""
    return with_config(SmallRun(tmp_path, layers=2))


def with_config(small: SmallRun, **changed: object) -> SmallRun:
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | {"vocab_size": VOCABULARY} | changed))
    return small


# ---- the bits of ranks that have all rows

SEVERAL: dict[str, object] = {"accumulate_by": "layer", "batch_size": 1}
CASES: dict[str, dict[str, object]] = {
    "at_once": STREAMING | AT_ONCE,
    "full_rank": FULL_RANK | AT_ONCE | {"full_rank_second_moment": "row", "norm_growth": 0},
    "bfloat16": STREAMING | AT_ONCE | {"dtype": "bfloat16"},
    "adam": flags_of("adam") | AT_ONCE | {"weight_decay": 0.1},
    "by_layer": STREAMING | SEVERAL,
    "by_layer_at_the_end": flags_of("adamw") | SEVERAL | {"grad_accum_dtype": "bfloat16"},
    "by_layer_alone": STREAMING | AT_ONCE | {"accumulate_by": "layer"},
}
SHAPES: dict[str, dict[str, object]] = {
    "two_tables": {},
    "tied": {"tie_word_embeddings": True},
    "one_layer": {"num_hidden_layers": 1},
}
QUICK = [("at_once", "tied"), ("by_layer", "two_tables")]
PAIRS = [(case, "two_tables") for case in CASES] + [(case, "tied") for case in ("at_once", "bfloat16", "by_layer")]
PAIRS += [("by_layer", "one_layer")]


@pytest.mark.parametrize(
    ("case", "shape"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_rows_have_the_bits_of_whole_tables(large: SmallRun, case: str, shape: str) -> None:
    """Also in evaluations, of which one rank has more batches than the other."""
    with_config(large, **SHAPES[shape])
    flags: dict[str, object] = {"batch_size": 2, "num_training_steps": 4, "check_replicas": 1, "save_every": 2}
    flags |= {"eval_every": 2} | CASES[case] | {"eval_batch_size": 5}
    replicated = large.run_on(2, "replicated", **flags)
    assert_alike(replicated, large.run_on(2, "rows", **flags, shard="full"))


def assert_alike(replicated: Result, other: Result) -> None:
    """But for the norm of rows, whose squares are added up in another order."""
    one, two = replicated.checkpoint(), other.checkpoint()
    assert one.update_step == two.update_step
    assert_same_bits(one.model_tensors, two.model_tensors, "model")
    assert_same_bits(one.optimizer_state, two.optimizer_state, "optimizer")
    assert len(replicated.lines) == len(other.lines)
    for before, line in zip(replicated.lines, other.lines, strict=True):
        norms = [
            each.pop("train/grad_norm", None) for each in (before, line)
        ]  # of one that is not finite there is none
        assert norms[0] == norms[1] if norms[0] is None else norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert before == line


SUMMED: dict[str, tuple[dict[str, object], float]] = {
    "sums": (flags_of("galore_adamw") | {"subspace": "streaming"}, 1e-3),
    "int8_sums": (flags_of("galore_adamw") | {"rotate_moments": True, "grad_accum_dtype": "int8"}, 0.1),
    "clipping": (flags_of("adamw") | {"grad_clipping": 0.5}, 1e-3),
}


@pytest.mark.parametrize("case", marked(SUMMED, "sums"))
def test_rows_are_trained_by_several_micro_batches(large: SmallRun, case: str) -> None:
    """As in `test_owners_sum_micro_batches`, whose shares these are: sums have another order."""
    flags, share = SUMMED[case]
    flags = flags | {"lr": 1.0, "adam_eps": 1.0, "batch_size": 1, "num_training_steps": 4, "save_every": 4}
    replicated = large.run_on(2, "replicated", **flags, check_replicas=1)
    rows = large.run_on(2, "rows", **flags, check_replicas=1, shard="full")
    assert rows.losses == pytest.approx(replicated.losses, abs=5e-4)
    assert_close_weights(rows, replicated, share)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("optimizer", ["q_galore_adamw8bit_per_layer", "adamw"])
def test_rows_of_a_skipped_update_stay(large: SmallRun, optimizer: str, where: str) -> None:
    flags: dict[str, object] = flags_of(optimizer) | {"batch_size": 2, "num_training_steps": 5, "save_every": 2}
    flags |= AT_ONCE | {"check_replicas": 1}
    fault = Fault(where, (3,), rank=1)
    replicated = outcome(large, "replicated", fault, 2, flags)
    assert_alike(replicated, outcome(large, "rows", fault, 2, flags | {"shard": "full"}))


# ---- what a rank has


def bytes_between_passes(argv: list[str], folder: Path) -> None:
    """A rank that trains, and writes what it has of the tables after each part of an update and in between."""
    args, world, model, optimizer = build_on_rank(argv)
    by_layer = LayerByLayer(model, optimizer) if args.by_layer else None
    tables = [model.get_parameter(name) for name in model.table_names]
    found: list[int] = []

    def count() -> None:
        """Memory of the tables, and of whatever else has as many values and is on its way to nobody."""
        kept = [optimizer.kept_rows(table) for table in tables]
        pieces = storages([*tables, *(rows[1] for rows in kept if rows is not None)])
        found.append(sum(piece.nbytes() for piece in pieces))

    count()
    model.decoder_layers[0].register_forward_pre_hook(lambda *_: count())
    for step in range(2):
        batches = []
        for number in range(2):
            generator = torch.Generator().manual_seed(4 * step + 2 * number + world.rank)
            batches.append(torch.randint(0, VOCABULARY, (2, 32), generator=generator))
        if by_layer is not None:
            by_layer.forward([(ids, ids) for ids in batches], lambda _: None, lambda: True)
            count()
            by_layer.backward(256, lambda _: None)
        for number, ids in enumerate(batches if by_layer is None else ()):
            optimizer.is_last_micro_batch = number == 1
            loss = model(ids, ids).loss_sum
            count()
            loss.backward()
            count()
        optimizer.step()
        optimizer.zero_grad()
        count()
        with torch.no_grad():
            model(batches[0])
        count()
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.shape == tables[0].shape]
    whole = [x for x in alive if x.untyped_storage().nbytes() >= TABLE_BYTES]
    config = shape_of(args.model)
    assert config is not None
    planned = lasting_bytes(PlannedRun(args, config))["embeddings, head, norms"]
    norms = 4 * (2 * config.num_hidden_layers + 1) * HIDDEN
    (folder / f"bytes_{world.rank}.json").write_text(json.dumps([found, len(whole), planned - norms]))
    world.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", marked(["micro_batches", "by_layer"], "micro_batches"))
def test_no_rank_has_whole_tables_between_passes(large: SmallRun, case: str, tied: bool) -> None:
    """Before, inside and after updates and evaluations; and as many bytes as the plan says of the fullest rank."""
    with_config(large, tie_word_embeddings=tied)
    flags = STREAMING | {"shard": "full", "batch_size": 2} | ({"accumulate_by": "layer"} if case == "by_layer" else {})
    log = large.folder / "log"
    argv = large.argv("run", flags)
    assert on_ranks(2, bytes_between_passes, argv, large.folder, log=log) == [0, 0], log.read_text()
    parts, count = row_ranges((VOCABULARY, HIDDEN), 2), 1 if tied else 2
    own = [count * 4 * (stop - start) * HIDDEN for start, stop in parts]
    assert sum(own) == count * TABLE_BYTES
    for rank, nbytes in enumerate(own):
        found, whole, planned = json.loads((large.folder / f"bytes_{rank}.json").read_text())
        # One value stands for all of a table that is not here.
        assert set(found) == {nbytes + 4 * count} and len(found) > 10
        assert whole == 0, "a whole table, or a gradient of one, is kept by somebody"
        assert planned == max(own)


def bytes_on_the_wire(argv: list[str], folder: Path, shard: str) -> None:
    """A rank that writes what it sends in an update after the first."""
    args, world, model, optimizer = build_on_rank(argv)
    for step in range(2):
        with counted_bytes() as sent:
            for number in range(args.batch.gradient_accumulation):
                optimizer.is_last_micro_batch = number + 1 == args.batch.gradient_accumulation
                ids = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(step))
                model(ids, ids).loss_sum.backward()
            optimizer.step()
            optimizer.zero_grad()
    (folder / f"{shard}_{world.rank}.json").write_text(json.dumps(sent[0]))
    world.close()


@pytest.mark.parametrize(("micro_batches", "passes"), [(1, 0), (3, 4)])
def test_tables_are_sent_once_a_pass_instead_of_once_an_update(
    large: SmallRun, micro_batches: int, passes: int
) -> None:
    """By count. Two layers fill two buffers, so that they are gathered once an update, and published once without."""
    flags = flags_of("adamw") | {"batch_size": 2, "gradient_accumulation": micro_batches, "total_batch_size": None}
    sent = {}
    for shard in ("optimizer", "full"):
        log = large.folder / "log"
        argv = large.argv("run", flags | {"shard": shard} | ({"shard_sums": "owner"} if shard == "optimizer" else {}))
        assert on_ranks(2, bytes_on_the_wire, argv, large.folder, shard, log=log) == [0, 0], log.read_text()
        sent[shard] = json.loads((large.folder / f"{shard}_0.json").read_text())
    # Of a broadcast each of two ranks sends a half.
    assert sent["full"] - sent["optimizer"] == passes * TABLE_BYTES / 2


# ---- checkpoints


@pytest.mark.parametrize(
    ("ranks", "shard"), [(1, "none"), *(pytest.param(*x, marks=pytest.mark.slow) for x in [(2, "none"), (3, "full")])]
)
def test_rows_are_saved_by_their_ranks_and_gone_on_with_by_any(large: SmallRun, ranks: int, shard: str) -> None:
    flags = STREAMING | {"num_training_steps": 2, "total_batch_size": 6, "data_lanes": 6}
    large.run_on(2, "whole", **flags | {"batch_size": 3})
    large.run_on(2, "rows", **flags | {"batch_size": 3}, shard="full")
    folder = large.result("rows").checkpoints[-1]
    name = "model.embed_tokens.weight"
    shapes = [stored_tensors(folder / f"model{part}.safetensors")[name].shape for part in ("", "_00001")]
    assert shapes == [(stop - start, HIDDEN) for start, stop in row_ranges((VOCABULARY, HIDDEN), 2)]
    source = open_source(str(folder))
    assert source.stored[name].shape == (VOCABULARY, HIDDEN)
    whole = large.result("whole").checkpoint().model_tensors
    assert_same_bits(whole, large.result("rows").checkpoint().model_tensors, "as qgalore export reads them")
    assert torch.equal(source.read(name), whole[name]), "read by --init_from"
    again = flags | {"num_training_steps": 4, "continue_from": "auto", "batch_size": 6 // ranks}
    for run in ("whole", "rows"):
        argv = large.argv(run, again)
        assert on_ranks(ranks, run_pretrain.main, [*argv, "--shard", shard]) == [0] * ranks
    assert_alike(large.result("whole"), large.result("rows"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_take_their_rows_of_weights_that_are_there(large: SmallRun, tied: bool) -> None:
    """Of a checkpoint of one rank, or of owners that each wrote whole tables, as `full` did before: gone on with,
    stopped and gone on with again, and as initial weights."""
    with_config(large, tie_word_embeddings=tied)
    flags = STREAMING | AT_ONCE | {"num_training_steps": 2}
    if tied:
        large.run("one", **flags | {"batch_size": 4})
    else:
        before = large.run_on(2, "one", **flags, shard="optimizer")
        parts = [before.checkpoints[-1] / f"model{part}.safetensors" for part in ("", "_00001")]
        shapes = [x.shape for part in parts for name, x in stored_tensors(part).items() if x.shape[0] == VOCABULARY]
        assert shapes == [(VOCABULARY, HIDDEN)] * 2
    more: dict[str, object] = {"num_training_steps": 5, "batch_size": 2, "continue_from": "auto"}
    large.copy("one", "rows")
    replicated = large.run_on(2, "one", **flags | more)
    argv = large.argv("rows", flags | more | {"shard": "full"})
    assert on_ranks(2, stop_after, 3, argv) == [0, 0]
    assert on_ranks(2, run_pretrain.main, argv) == [0, 0]
    assert_alike(replicated, large.result("rows"))
    begun: dict[str, object] = {"num_training_steps": 2, "init_from": large.result("rows").checkpoints[-1]}
    begun |= {"batch_size": 2, "save_every": 1}
    replicated = large.run_on(2, "begun_whole", **flags | begun)
    assert_alike(replicated, large.run_on(2, "begun_rows", **flags | begun | {"shard": "full"}))


# ---- the head's loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_spent_head_gives_the_same_bits_and_its_memory(
    dtype: torch.dtype, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_pretraining.models.ops import linear_cross_entropy as module

    tokens, hidden, vocabulary = 384, 16, 96
    monkeypatch.setattr(module, "CHUNK_BYTES", tokens // chunks * 128 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    values = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    results = []
    for spent in (False, True):
        inputs, weight = x.clone().requires_grad_(), nn.Parameter(values.clone())
        address = weight.data_ptr()
        loss = linear_cross_entropy(inputs, weight, targets, spent=spent)
        (loss / 7).backward()
        assert inputs.grad is not None and weight.grad is not None
        results.append([loss.detach(), inputs.grad, weight.grad])
        takes = spent and dtype != torch.float16 and (chunks == 1 or dtype == torch.bfloat16)
        assert (weight.grad.data_ptr() == address) == takes
        assert takes or torch.equal(weight, values)
    assert_same_bits(results[0], results[1])


# ---- CUDA graphs, as recorded on a CPU


def losses_and_hash(folder: Path, flags: str, graphs: bool, owners_sum: bool) -> None:
    """A rank that trains a little with large tables, and writes what came of it."""
    world = start_world("cpu", StopRequest())
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            test_layer_graphs.record_graphs(patch)
        else:
            test_layer_graphs.skip_for_kernels(patch)
        patch.setattr(test_layer_graphs, "CONFIG", CONFIG | {"vocab_size": VOCABULARY})
        mesh = world.shard_mesh("full")
        assert mesh is not None
        mesh.owners_sum = owners_sum
        losses, digest, model = test_layer_graphs.trained(folder, "cpu", f"{flags} --shard full", mesh=mesh)
        assert not graphs or model.model.run_layers.replays  # type: ignore[union-attr]
        assert not any(model.lm_head.weight.stride()), "whole for the loss alone"
    (folder / f"{'graphs' if graphs else 'plain'}_{world.rank}.json").write_text(json.dumps([losses, digest]))
    world.close()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "owners_sum"), [("streaming", False), ("sums", True)])
def test_graphs_beside_rows_give_the_bits_of_plain_calls(case: str, owners_sum: bool, tmp_path: Path) -> None:
    flags = f"{test_layer_graphs.CASES[case]} --dtype float32"
    for graphs in (False, True):
        log = tmp_path / "log"
        codes = on_ranks(2, losses_and_hash, tmp_path, flags, graphs, owners_sum, log=log)
        assert codes == [0, 0], log.read_text()
    for rank in range(2):
        assert (tmp_path / f"plain_{rank}.json").read_text() == (tmp_path / f"graphs_{rank}.json").read_text()
