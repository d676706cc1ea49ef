"""A resumed run ends with the bits of an uninterrupted one, and errors for what cannot be resumed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import run_pretrain
from peft_pretraining.checkpoint import run_state
from peft_pretraining.checkpoint.folder import FolderLock, lock_folder
from peft_pretraining.checkpoint.recorded_flags import changed_flags, differing_keys
from peft_pretraining.checkpoint.store import Unfinished
from peft_pretraining.config.parse import parse_args
from peft_pretraining.reporting.jsonl import METRICS_FILE, read_metrics
from tests.file_opens import counted_opens
from tests.small_run import (
    CONFIG,
    FULL_RANK,
    INT8_PRODUCTS,
    OPTIMIZERS,
    RECIPE,
    Result,
    SmallRun,
    assert_same_bits,
    assert_same_run,
    flags_of,
    start_ranks,
    token_stream,
    write_text,
)

Q_GALORE_PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the same bits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_6_updates_and_6_more_are_12(small: SmallRun, optimizer: str) -> None:
    flags = flags_of(optimizer) | {"num_training_steps": 12, "eval_every": 4}
    whole = small.run("whole", **flags)
    stopped = small.stop("parts", 6, **flags)
    assert stopped.checkpoint().update_step == 6 and len(stopped.train_lines) == 6
    resumed = small.run("parts", **flags, continue_from=stopped.checkpoints[-1])
    assert_same_run(whole, resumed)
    assert [line["update_step"] for line in resumed.lines if "eval/loss" in line] == [4, 8, 12]


LAZY = {"subspace": "svd", "queue_size": 1, "cos_threshold": 0.0, "update_proj_gap": 2}
MODES: dict[str, dict[str, object]] = {
    "streaming": Q_GALORE_PER_LAYER | {"subspace": "streaming"},
    "lazy": Q_GALORE_PER_LAYER | LAZY,
    "both_sides": flags_of("galore_adamw8bit") | {"proj_type": "full"},
    "randomized": flags_of("galore_adamw") | {"svd_method": "randomized", "rotate_moments": True},
    "bfloat16": Q_GALORE_PER_LAYER | {"dtype": "bfloat16", "grad_accum_dtype": "int8"},
    "simulation": Q_GALORE_PER_LAYER | {"simulation": True},
    "int4": Q_GALORE_PER_LAYER | {"weight_bits": 4},
    "int8_products": Q_GALORE_PER_LAYER | INT8_PRODUCTS | {"dtype": "bfloat16"},
    "fp8_products": Q_GALORE_PER_LAYER | {"fp8_products": True, "dtype": "bfloat16"},
    "fp8_weight_gradients": FULL_RANK | {"fp8_products": True, "fp8_weight_gradients": True, "dtype": "bfloat16"},
    "fp8_head": FULL_RANK | {"fp8_products": True, "fp8_weight_gradients": True, "fp8_head": True},
    "recipe": Q_GALORE_PER_LAYER | RECIPE,
    "fira": Q_GALORE_PER_LAYER | {"subspace": "streaming", "residual": "fira", "norm_growth": 1.01},
    "full_rank": {**FULL_RANK},
    "full_rank_adam": FULL_RANK | {"direction": "adam", "simulation": True, "grad_accum_dtype": "int8", "lr": 1e-2},
    "cautious": FULL_RANK | {"cautious_decay": True, "weight_decay": 0.5, "lr": 1e-2},
    "normuon": FULL_RANK | {"direction": "normuon"},
    "momentum_in_parts": FULL_RANK | {"momentum_rank": "1/8", "grad_accum_dtype": "int8"},
    "momentum_in_parts_normuon": FULL_RANK | {"momentum_rank": 5, "momentum_rest_bits": 2, "direction": "normuon"},
    "second_moments_of_rows": FULL_RANK | {"full_rank_second_moment": "row"},
    "full_rank_of_mlp": Q_GALORE_PER_LAYER | {"mlp_rank": "full"},
    "ranks_by_depth": Q_GALORE_PER_LAYER | {"rank": "8,16"},
    "clipping": flags_of("q_galore_adamw8bit_per_layer") | {"grad_clipping": 0.5},
    "muon": flags_of("muon") | {"lr": 1e-2},
    "momentum": flags_of("sgd") | {"beta1": 0.9},
    "adafactor_momentum": flags_of("adafactor") | {"beta1": 0.9},
    "adafactor_bfloat16": flags_of("adafactor") | {"beta1": 0.9, "dtype": "bfloat16"},
    "muon_bfloat16": flags_of("muon") | {"lr": 1e-2, "dtype": "bfloat16"},
    "hf": flags_of("adamw") | {"use_hf_model": True},
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["folder", "auto"])
def test_each_rank_reads_a_checkpoint_once(small: SmallRun, ranks: int, how: str) -> None:
    """The main rank checks hashes on the way, the others take its word."""
    flags: dict[str, object] = {"num_training_steps": 2, "batch_size": 4, "scheduler": "linear"}
    path = small.run("run", **flags).checkpoints[-1]
    flags |= {"num_training_steps": 3, "continue_from": path if how == "folder" else how}
    with counted_opens(path) as opens:
        small.run_on(ranks, "run", **flags)
    # The manifest is looked at once more when old checkpoints are pruned.
    assert {name: count for name, count in opens.items() if name != "manifest.json"} == dict.fromkeys(
        ("model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json"), ranks
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_in_the_middle_of_its_intervals(small: SmallRun, mode: str) -> None:
    flags = MODES[mode] | {"num_training_steps": 7}
    if mode == "ranks_by_depth":
        small.config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    whole = small.run("whole", **flags)
    for at in (3, 5):
        small.stop("parts", at, **flags, continue_from="auto")
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))
    if mode == "lazy":
        assert whole.train_lines[-1]["subspace/refreshes_saved_fraction"] > 0, "no interval grew"


@pytest.mark.parametrize("optimizer", ["adafactor", "galore_adamw8bit", "q_galore_adamw8bit_per_layer"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_between_micro_batches_undoes_the_update_that_was_begun(
    small: SmallRun, optimizer: str, at: int
) -> None:
    flags = flags_of(optimizer) | {"batch_size": 2, "num_training_steps": 5}
    whole = small.run("whole", **flags)
    stopped = small.stop("parts", at, micro_batch=3, **flags)
    assert stopped.checkpoint().update_step == at
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


def test_a_checkpoint_is_the_same_whether_a_stop_or_the_interval_asked_for_it(small: SmallRun) -> None:
    """Although a stop comes when the next update has begun."""
    flags = Q_GALORE_PER_LAYER | {"batch_size": 2, "num_training_steps": 6}
    planned = small.run("planned", **flags, save_every=3).checkpoint(3)
    stopped = small.stop("stopped", 3, micro_batch=2, **flags).checkpoint()
    assert_same_bits(planned.optimizer_state, stopped.optimizer_state)
    assert_same_bits(planned.model_tensors, stopped.model_tensors)
    assert planned.state["data"] == stopped.state["data"] and planned.state["tokens"] == stopped.state["tokens"]


def test_text_goes_on_where_it_was(small: SmallRun) -> None:
    flags = {"num_training_steps": 9} | write_text(small.folder / "text") | {"packing": "pack", "workers": 2}
    whole = small.run("whole", **flags)
    small.stop("parts", 5, **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


def test_a_run_that_was_killed_goes_on_from_its_newest_checkpoint(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies right after a checkpoint is on the disk: what led to it must be on the disk, too."""
    # No evaluation writes the pending metrics out before.
    flags = Q_GALORE_PER_LAYER | {"save_every": 3}
    whole = small.run("whole", **flags)

    publish = Unfinished.publish

    def publish_and_die(unfinished: Unfinished, *rest: Any) -> Path:
        path = publish(unfinished, *rest)
        if path.name == "step_00000006":
            raise InterruptedError
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "publish", publish_and_die)
        with pytest.raises(InterruptedError):
            small.main("parts", **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


def test_a_run_that_was_killed_between_checkpoints_does_its_updates_again(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of("galore_adamw8bit_per_layer") | {"save_every": 3, "eval_every": 2}
    whole = small.run("whole", **flags)

    def die(run: run_pretrain.Run) -> bool:
        if run.update_step == 5:
            raise InterruptedError
        return update(run)

    update = run_pretrain.Run.update
    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain.Run, "update", die)
        with pytest.raises(InterruptedError):
            small.main("parts", **flags)
    assert len(small.result("parts").train_lines) > 3
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


# ---- which checkpoint


def test_auto_takes_the_newest_whole_one_and_says_what_it_refused(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of("galore_adamw8bit") | {"save_every": 2, "keep_checkpoints": 0}
    whole = small.run("whole", **flags)
    small.copy("whole", "parts")
    for step in (6, 8):
        file = small.folder / "parts" / f"step_{step:08d}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    capsys.readouterr()
    resumed = small.run("parts", **flags, continue_from="auto")
    captured = capsys.readouterr()
    for step in (6, 8):
        assert f"step_{step:08d}" in captured.out + captured.err
    assert "SHA-256 differs" in captured.out + captured.err
    assert_same_run(whole, resumed)


def test_auto_without_a_checkpoint_starts_afresh(small: SmallRun) -> None:
    assert_same_run(
        small.run("plain", num_training_steps=3), small.run("auto", num_training_steps=3, continue_from="auto")
    )


def test_going_back_sets_later_checkpoints_aside(small: SmallRun) -> None:
    flags = {"num_training_steps": 6, "save_every": 2, "keep_checkpoints": 0}
    whole = small.run("whole", **flags)
    small.copy("whole", "parts")
    resumed = small.run("parts", **flags, continue_from=small.folder / "parts" / "step_00000002")
    assert_same_run(whole, resumed)
    names = sorted(path.name for path in resumed.save_dir.iterdir() if path.name.startswith("abandoned"))
    assert [name.rpartition("step_")[2] for name in names] == ["00000004", "00000006"]


def test_a_folder_has_one_name_or_another(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later checkpoints are set aside also where --save_dir and --continue_from spell the folder differently."""
    small.run("run", num_training_steps=4, save_every=2)
    monkeypatch.chdir(small.folder)
    flags = {"num_training_steps": 4, "save_every": 2, "save_dir": Path("run")}
    small.stop("run", 3, **flags, continue_from=small.folder / "run" / "step_00000002")
    assert small.result("run").checkpoint().update_step == 3


def test_a_checkpoint_alone_says_where_the_run_lies(small: SmallRun) -> None:
    whole = small.run("whole", num_training_steps=4)
    stopped = small.stop("parts", 2, num_training_steps=4)
    resumed = small.run("parts", num_training_steps=4, save_dir=None, continue_from=stopped.checkpoints[-1])
    assert_same_run(whole, resumed)


def test_a_branch_in_another_folder_leaves_the_first_run_alone(small: SmallRun) -> None:
    trunk = small.run("trunk", num_training_steps=6, save_every=2)
    before = files(trunk.save_dir)
    branch = small.run("branch", num_training_steps=6, continue_from=trunk.save_dir / "step_00000002")
    assert files(trunk.save_dir) == before
    assert branch.train_lines == [line for line in trunk.train_lines if line["update_step"] > 2]
    assert_same_bits(branch.checkpoint().model_tensors, trunk.checkpoint().model_tensors)


def test_a_branch_into_the_folder_of_another_run_is_refused(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = small.run("trunk", num_training_steps=4, save_every=2)
    small.run("run", num_training_steps=3, seed=1)
    flags = {"num_training_steps": 4, "continue_from": trunk.save_dir / "step_00000002"}
    assert f"--save_dir {small.folder / 'run'}" in refusal(small, capsys, **flags)


def test_a_moved_run_goes_on(small: SmallRun) -> None:
    whole = small.run("whole", **Q_GALORE_PER_LAYER, num_training_steps=6)
    small.stop("parts", 3, **Q_GALORE_PER_LAYER, num_training_steps=6)
    for name in ("small.json", "tokens", "parts"):
        place = small.folder / "elsewhere" / name
        place.parent.mkdir(exist_ok=True)
        shutil.move(small.folder / name, place)
    moved = small.folder / "elsewhere"
    flags = Q_GALORE_PER_LAYER | {"model_config": moved / "small.json", "dataset": moved / "tokens"}
    resumed = small.run("elsewhere/parts", **flags, num_training_steps=6, continue_from="auto")
    assert_same_run(whole, resumed)


# ---- nothing is done twice, nothing is lost


@pytest.mark.parametrize("optimizer", ["sgd", "q_galore_adamw8bit_per_layer"])
def test_continuing_a_run_that_has_ended_changes_nothing(small: SmallRun, optimizer: str) -> None:
    flags = flags_of(optimizer) | {"num_training_steps": 4, "eval_every": 2}
    whole = small.run("whole", **flags)
    small.copy("whole", "again")
    for _ in range(2):
        assert_same_run(whole, small.run("again", **flags, continue_from="auto"))


def test_a_stop_after_an_evaluation_does_not_repeat_it(small: SmallRun) -> None:
    flags = {"num_training_steps": 6, "eval_every": 3, "save_every": 3}
    whole = small.run("whole", **flags)
    small.stop("parts", 3, **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


def test_metrics_that_are_logged_now_and_then(small: SmallRun) -> None:
    flags = flags_of("galore_adamw") | {"log_every": 3, "num_training_steps": 8}
    whole = small.run("whole", **flags)
    small.stop("parts", 4, **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


def test_a_run_that_only_measures_leaves_no_checkpoint_of_its_end(small: SmallRun) -> None:
    """But where a signal stops it, and from there it ends as if it had not been stopped."""
    whole = small.run("whole", num_training_steps=4)
    flags: dict[str, object] = {"num_training_steps": 4, "save_last": False}
    measured = small.run("measured", **flags)
    assert whole.checkpoints and not measured.checkpoints and measured.lines == whole.lines
    assert [path.name for path in small.run("some", **flags, save_every=3).checkpoints] == [
        "step_00000000",
        "step_00000003",
    ]
    assert len(small.stop("stopped", 2, **flags).checkpoints) == 1
    assert small.run("stopped", **flags, continue_from="auto").lines == whole.lines


def test_a_run_can_be_made_longer(small: SmallRun) -> None:
    short = small.run("run", num_training_steps=3)
    longer = small.run("run", num_training_steps=5, continue_from="auto")
    assert longer.checkpoint().update_step == 5
    assert [line["update_step"] for line in longer.train_lines] == [1, 2, 3, 4, 5]
    assert longer.losses[:3] == short.losses[:3]


def test_the_marker_of_a_stop_goes_when_the_run_goes_on(small: SmallRun) -> None:
    flags = {"num_training_steps": 4}
    stopped = small.stop("run", 2, number=signal.SIGUSR1, **flags)
    assert (stopped.save_dir / "STOPPED").read_text() == "SIGUSR1 after 2 updates\n"
    small.run("run", **flags, continue_from="auto")
    assert not (stopped.save_dir / "STOPPED").exists(), "whoever looks for it would queue an ended run again"


def test_a_resumed_run_says_what_is_done(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("run", num_training_steps=2)
    assert "made already" not in capsys.readouterr().err
    for updates in (2, 3):
        small.run("run", num_training_steps=updates, continue_from="auto")
        assert f"2 of {updates} updates are made already" in capsys.readouterr().err


def test_a_resumed_run_says_which_flags_are_others(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are only places, or about reporting, too."""
    flags: dict[str, object] = {"num_training_steps": 2}
    small.run("run", **flags)
    capsys.readouterr()
    small.run("run", **flags, continue_from="auto")
    assert "changed" not in capsys.readouterr().err
    small.copy("run", "moved")
    small.folder.joinpath("moved.json").write_text(small.config.read_text())
    others = {"lr": 0.5, "full_rank_lr": 0.25, "project": "b", "workers": 1, "activation_checkpointing": True}
    small.run("moved", **flags | others, model_config=small.folder / "moved.json", continue_from="auto")
    changed = (
        f"changed since the checkpoint: --model_config {small.config} -> {small.folder / 'moved.json'}, "
        "--activation_checkpointing off -> on, --workers 0 -> 1, --lr 0.0001 -> 0.5, --full_rank_lr default -> 0.25, "
        f"--save_dir {small.folder / 'run'} -> {small.folder / 'moved'}, --project test -> b\n"
    )
    assert changed in capsys.readouterr().err


def test_what_an_older_version_has_not_recorded_was_its_default(small: SmallRun) -> None:
    args = parse_args(small.argv("run", {"log_every": 3}))
    older = {name: value for name, value in args.to_dict().items() if name not in ("log_every", "keep_checkpoints")}
    assert changed_flags(args, older) == ["--log_every 1 -> 3"]


def test_the_keys_by_which_models_differ() -> None:
    there = {"width": 512, "rope": {"factor": 2, "type": "linear"}, "names": ["a" * 50], "old": None, "same": [1]}
    here = {"width": 768, "rope": {"factor": 8, "type": "linear"}, "names": ["b" * 50], "same": [1]}
    quoted = '["' + "{}" * 35 + "..."
    assert list(differing_keys(there, here)) == [
        f"names {quoted.format(*'a' * 35)} there, {quoted.format(*'b' * 35)} here",
        "old null there, absent here",
        "rope.factor 2 there, 8 here",
        "width 512 there, 768 here",
    ]


def test_a_new_run_does_not_destroy_the_one_in_its_folder(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    first = small.run("run", num_training_steps=4, save_every=2)
    before = files(first.save_dir)
    assert small.main("run", num_training_steps=3, seed=1) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--save_dir" in message and "--continue_from auto" in message
    assert files(first.save_dir) == before


def test_two_runs_in_one_folder_at_a_time_are_refused(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """They would delete each other's unfinished checkpoints. A run that was killed holds nothing."""
    flags = {"num_training_steps": 4000, "save_every": 2, "continue_from": "auto"}
    (first,) = start_ranks(1, run_pretrain.main, small.argv("run", flags), log=small.folder / "log")
    end = time.monotonic() + 60
    while not small.result("run").checkpoints:
        assert first.is_alive() and time.monotonic() < end, (small.folder / "log").read_text()
        time.sleep(0.02)
    assert small.main("run", **flags) == 2
    assert f"--save_dir {small.folder / 'run'}: another process is running there" in capsys.readouterr().err
    assert first.is_alive()
    first.kill()
    first.join()
    small.stop("run", small.result("run").checkpoint().update_step + 1, **flags)


def test_a_run_that_cannot_read_its_first_checkpoint_says_so_at_once(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that loses what it has acknowledged."""

    publish = Unfinished.publish

    def publish_and_lose(*args: Any) -> Path:
        path = publish(*args)
        (path / "optimizer.json").write_bytes(b"lost")
        return path

    monkeypatch.setattr(Unfinished, "publish", publish_and_lose)
    assert small.main("run", save_every=1000) == 2
    assert "step_00000000: optimizer.json has 4 bytes instead of" in capsys.readouterr().err
    assert small.result("run").lines == [], "it trained for nothing"


def test_the_folder_is_free_when_a_run_has_ended(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something still refers to the lock, as a traceback does."""
    kept: list[FolderLock] = []

    def lock_and_keep(save_dir: Path) -> FolderLock:
        kept.append(lock_folder(save_dir))
        return kept[-1]

    monkeypatch.setattr(run_pretrain, "lock_folder", lock_and_keep)
    small.run("run", num_training_steps=1)
    lock_folder(small.folder / "run").release()
    assert len(kept) == 1


# ---- what the flags of the second command say


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw", "galore_adamw8bit_per_layer"])
def test_learning_rates_of_the_second_command_hold(small: SmallRun, optimizer: str) -> None:
    flags = flags_of(optimizer) | {"num_training_steps": 6, "scheduler": "linear", "min_lr_ratio": 0.4}
    small.stop("run", 3, **flags)
    resumed = small.run("run", **flags | {"lr": 0.003, "full_rank_lr": 0.001}, continue_from="auto")
    shares = [1 - 0.6 * k / 6 for k in range(6)]
    lines = resumed.train_lines
    assert [line["train/lr"] for line in lines[:3]] == pytest.approx([float(flags["lr"]) * s for s in shares[:3]])  # type: ignore[arg-type]
    assert [line["train/lr"] for line in lines[3:]] == pytest.approx([0.003 * s for s in shares[3:]])
    assert [line["train/full_rank_lr"] for line in lines[3:]] == pytest.approx([0.001 * s for s in shares[3:]])


def test_the_rate_that_is_logged_is_the_one_in_use(small: SmallRun) -> None:
    flags = flags_of("sgd") | {"num_training_steps": 6}
    before = small.stop("run", 2, **flags).weights()
    resumed = small.run("run", **flags | {"lr": 1e-30}, continue_from="auto")
    assert max(line["train/lr"] for line in resumed.train_lines[2:]) <= 1e-30
    assert_same_bits(resumed.weights(), before)


# ---- a longer run than was planned

# Without the three, which the recipe takes from the length of the run, embeddings, head and decay would differ.
OF_ANY_LENGTH = Q_GALORE_PER_LAYER | RECIPE | {"full_rank_lr": 0.02, "weight_decay": 0.2, "full_rank_weight_decay": 0.1}
EXTENDED: dict[str, dict[str, object]] = {
    "adamw": flags_of("adamw") | {"scheduler": "wsd", "decay_steps": 3, "weight_decay": 0.1},
    "recipe": OF_ANY_LENGTH | {"scheduler": "wsd", "decay_steps": 0.25, "decay_shape": "linear"},
    "averaged": flags_of("adamw") | {"scheduler": "wsd", "decay_steps": 2, "average_last": 0.25},
}


@pytest.mark.parametrize("mode", EXTENDED)
def test_a_run_stopped_in_its_stable_phase_goes_on_as_if_planned_longer(
    small: SmallRun, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    flags = EXTENDED[mode] | {"warmup_steps": 2}
    whole = small.run("whole", **flags, num_training_steps=12)
    small.stop("parts", 4, **flags, num_training_steps=8)
    resumed = small.run("parts", **flags, num_training_steps=12, continue_from="auto")
    assert_same_run(whole, resumed)
    rates = [line["train/lr"] for line in whole.train_lines]
    assert len({*rates[2:8]}) == 1 and rates[-1] < rates[2], "the stable phase and the decay are in the test"
    assert "the learning rate goes on at" not in capsys.readouterr().err


def test_a_finished_run_at_a_constant_rate_goes_on_as_if_planned_longer(small: SmallRun) -> None:
    flags = flags_of("galore_adamw8bit") | {"scheduler": "constant", "eval_every": 6, "warmup_steps": 3}
    whole = small.run("whole", **flags, num_training_steps=12)
    small.run("parts", **flags, num_training_steps=6)
    assert_same_run(whole, small.run("parts", **flags, num_training_steps=12, continue_from="auto"))


def test_a_run_continued_in_its_decay_says_that_the_rate_rises(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, object] = {"scheduler": "wsd", "decay_steps": 4}
    small.stop("run", 6, **flags, num_training_steps=8)
    small.run("run", **flags, num_training_steps=12, continue_from="auto")
    said = [line for line in capsys.readouterr().err.splitlines() if "learning rate goes on at" in line]
    assert said == [
        "the learning rate goes on at 1 of its peak, and the schedule of the checkpoint had 0.364 for update 6: it had "
        "begun to decay after update 4; a checkpoint from before goes on exactly"
    ]


# ---- refusals


def refusal(small: SmallRun, capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    """The message of a continuation that must be refused, and must have left everything as it was."""
    before = files(small.folder / "run")
    capsys.readouterr()
    assert small.main("run", **flags) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert files(small.folder / "run") == before, "a refused continuation changed the run's folder"
    return captured.err.strip().splitlines()[-1]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "optimizer": ({"optimizer": "galore_adamw"}, "optimizer is 'galore_adamw' here and 'galore_adamw8bit' there"),
    "rank": ({"rank": 16}, "rank is 16 here and 32 there"),
    "proj_type": ({"proj_type": "left"}, "proj_type is 'left' here and 'std' there"),
    "subspace": ({"subspace": "streaming"}, "subspace is 'streaming' here and 'svd' there"),
    "momentum": (
        {"rank": "full", "direction": "orthogonal", "update_proj_gap": None, "proj_group_size": None}
        | {"momentum_rank": 8, "momentum_rest_bits": 2},
        "momentum_rank is 8 here and 0.0 there; momentum_rest_bits is 2 here and 4 there",
    ),
    "seed": ({"seed": 1}, "seed is 1 here and 0 there"),
    "dtype": ({"dtype": "bfloat16"}, "dtype is 'bfloat16' here and 'float32' there"),
    "batch": ({"total_batch_size": 16}, "total_batch_size is 16 here and 8 there"),
    "projections": ({"proj_quant": True}, "proj_quant is True here and False there"),
    "hf": ({"use_hf_model": True}, "use_hf_model is True here and False there"),
    "length": ({"max_length": 16}, "--max_length is 16 but was 32"),
    "lanes": ({"data_lanes": 4}, "--data_lanes is 4 but was 8"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("ended"))
    small.run("run", **flags_of("galore_adamw8bit"), num_training_steps=3, save_every=1)
    return small


@pytest.mark.parametrize("difference", REFUSED)
@pytest.mark.parametrize("source", ["step_00000002", "auto"])
def test_a_checkpoint_of_another_run_is_refused(
    ended: SmallRun, capsys: pytest.CaptureFixture[str], difference: str, source: str
) -> None:
    changed, expected = REFUSED[difference]
    flags = flags_of("galore_adamw8bit") | {"num_training_steps": 5} | changed
    place = source if source == "auto" else ended.folder / "run" / source
    message = refusal(ended, capsys, **flags, continue_from=place)
    assert message.startswith("run_pretrain.py: ") and expected in message


def test_products_in_int8_are_refused_elsewhere_and_older_checkpoints_had_none(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = Q_GALORE_PER_LAYER | {"weight_group_size": None, "num_training_steps": 2}
    describe = run_state.RunCheckpoints._describe

    def describe_as_before(checkpoints: Any) -> dict[str, Any]:
        return {name: value for name, value in describe(checkpoints).items() if name != "int8_products"}

    with monkeypatch.context() as patch:
        patch.setattr(run_state.RunCheckpoints, "_describe", describe_as_before)
        patch.setattr(run_state, "_FIXED", ())
        small.run("run", **flags)
    longer = flags | {"num_training_steps": 4, "continue_from": "auto"}
    message = refusal(small, capsys, **longer, int8_products=True)
    assert "int8_products is True here and False there" in message
    assert len(small.run("run", **longer).losses) == 4


def test_another_model_or_data_set_is_refused(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("run", num_training_steps=2, save_every=1)
    flags = {"num_training_steps": 4, "continue_from": small.folder / "run" / "step_00000001"}
    other = small.folder / "other.json"
    other.write_text(json.dumps(CONFIG | {"intermediate_size": 96}))
    message = refusal(small, capsys, **flags, model_config=other)
    assert message.endswith(
        "step_00000001 is of another run: intermediate_size 128 there, 96 here. Give the flags of that run or another "
        "checkpoint."
    )
    assert "--continue_from" in message
    (small.data / "train.uint16").write_bytes(token_stream(40_000, seed=9).tobytes())
    assert "--dataset" in refusal(small, capsys, **flags)


def test_a_run_cannot_become_shorter_than_it_is(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.run("run", num_training_steps=4)
    monkeypatch.setattr(run_pretrain.Run, "update", lambda run: pytest.fail(f"update {run.update_step} of 2"))
    message = refusal(small, capsys, num_training_steps=2, continue_from="auto")
    assert "--num_training_steps 2" in message and "4 updates" in message


def test_a_damaged_checkpoint_is_a_sentence(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("run", num_training_steps=2, save_every=1)
    path = small.folder / "run" / "step_00000001"
    (path / "optimizer.safetensors").write_bytes(b"\0" * 10)
    message = refusal(small, capsys, num_training_steps=4, continue_from=path)
    assert "optimizer.safetensors has 10 bytes" in message and "take an older checkpoint" in message


def test_what_a_checkpoint_records(small: SmallRun) -> None:
    checkpoint = small.run("run", **Q_GALORE_PER_LAYER, num_training_steps=2).checkpoint()
    state = checkpoint.state
    assert state["tokens"] == 2 * 256 and state["optimizer"] == "q_galore_adamw8bit_per_layer"
    assert state["data"]["sequence"] == 16 and len(state["data"]["lanes"]) == 8
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".json", ".safetensors"}
    assert (checkpoint.path.parent / METRICS_FILE).is_file() and len(read_metrics(checkpoint.path.parent)) == 3
    assert isinstance(Result(checkpoint.path.parent).checkpoint().optimizer_state["param_groups"], list)
