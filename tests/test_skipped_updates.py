"""A loss or gradient that is not finite changes nothing: in the library, in a run, on every rank alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import run_pretrain
from qgalore.update.finite_checks import UpdateChecks
from tests.small_run import Result, SmallRun, assert_same_bits, flags_of, on_ranks
from tests.test_optimizer import backward, build

Q_GALORE, PER_LAYER = flags_of("q_galore_adamw8bit"), flags_of("q_galore_adamw8bit_per_layer")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


# ---- the library


def snapshot(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights and all of the optimizer's state that is no counter."""
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        counters = ("step", "schedule", "similarities")
        tensors |= {f"{index}/{key}": value.clone() for key, value in state.items() if key not in counters}
    return tensors


def spoil(net: Any, where: str, at_micro_batch: int) -> None:
    """Make the gradient of `embed` (below all others) or `head` (above) infinite in one micro-batch from now."""
    module, calls = getattr(net, where), iter(range(1, 100))

    def hook(_: object, __: object, output: Tensor) -> None:
        if next(calls) == at_micro_batch:
            output.register_hook(lambda grad: grad * float("inf"))

    module.register_forward_hook(hook)


@pytest.mark.parametrize("where", ["embed", "head"])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
@pytest.mark.parametrize(("accumulation", "sums"), [(1, "float32"), (3, "float32"), (3, "bfloat16"), (3, "int8")])
def test_nothing_is_touched_inside_the_backward_pass(where: str, subspace: str, accumulation: int, sums: str) -> None:
    options = {"accumulator_dtype": sums}
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=True, subspace=subspace, options=options)
    for update in range(3):
        backward(net, optimizer, update, accumulation)
        optimizer.step()
        assert not optimizer.skipped() and not optimizer.late_overflow()
    before = snapshot(net, optimizer)
    spoil(net, where, at_micro_batch=accumulation)
    backward(net, optimizer, 3, accumulation)
    optimizer.step()
    assert optimizer.skipped()
    # With one micro-batch the weights above are updated before the gradient of the lowest one exists: that is said.
    too_late = accumulation == 1 and where == "embed"
    assert bool(optimizer.late_overflow()) == too_late
    if not too_late:
        assert_same_bits(snapshot(net, optimizer), before)
    backward(net, optimizer, 4, accumulation)
    optimizer.step()
    assert not optimizer.skipped() and not optimizer.late_overflow()
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(net, optimizer).items())


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_flag_from_outside_skips_the_update(update_in_backward: bool) -> None:
    """As for a loss that is infinite while its gradient is finite."""
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=update_in_backward)
    backward(net, optimizer, 0)
    optimizer.step()
    before = snapshot(net, optimizer)
    optimizer.skip_update_if(torch.tensor(True))
    backward(net, optimizer, 1)
    optimizer.step()
    assert optimizer.skipped() and not optimizer.late_overflow()
    assert_same_bits(snapshot(net, optimizer), before)
    backward(net, optimizer, 2)
    optimizer.step()
    assert not optimizer.skipped(), "a flag holds for one update"


def test_a_flag_of_an_update_that_is_given_up_is_forgotten() -> None:
    net, optimizer = build("qgalore8bit", "int8", update_in_backward=False)
    optimizer.skip_update_if(torch.tensor(True))
    optimizer.zero_grad()
    backward(net, optimizer, 0)
    optimizer.step()
    assert not optimizer.skipped()


