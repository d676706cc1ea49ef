"""Layers of which something waits in host memory have the bits of those that stay, and their memory is what is planned.

On a CPU "device" and "host" are both its memory, and copies, slots and their lifetimes are those of a GPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from peft_pretraining.build import build_training
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.optim import layer_execution
from qgalore.graphs.runner import LayerGraphs
from qgalore.offload import hosted, offload
from qgalore.offload.hosted import Hosted
from qgalore.offload.page_locked import PageLockError
from qgalore.optimizer import LowRankAdamW
from tests import test_layer_graphs
from tests.small_run import (
    CONFIG,
    FULL_RANK,
    OPTIMIZERS,
    RECIPE,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    flags_of,
)
from tests.test_hidden_states import ClockedStreams, RaceError
from tests.test_layer_graphs import record_graphs, trained
from tests.test_skipped_updates import Fault, outcome

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
STREAMING = PER_LAYER | {"subspace": "streaming"}
LIBRARIES = ("sgd", "adafactor", "muon")
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS if name not in LIBRARIES} | {
    "streaming": STREAMING,
    "recipe": PER_LAYER | RECIPE,
    "full_rank": {**FULL_RANK},
    "int4_weights": FULL_RANK | {"weight_bits": 4},
    "momentum_in_parts": FULL_RANK | {"momentum_rank": "1/8"},
    "sum_in_momentum": FULL_RANK | {"sum_in_momentum": True},
    "fira": STREAMING | {"residual": "fira", "norm_growth": 1.01},
    "lazy": PER_LAYER | {"cos_threshold": 0.0, "queue_size": 2, "update_proj_gap": 1},
    "clipping": flags_of("galore_adamw8bit") | {"grad_clipping": 0.5},
    "checkpointing": STREAMING | {"activation_checkpointing": True},
}
WAYS: dict[str, dict[str, object]] = {
    "summed": {},
    "at_once": {"batch_size": 8},
    "by_layer": {"accumulate_by": "layer"},
}
QUICK = {("streaming", "summed"), ("full_rank", "at_once"), ("adam8bit", "by_layer")}
QUANTIZED = [case for case, flags in CASES.items() if flags.get("weight_quant") or case == "recipe"]


def in_each_way(cases: Iterable[str]) -> list[tuple[str, str]]:
    """Cases with ways that go with them."""
    return [each for each in itertools.product(cases, WAYS) if each != ("sum_in_momentum", "by_layer")]


def every(cases: Iterable[str]) -> list[Any]:
    """`in_each_way`, of which only some are tried in every change."""
    return [
        pytest.param(*each, id="-".join(each), marks=() if each in QUICK else pytest.mark.slow)
        for each in in_each_way(cases)
    ]


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    """Three layers, for two slots."""
    return SmallRun(tmp_path, layers=3)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that is given back is garbage at once, and nobody finds it filled."""
    leave = Hosted.leave

    def leave_and_poison(self: Hosted, index: int, written: bool) -> None:
        slot = self._slot(index)
        inside = slot.inside and slot.layer == index
        leave(self, index, written)
        if inside and slot.buffer is not None:
            slot.buffer.fill_(0xA5)
            slot.layer = None

    monkeypatch.setattr(Hosted, "leave", leave_and_poison)


def assert_offloading_changes_nothing(small: SmallRun, flags: dict[str, object], what: str) -> None:
    flags = {"num_training_steps": 6, "save_every": 3, "eval_every": 2} | flags
    assert_same_run(small.run("stays", **flags), small.run("waits", **flags, offload=what))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "way"), every(CASES))
def test_states_that_wait_have_the_bits_of_those_that_stay(small: SmallRun, case: str, way: str) -> None:
    assert_offloading_changes_nothing(small, CASES[case] | WAYS[way], "states")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "way"), every(QUANTIZED))
def test_weights_that_wait_have_the_bits_of_those_that_stay(small: SmallRun, case: str, way: str) -> None:
    assert_offloading_changes_nothing(small, CASES[case] | WAYS[way], "weights")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["states", "weights"])
def test_two_ranks_each_with_its_host(small: SmallRun, what: str) -> None:
    flags = STREAMING | {"batch_size": 2, "num_training_steps": 5, "check_replicas": 1, "save_every": 5}
    flags |= {"total_batch_size": 4, "eval_every": 3}
    assert_same_run(small.run_on(2, "stays", **flags), small.run_on(2, "waits", **flags, offload=what))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", ["at_once", pytest.param("by_layer", marks=pytest.mark.slow)])
