"""A short run of `benchmarks/chaos.py`: kills and other faults on one rank and on two, and the same bits at the end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import chaos, chaos_faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"),
    [("q_galore_per_layer", 1), ("q_galore_streaming", 2), ("galore8bit", 1), ("q_galore_shard_full", 2)],
)
def test_no_fault_changes_a_bit(tmp_path: Path, name: str, ranks: int) -> None:
    (setting,) = (
        each for each in chaos_faults.SETTINGS + chaos_faults.SHARDED if (each.name, each.ranks) == (name, ranks)
    )
    deck = chaos.deal(9 - 2 * ranks, 5, ranks, random.Random(1))
    report = chaos.disturb_all(tmp_path / "chaos", [setting], [deck], seed=1)
    assert report.failures == []
    assert report.kills == 9 - 2 * ranks
    assert report.same_bits == report.made
    kinds = {kind for _, _, kind in report.made}
    assert {chaos.FLIPPED, chaos.CUT, chaos.LOST, chaos.FULL_DISK, chaos.STOPPED} <= kinds
    assert any(kind.startswith(chaos.NETWORK) for kind in kinds) == bool(setting.from_hub)


@pytest.mark.slow
def test_another_bit_is_noticed(tmp_path: Path) -> None:
    """The comparison itself: against a run whose loss was larger in its last digit."""
    report = chaos.Report()
    subject = chaos.Chaos(chaos.SETTINGS[0], tmp_path / "chaos", report, random.Random(3))
    subject.expected["metrics"][0]["train/loss"] += 1e-6
    subject.chain([chaos.Fault(chaos.CUT)])
    assert ["other bits of ['metrics']" in failure for failure in report.failures] == [True]
    assert sum(report.made.values()) == 1 and sum(report.same_bits.values()) == 0


def test_a_moment_that_is_never_reached_is_no_kill(tmp_path: Path) -> None:
    report = chaos.Report()
    subject = chaos.Chaos(chaos.SETTINGS[0], tmp_path / "chaos", report, random.Random(3))
    ending = subject.start("run", CHAOS_MOMENT="checkpoint/store.py:publish:call:999")
    assert not ending.killed and chaos.STARTED in ending.output, "by which signals and kills find its updates"
    ending = subject.start("other", CHAOS_MOMENT="checkpoint/store.py:publish:call:2")
    assert ending.killed and ending.code == -9
    assert [path.name for path in chaos.list_checkpoints(subject.folder / "other")] == ["step_00000000"]


def test_every_moment_is_in_the_program(root: Path) -> None:
    for file, function, _ in [moment for moments in chaos_faults.MOMENTS.values() for moment in moments]:
        found = [path for name in ("qgalore", "peft_pretraining") for path in (root / name).rglob("*.py")]
        named = [path for path in found if path.as_posix().endswith(f"/{file}")]
        if file != "shutil.py":
            assert len(named) == 1 and f"def {function}(" in named[0].read_text(), (file, function)


def test_a_fault_that_cannot_be_made_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "LONGEST_IDLE", 1)
    deck = [chaos.Fault(chaos.SAVE, "checkpoint/store.py:no_such_function:call:1")]
    report = chaos.disturb_all(tmp_path / "chaos", chaos.SETTINGS[:1], [deck], seed=1)
    assert ["could never be made" in failure for failure in report.failures] == [True] and report.kills == 0