@pytest.mark.parametrize(
    ("method", "where", "sums"),
    [("svd", "head", "float32"), ("streaming", "embed", "int8"), ("streaming", "flag", "float32"),
     ("lazy", "flag", "float32")],
)  # fmt: skip
def test_a_refresh_of_a_skipped_update_stays_due_whether_the_host_knows_or_not(
    method: str, where: str, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is ahead of a GPU counts a refresh before it can know that the update is skipped."""
    rule: dict[str, Any] = {"subspace": "svd", "gamma_proj": 2.0, "queue_size": 1} if method == "lazy" else {
        "subspace": method
    }  # fmt: skip
    found = []
    for in_kernels in (False, True):
        if in_kernels:
            monkeypatch.setattr(UpdateChecks, "skip_for_kernels", lambda checks: checks.skip)
        net, optimizer = build("qgalore8bit", "int8", options={"accumulator_dtype": sums}, **rule)
        states = []
        for update in range(13):
            # First refreshes are among them and later ones; two in a row.
            skipped = update in (1, 6, 7, 9)
            accumulation = 1 + (sums == "int8")
            if skipped and where != "flag":
                spoil(net, where, at_micro_batch=accumulation)
            if skipped and where == "flag":
                optimizer.skip_update_if(torch.tensor(True))
            backward(net, optimizer, update, accumulation)
            optimizer.step()
            assert bool(optimizer.skipped()) == skipped
            optimizer.zero_grad()
            if update % 2:
                states.append(copy.deepcopy((net.state_dict(), optimizer.state_dict())))
        states.append((net.state_dict(), copy.deepcopy(optimizer).state_dict()))
        found.append(states)
        counts = [weight.subspace.schedule.refreshes for weight in optimizer.low_rank_weights()]
        assert min(counts) > 2
    assert_same_bits(*found)


# ---- a run


class Fault(NamedTuple):
    """What goes wrong in a run, in the forward pass of the last micro-batch of some updates."""

    what: str
    updates: tuple[int, ...]
    rank: int = 0


def run_with(fault: Fault, argv: list[str]) -> int:
    """`run_pretrain.main` with a fault that comes again whenever the update is done again."""
    update = run_pretrain.Run.update

    def update_with_fault(run: run_pretrain.Run) -> bool:
        if run.update_step not in fault.updates or run.world.rank != fault.rank:
            return update(run)

        def hook(_: object, __: object, output: Any) -> Any:
            if not run.optimizer.is_last_micro_batch:
                return None
            if fault.what == "loss":
                return output._replace(loss_sum=output.loss_sum + float("inf"))
            output.register_hook(lambda grad: grad * float("nan"))
            return None

        module = run.model if fault.what == "loss" else run.model.get_submodule("model.embed_tokens")
        handle = module.register_forward_hook(hook)
        try:
            return update(run)
        finally:
            handle.remove()

    run_pretrain.Run.update = update_with_fault  # type: ignore[method-assign]
    try:
        return run_pretrain.main(argv)
    finally:
        run_pretrain.Run.update = update  # type: ignore[method-assign]


def outcome(small: SmallRun, name: str, fault: Fault, ranks: int, flags: dict[str, object]) -> Result:
    argv = small.argv(name, flags)
    assert on_ranks(ranks, run_with, fault, argv, log=small.folder / f"{name}.log") == [0] * ranks
    return small.result(name)


def assert_same_training(a: Result, b: Result) -> None:
    """Weights, optimizer state and metrics, bit for bit; the two runs have different optimizer names."""
    one, other = a.checkpoint(), b.checkpoint()
    assert_same_bits(one.model_tensors, other.model_tensors, "model")
    assert_same_bits(one.optimizer_state, other.optimizer_state, "optimizer")
    assert_same_bits(one.state.get("average"), other.state.get("average"), "average")
    assert [str(line) for line in a.lines] == [str(line) for line in b.lines]


@pytest.mark.parametrize(("ranks", "save_every"), [(1, 2), (1, 0), (2, 2)])
def test_an_update_with_a_late_overflow_is_skipped(small: SmallRun, ranks: int, save_every: int) -> None:
    """The updated layers cannot be taken back: the run goes back to a checkpoint, or to its beginning."""
    flags: dict[str, object] = {"batch_size": 8 // ranks, "num_training_steps": 7, "eval_every": 2}
    fault = Fault("gradient", (3, 4), rank=ranks - 1)
    flags |= {"save_every": save_every, "average_last": 0.8}
    per_layer = outcome(small, "per_layer", fault, ranks, PER_LAYER | flags)
    said = (small.folder / "per_layer.log").read_text()
    assert "update 4: a gradient further down was not finite" in said and "update 5: a gradient" in said
    ordinary = outcome(small, "ordinary", fault, ranks, Q_GALORE | flags)
    assert "going back" not in (small.folder / "ordinary.log").read_text()
    assert [line["train/skipped"] for line in ordinary.train_lines] == [0, 0, 0, 1, 1, 0, 0]
    assert_same_training(per_layer, ordinary)


@pytest.mark.parametrize("optimizer", ["sgd", "q_galore_adamw8bit_per_layer"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_skips_the_update_on_all_ranks(small: SmallRun, optimizer: str, ranks: int) -> None:
    """The loss alone: its gradient is finite, and with two ranks the other one's loss, too."""
    flags: dict[str, object] = flags_of(optimizer) | {"batch_size": 8 // ranks, "num_training_steps": 5}
    flags |= {"save_every": 1, "keep_checkpoints": 0, "check_replicas": 1}
    run = outcome(small, "run", Fault("loss", (2,), rank=ranks - 1), ranks, flags)
    assert [line["train/skipped"] for line in run.train_lines] == [0, 0, 1, 0, 0]
    assert run.train_lines[2]["train/loss"] is None and run.train_lines[2]["train/grad_norm"] > 0
    assert_same_bits(run.checkpoint(3).model_tensors, run.checkpoint(2).model_tensors)
    changed = run.checkpoint(4).model_tensors
    assert any(not torch.equal(value, changed[name]) for name, value in run.checkpoint(3).model_tensors.items())
    assert "late_overflow" not in str(run.lines)


def test_skipped_updates_are_counted_over_a_resume(small: SmallRun) -> None:
    """The limit is on updates in a row, not on those since the last start."""
    flags = PER_LAYER | {"num_training_steps": 9, "max_skipped_updates": 3, "save_every": 2, "batch_size": 4}
    fault = Fault("loss", (3, 4, 5, 6))
    log = small.folder / "log"
    assert on_ranks(1, run_with, fault, small.argv("whole", flags), log=log) == [2]
    message = "--max_skipped_updates 3: 4 updates in a row"
    assert message in log.read_text()
    small.stop("parts", 2, **flags)
    stopped = flags | {"num_training_steps": 5, "continue_from": "auto"}
    assert on_ranks(1, run_with, fault, small.argv("parts", stopped), log=log) == [0]
    log.unlink()
    resumed = small.argv("parts", flags | {"continue_from": "auto"})
    assert on_ranks(1, run_with, fault, resumed, log=log) == [2]
    assert message in log.read_text()
    assert small.result("parts").checkpoint().update_step == small.result("whole").checkpoint().update_step
