"""Two ranks compute what one rank computes, go on from each other's checkpoints, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import run_pretrain
from peft_pretraining.data.batch import Update
from peft_pretraining.data.train_loader import TrainLoader
from peft_pretraining.memory import agreement, budget
from peft_pretraining.speed.cards import CARDS
from tests.small_run import (
    FULL_RANK,
    OPTIMIZERS,
    RECIPE,
    TORCHRUN,
    Result,
    SmallRun,
    assert_same_run,
    flags_of,
    on_ranks,
    ranks_of,
    start,
    write_text,
)

GALORE, Q_GALORE_PER_LAYER = flags_of("galore_adamw"), flags_of("q_galore_adamw8bit_per_layer")
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS} | {
    "clipping": flags_of("galore_adamw8bit") | {"grad_clipping": 0.5},
    "sgd_clipping": flags_of("sgd") | {"grad_clipping": 0.5},
    "streaming": Q_GALORE_PER_LAYER | {"subspace": "streaming"},
    "recipe": Q_GALORE_PER_LAYER | RECIPE,
    "full_rank": {**FULL_RANK},
    "momentum_in_parts": FULL_RANK | {"momentum_rank": "1/8"},
}
INT8_SUMS = CASES["streaming"] | {"grad_accum_dtype": "int8"}
# With a large eps Adam's step is linear in the gradient: it does not amplify rounding, and shows a wrong size as well.
LINEAR = {"lr": 1.0, "adam_eps": 1.0}
# The last bits of a gradient can turn a singular vector over; moments that are rotated turn with it.
SVD = LINEAR | {"rotate_moments": True}
ACCUMULATING: dict[str, dict[str, object]] = {
    "adamw": flags_of("adamw") | LINEAR,
    "sgd_clipping": CASES["sgd_clipping"],
    "clipping": GALORE | SVD | {"grad_clipping": 0.5},
    "streaming": GALORE | LINEAR | {"subspace": "streaming"},
    "full_rank": LINEAR | {"optimizer": "galore_adamw", "rank": "full", "direction": "adam"},
    "fira": GALORE | LINEAR | {"subspace": "streaming", "residual": "fira", "norm_growth": 1.01},
    "int8_sums": GALORE | SVD | {"grad_accum_dtype": "int8"},
    "q_galore": Q_GALORE_PER_LAYER | SVD,
}
# How far the weights of two ranks may end from those of one, as a share of the way that they went. Another order of
# float32 sums makes 3e-5, and what a rank can do wrong 0.02 to 2. INT8 sums are rounded once more, which makes 0.02;
# INT8 weights and INT4 bases may be rounded another way, which makes up to 0.06: there, wrong is 0.3 and more.
SHARES = {"int8_sums": 0.1, "q_galore": 0.3}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def assert_close(two: Result, one: Result, tolerance: float) -> None:
    """The same run up to the order of float32 sums; tokens and evaluation batches are exactly the same."""
    assert two.losses == pytest.approx(one.losses, abs=tolerance)
    assert two.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    for name in ("train/tokens", "train/lr"):
        assert [line[name] for line in two.train_lines] == [line[name] for line in one.train_lines]
    assert two.train_lines[0]["train/grad_norm"] == pytest.approx(one.train_lines[0]["train/grad_norm"], rel=1e-3)
    assert two.eval_loss == pytest.approx(one.eval_loss, abs=tolerance)
    assert two.lines[-1]["eval/tokens"] == one.lines[-1]["eval/tokens"]
    assert two.checkpoint().state["data"] == one.checkpoint().state["data"]


def assert_close_weights(two: Result, one: Result, share: float) -> None:
    """Weights differ by little of what training changed."""
    start_weights, ours, theirs = one.weights(0), two.weights(), one.weights()
    for name, weight in theirs.items():
        moved = (weight - start_weights[name]).norm()
        assert (ours[name] - weight).norm() < share * moved, name


def main_with_the_rows_of_two(argv: list[str]) -> int:
    """One rank (in a process of its own) whose two micro-batches are those of two ranks: every second row each."""
    next_update = TrainLoader.next_update

    def next_update_of_two(loader: TrainLoader, give_up: Callable[[], bool]) -> Update | None:
        update = next_update(loader, give_up)
        assert update is not None and len(update.micro_batches) == 2
        ids, labels = (
            torch.cat([getattr(part, name) for part in update.micro_batches]) for name in ("input_ids", "labels")
        )
        parts = [
            replace(part, input_ids=ids[rank::2], labels=labels[rank::2])
            for rank, part in enumerate(update.micro_batches)
        ]
        return replace(update, micro_batches=parts)

    TrainLoader.next_update = next_update_of_two  # type: ignore[method-assign]
    return run_pretrain.main(argv)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(small: SmallRun, case: str) -> None:
    """To the bit: a + b has one value, whether two ranks or two micro-batches of one rank computed a and b.

    A tolerance would depend on the machine: one last bit can turn a singular vector over or round an INT4 basis another
    way, after which weights were seen to end 5 to 20 % of their way apart.
    """
    flags = CASES[case] | {"num_training_steps": 5, "check_replicas": 1, "save_every": 5, "batch_size": 4}
    assert on_ranks(1, main_with_the_rows_of_two, small.argv("one", flags)) == [0]
    assert_same_run(small.result("one"), small.run_on(2, "two", **flags))


@pytest.mark.parametrize("case", ACCUMULATING)
def test_two_ranks_that_accumulate_are_one(small: SmallRun, case: str) -> None:
    """Two micro-batches on each: their sums have another order, so these are runs that do not amplify rounding."""
    flags = ACCUMULATING[case] | {"num_training_steps": 5, "check_replicas": 1, "save_every": 5}
    one, two = small.run("one", **flags), small.run_on(2, "two", **flags)
    assert_close(two, one, 5e-4)
    assert_close_weights(two, one, SHARES.get(case, 1e-3))
    assert two.checkpoint().model_tensors.keys() == one.checkpoint().model_tensors.keys()


def test_rows_of_unequal_length_weigh_the_same_on_two_ranks(small: SmallRun) -> None:
    flags = flags_of("adamw") | write_text(small.folder / "text") | {"num_training_steps": 4}
    two = small.run_on(2, "two", **flags)
    assert_close(two, small.run("one", **flags), 5e-4)
    (command,) = (two.save_dir / "command.txt").read_text().splitlines()  # of both ranks
    assert "2 rank(s)" in command


@pytest.mark.parametrize("case", ["adamw", "q_galore_adamw8bit_per_layer"])
def test_the_number_of_ranks_may_change_at_a_resume(small: SmallRun, case: str) -> None:
    flags = CASES[case] | {"num_training_steps": 6, "check_replicas": 1}
    whole = small.run("whole", **flags)
    small.stop("parts", 2, **flags)
    with_stop = flags | {"continue_from": "auto"}
    assert on_ranks(2, stop_after, 4, small.argv("parts", with_stop | {"batch_size": 2})) == [0, 0]
    assert small.result("parts").checkpoint().update_step == 4
    assert_close(small.run("parts", **with_stop), whole, 5e-3)


def stop_after(update_step: int, argv: list[str]) -> int:
    """A rank of a run in which only the last rank gets the signal, in the middle of an update."""
    update = run_pretrain.Run.update

    def update_with_signal(run: run_pretrain.Run) -> bool:
        if run.update_step == update_step and run.world.rank == run.world.world_size - 1:
            run.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return update(run)

    run_pretrain.Run.update = update_with_signal  # type: ignore[method-assign]
    return run_pretrain.main(argv)


@pytest.mark.parametrize("case", [*OPTIMIZERS, "int8_sums"])
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_has_the_same_bits(small: SmallRun, case: str) -> None:
    flags = (CASES | {"int8_sums": INT8_SUMS})[case] | {"num_training_steps": 6, "eval_every": 3, "batch_size": 2}
    whole = small.run_on(2, "whole", **flags)
    argv = small.argv("parts", flags | {"continue_from": "auto"})
    assert on_ranks(2, stop_after, 3, argv) == [0, 0]
    stopped = small.result("parts")
    assert (stopped.save_dir / "STOPPED").read_text() == "SIGTERM after 3 updates\n"
    assert on_ranks(2, run_pretrain.main, argv) == [0, 0]
    assert_same_run(whole, small.result("parts"))


def break_replica(argv: list[str]) -> int:
    """A rank of a run in which one weight of rank 1 changes by itself after two updates."""
    update = run_pretrain.Run.update

    def update_and_break(run: run_pretrain.Run) -> bool:
        if run.update_step == 2 and run.world.rank == 1:
            next(run.model.parameters()).data[3, 3] += 1e-6
        return update(run)

    run_pretrain.Run.update = update_and_break  # type: ignore[method-assign]
    return run_pretrain.main(argv)


def test_replicas_that_differ_are_found(small: SmallRun) -> None:
    flags = flags_of("adamw") | {"num_training_steps": 6, "batch_size": 4, "save_every": 3, "check_replicas": 3}
    log = small.folder / "log"
    assert on_ranks(2, break_replica, small.argv("checked", flags), log=log) == [2, 2]
    message = next(line for line in log.read_text().splitlines() if line.startswith("run_pretrain.py: "))
    assert "--check_replicas: after 3 updates" in message and "model.embed_tokens.weight" in message
    assert [path.name for path in small.result("checked").checkpoints] == ["step_00000000"]


# ---- torchrun itself


def wait_for_updates(save_dir: Path, updates: int, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Return when that many updates are in metrics.jsonl."""
    end, metrics = time.monotonic() + seconds, save_dir / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("train/loss") < updates:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_torchrun_starts_a_killed_rank_again_and_ends_in_good_order(small: SmallRun) -> None:
    """A rank is killed, all start again by themselves, then SIGTERM; the same command ends with undisturbed bits."""
    flags = flags_of("adamw") | {"num_training_steps": 60, "batch_size": 4, "save_every": 10}
    whole = small.run_on(2, "whole", **flags)
    argv, save_dir = small.argv("run", flags | {"continue_from": "auto"}), small.folder / "run"
    process = start(argv, (*TORCHRUN, "--max-restarts", "1"))
    wait_for_updates(save_dir, 14, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    wait_for_updates(save_dir, 34, process)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert "run_pretrain.py: " in text, "the rank that was left says in a sentence why it ends"
    assert 'run_pretrain.py", line' not in text, "and not in a traceback"
    updates = small.result("run").checkpoint().update_step
    assert 34 <= updates < 60
    assert (save_dir / "STOPPED").read_text() == f"SIGTERM after {updates} updates\n"
    assert f"stopped after {updates} updates; --continue_from auto goes on from here" in text
    assert on_ranks(2, run_pretrain.main, argv) == [0, 0]
    assert_same_run(whole, small.result("run"))


def test_ranks_that_cannot_share_the_logical_shards(small: SmallRun) -> None:
    log = small.folder / "log"
    assert on_ranks(2, run_pretrain.main, small.argv("odd", {"data_lanes": 7}), log=log) == [2, 2]
    assert "--data_lanes 7 is not divisible by the 2 ranks" in log.read_text()


def test_a_refusal_on_the_first_rank_ends_all(small: SmallRun) -> None:
    (small.folder / "file").write_text("in the way")
    begin, log = time.monotonic(), small.folder / "log"
    codes = on_ranks(2, run_pretrain.main, small.argv("file/run", {"batch_size": 2}), log=log)
    assert time.monotonic() - begin < 60, "the other rank waited for the first one"
    assert codes[0] == 2 and codes[1] != 0
    assert "run_pretrain.py: " in log.read_text() and str(small.folder / "file" / "run") in log.read_text()


def main_of_unlike_ranks(argvs: list[list[str]], memories: list[int]) -> int:
    """`run_pretrain.main` with a command line for each rank, as on cards of which a run may take so many bytes."""
    rank = int(os.environ["RANK"])
    for module in (budget, agreement):
        module.memory_of_card = lambda world_size: (memories[rank], CARDS["h100"])  # type: ignore[attr-defined]
    return run_pretrain.main(argvs[rank])


def test_ranks_with_unlike_cards_train_as_the_smallest_one_needs_it(small: SmallRun) -> None:
    """Each would choose another micro-batch, so another number of micro-batches, each with collectives of its own."""
    flags: dict[str, object] = {"batch_size": None, "total_batch_size": 32, "device": None, "num_training_steps": 2}
    flags |= {"optimizer": "galore_adamw", "rank": 8}
    argv, log, memories = small.argv("run", flags), small.folder / "log", [10**9, 69_200_000]
    alone = [budget.within_card(argv, 2, "", memory, CARDS["h100"]).batch.batch_size for memory in memories]
    assert alone[0] > alone[1], "the two cards choose alike"
    assert on_ranks(2, main_of_unlike_ranks, [argv, argv], memories, log=log) == [0, 0], log.read_text()
    state = small.result("run").checkpoint().state
    assert (state["batch_size"], state["total_batch_size"]) == (alone[1], 32)
    assert (small.folder / "run" / "command.txt").read_text().count("--batch_size") == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "--lr is 0.0001 on rank 0, 0.5 on rank 1: all ranks train one model by the same flags"),
        ({"batch_size": 1}, "--batch_size is 2 on rank 0, 1 on rank 1"),
        ({"activation_checkpointing": True}, "--activation_checkpointing is False on rank 0, True on rank 1"),
        ({"workers": 1}, ""),
    ],
)
def test_ranks_with_other_flags_are_refused(small: SmallRun, changed: dict[str, object], message: str) -> None:
    """But for those of their machine."""
    flags: dict[str, object] = {"batch_size": 2, "num_training_steps": 1}
    argvs, log = [small.argv("run", flags), small.argv("run", flags | changed)], small.folder / "log"
    codes = on_ranks(2, main_of_unlike_ranks, argvs, [0, 0], log=log)
    assert codes == ([2, 2] if message else [0, 0]), log.read_text()
    assert message in log.read_text() and "Traceback" not in log.read_text()