def test_a_run_may_switch_when_it_is_resumed(small: SmallRun, way: str) -> None:
    """Stopped and gone on with in any mode, from a checkpoint of any: all with the bits of an uninterrupted run."""
    flags = STREAMING | WAYS[way] | {"num_training_steps": 7}
    whole = small.run("whole", **flags)
    modes = ("weights", "states", "none", "weights")
    for first, second in itertools.pairwise(modes):
        name = f"{first}_{second}"
        small.stop(name, 4, **flags, offload=first)
        resumed = small.run(name, **flags, offload=second, continue_from="auto")
        assert_same_bits(whole.checkpoint().model_tensors, resumed.checkpoint().model_tensors)
        assert_same_bits(whole.checkpoint().optimizer_state, resumed.checkpoint().optimizer_state)
        assert whole.losses == resumed.losses


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_skipped_and_late_updates_are_skipped_alike(small: SmallRun) -> None:
    flags: dict[str, object] = STREAMING | {"batch_size": 8, "num_training_steps": 7, "save_every": 2}
    fault = Fault("gradient", (3, 4))
    stays = outcome(small, "stays", fault, 1, flags)
    assert_same_run(stays, outcome(small, "waits", fault, 1, flags | {"offload": "weights"}))


@pytest.mark.parametrize(
    ("case", "what", "sums"),
    [
        ("streaming", "states", True),
        ("full rank", "states", False),
        ("streaming", "weights", False),
        ("checkpointing", "weights", False),
        pytest.param("streaming", "weights", True, marks=pytest.mark.slow),
        pytest.param("streaming", "states", False, marks=pytest.mark.slow),
        pytest.param("svd", "states", False, marks=pytest.mark.slow),
        pytest.param("svd", "weights", False, marks=pytest.mark.slow),
        pytest.param("sums", "states", False, marks=pytest.mark.slow),
        pytest.param("sums", "weights", False, marks=pytest.mark.slow),
        pytest.param("in step", "states", False, marks=pytest.mark.slow),
        pytest.param("in step", "weights", False, marks=pytest.mark.slow),
        pytest.param("float weights", "states", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_graphs_go_on_over_what_waits(
    case: str, what: str, sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded graphs, also with gradients on their way over ranks while the layer below runs."""
    flags = f"{test_layer_graphs.CASES[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", flags, sums=sums)
    record_graphs(monkeypatch)
    stacks: list[LayerGraphs] = []

    recorded = layer_execution.replay_layers

    def replay(model: Any, optimizer: LowRankAdamW) -> None:
        recorded(model, optimizer)
        stacks.append(model.model.run_layers)

    monkeypatch.setattr(layer_execution, "replay_layers", replay)
    monkeypatch.setattr(layer_execution, "slots_of", lambda _: 3 if sums else 2)
    waits = trained(tmp_path, "cpu", f"{flags} --offload {what}", sums=sums)
    assert waits[:2] == plain[:2]
    assert stacks[0].replays and stacks[0]._optimizer.offload is not None


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("streaming", "weights"),
        pytest.param("checkpointing", "weights", marks=pytest.mark.slow),
        pytest.param("full rank", "states", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_one_compilation_serves_all_layers_that_wait(
    case: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compiled layer has saved of its weights is right again in the backward pass."""
    flags = f"{test_layer_graphs.CASES[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", f"{flags} --compile off", 6)
    torch._dynamo.reset()
    counters.clear()
    compile_layers = LlamaForCausalLM.compile_layers
    monkeypatch.setattr(LlamaForCausalLM, "compile_layers", lambda model: compile_layers(model, "aot_eager"))
    assert trained(tmp_path, "cpu", f"{flags} --compile on --offload {what}", 6)[:2] == plain[:2]
    assert counters["stats"]["unique_graphs"] == 1


# ---- what is where


def small_training(folder: Path, flags: str) -> tuple[Any, LowRankAdamW]:
    config = folder / "model.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    argv = f"--model_config {config} --dataset {folder} --batch_size 2 --gradient_accumulation 1 --max_length 16"
    argv += f" --dtype float32 --device cpu --compile off --optimizer q_galore_adamw8bit_per_layer {flags}"
    model, optimizer = build_training(parse_args(argv.split(), 1), torch.device("cpu"))
    assert isinstance(optimizer, LowRankAdamW)
    return model, optimizer


def updates(model: Any, optimizer: LowRankAdamW, count: int, micro_batches: int = 1) -> None:
    for update in range(count):
        ids = torch.randint(0, 256, (micro_batches, 2, 16), generator=torch.Generator().manual_seed(update))
        for number, each in enumerate(ids, start=1):
            optimizer.is_last_micro_batch = number == micro_batches
            (model(each, each).loss_sum / 90).backward()
        optimizer.step()
        optimizer.zero_grad()


class JoiningStreams(ClockedStreams):
    """Streams with clocks for which the host can wait."""

    def join(self) -> None:
        """See `Streams`."""
        for clock in list(self.clocks.values()):
            self.merge("compute", clock)


IN_SUBSPACE = "--recipe paper --rank 8 --subspace streaming"


@pytest.mark.parametrize(
    ("what", "flags", "micro_batches"),
    [
        ("weights", IN_SUBSPACE, 1),
        ("weights", "--recipe full_rank", 3),
        pytest.param("weights", "--recipe full_rank", 1, marks=pytest.mark.slow),
        pytest.param("states", IN_SUBSPACE, 3, marks=pytest.mark.slow),
        pytest.param("states", "--recipe full_rank", 1, marks=pytest.mark.slow),
    ],
)
def test_no_copy_races_with_what_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, flags: str, micro_batches: int
) -> None:
    """All reads and writes of slots and blocks are checked, whatever the speeds of the streams."""
    found = []
    for mode in ("none", what):
        streams = JoiningStreams()
        monkeypatch.setattr(offload, "streams_of", lambda _, streams=streams: streams)
        model, optimizer = small_training(tmp_path, f"{flags} --offload {mode}")
        with streams:
            updates(model, optimizer, 4, micro_batches)
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
        assert (streams.copies > 0) is (mode != "none")
    assert_same_bits(*found)


@pytest.mark.parametrize("left_out", ["mark", "wait", "free"])
def test_every_event_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """The check of races finds what is left out."""
    streams = JoiningStreams()
    monkeypatch.setattr(offload, "streams_of", lambda _: streams)
    if left_out == "mark":
        monkeypatch.setattr(streams, "mark", dict)
    elif left_out == "wait":
        monkeypatch.setattr(streams, "wait", lambda event: None)
    else:
        monkeypatch.setattr(hosted._Slot, "free", property(lambda _: None, lambda *_: None), raising=False)
    model, optimizer = small_training(tmp_path, "--recipe full_rank --offload weights")
    with streams, pytest.raises(RaceError):
        updates(model, optimizer, 4)


def test_the_steady_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host joins the streams while blocks are made, and then only for who reads them."""
    streams = JoiningStreams()
    monkeypatch.setattr(offload, "streams_of", lambda _: streams)
    model, optimizer = small_training(tmp_path, "--recipe full_rank --offload weights")
    updates(model, optimizer, 1)
    joins: list[None] = []
    monkeypatch.setattr(streams, "join", lambda: joins.append(None))
    updates(model, optimizer, 3, micro_batches=2)
    assert not joins
    optimizer.state_dict()
    assert joins


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("what", ["weights", "states"])
@pytest.mark.parametrize("where", ["training", "backward", "evaluation"])
def test_a_pass_that_an_error_ends_hinders_no_later_one(tmp_path: Path, where: str, what: str) -> None:
    """As an interrupt in a notebook, after which training goes on."""
    found = []
    for mode in ("none", what):
        model, optimizer = small_training(tmp_path, f"--recipe full_rank --offload {mode}")
        updates(model, optimizer, 2)
        ids = torch.zeros(2, 16, dtype=torch.int64)
        layer = model.decoder_layers[2]
        if where == "backward":
            hook = layer.register_forward_hook(lambda _, __, output: output.register_hook(_interrupt) and None)
        else:
            hook = layer.register_forward_pre_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(where != "evaluation"):
            loss = model(ids, ids).loss_sum
            loss.backward()
        hook.remove()
        optimizer.zero_grad()
        updates(model, optimizer, 1)
        with torch.no_grad():
            model(ids, ids)
        updates(model, optimizer, 1)
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert_same_bits(*found)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("what", ["weights", "states"])
@pytest.mark.parametrize("where", ["evaluation", "step"])
def test_a_step_goes_on_after_an_interrupt(
    tmp_path: Path, where: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an evaluation between the gradients and their update, or of the update itself, which `step` then ends."""
    found = []
    for mode in ("none", what):
        model, optimizer = small_training(tmp_path, f"--recipe full_rank --offload {mode}")
        updates(model, optimizer, 2, micro_batches=2)
        ids = torch.zeros(2, 16, dtype=torch.int64)
        for number in (1, 2):
            optimizer.is_last_micro_batch = number == 2
            (model(ids + number, ids + number).loss_sum / 90).backward()
        if where == "evaluation":
            hook = model.decoder_layers[2].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                model(ids, ids)
            hook.remove()
        elif mode != "none":
            first = optimizer.weights_of(model.decoder_layers[0])[0]
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(first, "count_update", _interrupt)
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        updates(model, optimizer, 1, micro_batches=2)
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert_same_bits(*found)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_outside_of_their_layer_tensors_are_the_hosts(tmp_path: Path) -> None:
    model, optimizer = small_training(tmp_path, "--recipe paper --rank 8 --subspace streaming --offload weights")
    waits = optimizer.offload
    assert waits is not None and waits._weights is not None
    updates(model, optimizer, 2)
    inside: list[set[int]] = []
    model.decoder_layers[1].register_forward_hook(lambda *_: inside.append(set(waits._inside)))
    updates(model, optimizer, 1)
    assert inside == [{1}] and not waits._inside
    for part in (waits._bases, waits._moments, waits._weights):
        assert len(part._blocks) == 3 and len(part._slots) == 2
        for block in part._blocks.values():
            memory = block.host.untyped_storage().data_ptr()
            assert block.tensors and all(x.untyped_storage().data_ptr() == memory for x in block.tensors)
            assert all(slot.buffer is not None and slot.buffer.numel() == block.nbytes for slot in part._slots)


def test_detached_tensors_are_their_own_again(tmp_path: Path) -> None:
    model, optimizer = small_training(tmp_path, "--recipe full_rank --offload weights")
    updates(model, optimizer, 2)
    waits = optimizer.offload
    assert waits is not None and waits._weights is not None
    blocks = [block for part in waits._parts for block in part._blocks.values()]
    before = [(tensor, tensor.clone()) for block in blocks for tensor in block.tensors]
    assert len(before) > 3 * 7 * 3
    optimizer.detach()
    for block in blocks:
        block.host.fill_(0xA5)
    assert all(torch.equal(tensor, value) for tensor, value in before)
    assert optimizer.offload is None and not any(weight.home for weight in waits._index)


def test_float_weights_and_what_is_not_attached_are_not_offloaded(tmp_path: Path) -> None:
    model, optimizer = small_training(tmp_path, "--recipe full_rank --no-weight_quant")
    with pytest.raises(ValueError, match="is float, and only quantized weights are offloaded"):
        optimizer.offload_layers(list(model.decoder_layers), weights=True)
    optimizer.detach()
    with pytest.raises(RuntimeError, match=r"after attach\(model\) alone"):
        optimizer.offload_layers(list(model.decoder_layers))


# ---- what is refused


def test_memory_that_the_system_does_not_lock_ends_the_run_with_a_sentence(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of states as late as in the first update, inside the backward pass."""

    def refuse(*_: object) -> None:
        raise PageLockError("the system does not lock 1.0 GB of host memory")

    monkeypatch.setattr(hosted, "pages", refuse)
    assert small.main("refused", **FULL_RANK, offload="states") == 2
    error = capsys.readouterr().err
    assert "--offload states: the system does not lock 1.0 GB of host memory, which is to hold" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (flags_of("muon") | {"offload": "states"}, "--offload states cannot work with --optimizer muon"),
        (PER_LAYER | {"offload": "states", "shard": "full"}, "--offload states cannot work with --shard full"),
        (PER_LAYER | {"offload": "states", "use_hf_model": True}, "leave --use_hf_model out, or use --offload none"),
        (flags_of("adamw") | {"offload": "weights"}, "those of this run are float: add --weight_quant"),
        (PER_LAYER | {"offload": "weights", "average_last": 0.2}, "--offload weights cannot work with --average_last"),
        ({"method": "lora", "rank": 8, "optimizer": "adamw", "offload": "states"}, "--method lora trains small ones"),
        *[
            (PER_LAYER | {"offload": "weights"} | refused, "those of this run are float")
            for refused in (
                {"weight_quant": False, "int8_products": True},
                {"simulation": True, "int8_products": True},
                {"simulation": True, "int8_products": True, "fp8_products": True},
            )
        ],
    ],
)
def test_what_makes_no_sense_is_refused(small: SmallRun, flags: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(small.argv("refused", flags))
    assert text in str(caught.value)
