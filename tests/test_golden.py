"""Every mode computes what was recorded of it, bit for bit in the same place; how to record: `tests.golden.record`.

In another place (another processor, version of PyTorch or card) losses may differ by a mode's tolerance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import run_pretrain
from tests.golden.modes import COARSE, MODES, UPDATES, WITHOUT_GRAPHS, command_line, names
from tests.golden.record import Line, Recording, place, recording_for, run

MODE = [pytest.param(name, marks=[pytest.mark.slow] * (mode.ranks > 1)) for name, mode in MODES.items()]
GPU_MODE = [name for name, mode in MODES.items() if mode.on_gpu]


def differences(recorded: Sequence[Line], found: Sequence[Line], tolerance: float = 0.0) -> list[str]:
    """How two runs differ, a sentence a number: in any bit, or in losses by more than a tolerance relative to them.

    The norm of a gradient follows last bits much further than a loss, and one bit of a gradient can decide whether a
    subspace is refreshed: they and the weights are compared only without a tolerance.
    """
    sentences = []
    for old, new in itertools.zip_longest(recorded, found, fillvalue=Line()):
        for key in sorted({*old, *new}):
            a, b = old.get(key), new.get(key)
            if tolerance and key.endswith("/loss") and a and b:
                differs = abs(a - b) > tolerance * abs(a)
            else:
                differs = a != b and (tolerance == 0 or key in ("update_step", "train/loss", "eval/loss"))
            if differs:
                sentences.append(f"update {old.get('update_step')}: {key} is {b}, recorded is {a}")
    return sentences


def assert_as_recorded(name: str, found: Sequence[Line], recording: Recording, here: Line, tolerance: float) -> None:
    """Exactly so where it was recorded here."""
    wrong = differences(recording.lines.get(name, []), found, 0.0 if recording.place == here else tolerance)
    assert not wrong, "\n".join([f"{name}, recorded in {recording.place}, here is {here}", *wrong])


@pytest.fixture
def cpu() -> Line:
    return place("cpu")


@pytest.fixture
def recorded(cpu: Line) -> Recording:
    recording = recording_for(cpu)
    assert recording is not None
    return recording


@pytest.mark.parametrize("name", MODE)
def test_a_run_computes_what_was_recorded(name: str, tmp_path: Path, recorded: Recording, cpu: Line) -> None:
    assert_as_recorded(name, run(name, "cpu", tmp_path), recorded, cpu, MODES[name].tolerance)


def test_every_mode_was_recorded(recorded: Recording) -> None:
    assert recorded.lines.keys() == MODES.keys()


def test_losses_are_compared_to_the_bit_where_they_were_recorded(recorded: Recording) -> None:
    """And elsewhere within a tolerance: one of the last bit is none there."""
    name, lines = next(iter(recorded.lines.items()))
    found = [*lines[:-1], lines[-1] | {"eval/loss": math.nextafter(lines[-1]["eval/loss"], math.inf)}]
    with pytest.raises(AssertionError, match="eval/loss is"):
        assert_as_recorded(name, found, recorded, recorded.place, MODES[name].tolerance)
    assert_as_recorded(name, found, recorded, recorded.place | {"torch": "another"}, MODES[name].tolerance)


def test_what_is_recorded_has_refreshes_and_lazy_intervals(recorded: Recording) -> None:
    matrices = 14
    for name, lines in recorded.lines.items():
        assert [line["update_step"] for line in lines] == [*range(1, UPDATES + 1), UPDATES]
        assert all(line["train/loss"] > 0 and line["train/grad_norm"] > 0 for line in lines[:-1])
        assert lines[-1]["eval/loss"] > 0 and len(lines[-1]["weights"]) == 16
        if "galore" in MODES[name].flags:
            refreshes = [line["subspace/refreshes"] for line in lines[:-1]]
            assert refreshes[-1] >= 2 * matrices, name
            if "--queue_size" in MODES[name].flags:
                # All intervals of 2 would make four or five a matrix, all of 2, 4 and 8 three.
                assert 3 * matrices < refreshes[-1] < 4.5 * matrices, name


@pytest.mark.parametrize(
    ("key", "value", "beyond_tolerance"),
    [
        ("train/loss", 5.000000001, False),
        ("train/loss", 5.004, False),
        ("train/loss", 4.994, True),
        ("train/loss", None, True),  # it was not finite
        ("train/grad_norm", 1.1, False),
        ("weights", "b", False),
        ("update_step", 2, True),
    ],
)
def test_a_wrong_number_is_a_difference(key: str, value: object, beyond_tolerance: bool) -> None:
    recorded: list[Line] = [{"update_step": 1, "train/loss": 5.0, "train/grad_norm": 1.0, "weights": "a"}]
    found = [recorded[0] | {key: value}]
    assert differences(recorded, recorded) == differences(recorded, recorded, 1e-3) == []
    assert differences(recorded, found) == [f"update 1: {key} is {value}, recorded is {recorded[0][key]}"]
    assert bool(differences(recorded, found, 1e-3)) == beyond_tolerance


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_missing_update_is_a_difference(tolerance: float) -> None:
    lines: list[Line] = [{"update_step": step, "train/loss": 5.0} for step in (1, 2)]
    assert differences(lines, lines[:1], tolerance) and differences(lines[:1], lines, tolerance)


# ---- on a GPU


@pytest.mark.parametrize("name", names("cuda"))
def test_flags_of_runs_on_a_gpu(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_pretrain.main([*command_line(name, "cuda", tmp_path), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert ("--cuda_graphs off" in text) == name.endswith(WITHOUT_GRAPHS)
    warnings = [line for line in text.splitlines() if "warning" in line]
    # That an orthogonal direction costs so small a model most of an update is said, and true.
    assert "--dtype bfloat16" in text and not [each for each in warnings if "orthogonalises all momenta" not in each]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item: the number of CUDA graphs that have been replayed."""
    replay, count = torch.cuda.CUDAGraph.replay, [0]

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        count[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GPU_MODE)
def test_a_gpu_computes_what_was_recorded(name: str, tmp_path: Path, replays: list[int]) -> None:
    found = {}
    for each in names("cuda"):
        if each.removesuffix(WITHOUT_GRAPHS) == name:
            before, folder = replays[0], tmp_path / each
            folder.mkdir()
            found[each] = run(each, "cuda", folder)
            assert (replays[0] > before) == (MODES[name].has_graphs and each == name)
    for lines in found.values():
        assert not differences(lines, found[name])  # with graphs and without, whatever is recorded
    here = place("cuda")
    recording = recording_for(here)
    if recording is None:
        pytest.skip("nothing is recorded of a GPU; python -m tests.golden.record --device cuda does it")
    for each, lines in found.items():
        assert_as_recorded(each, lines, recording, here, COARSE)  # weights are bfloat16, and updates more