def main_with_a_layer_a_rank(argv: list[str]) -> int:
    """`run_pretrain.main` of a model whose rows take another layer on each rank, as experts do."""
    init = run_pretrain.Run.__init__

    def init_with_experts(run: run_pretrain.Run, *args: object) -> None:
        init(run, *args)  # type: ignore[arg-type]
        inner, rank = run.model.get_submodule("model"), run.world.rank
        inner.layers = torch.nn.ModuleList([inner.layers[rank]])  # type: ignore[index]

    run_pretrain.Run.__init__ = init_with_experts  # type: ignore[method-assign, assignment]
    return run_pretrain.main(argv)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "full_rank"])
def test_ranks_that_train_other_parameters_are_refused(tmp_path: Path, optimizer: str) -> None:
    """Their gradients have the same shapes: what is summed fits, and is of two matrices."""
    flags = FULL_RANK if optimizer == "full_rank" else flags_of(optimizer)
    small = SmallRun(tmp_path, layers=2)
    argv = small.argv("run", {**flags, "batch_size": 4, "num_training_steps": 3})
    log = small.folder / "log"
    assert on_ranks(2, main_with_a_layer_a_rank, argv, log=log) == [2, 2], log.read_text()
    said = log.read_text()
    assert "update 1: the ranks trained different parameters (model.layers.0." in said
    assert "on rank 0 alone; model.layers.1." in said and "Traceback" not in said
