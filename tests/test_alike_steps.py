"""Newton-Schulz steps of ranks whose GPUs are not alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_pretraining.config.parse import parse_args
from peft_pretraining.runtime import alike_steps
from peft_pretraining.runtime.alike_steps import with_steps_of_all
from peft_pretraining.runtime.world import World
from tests.small_run import RECIPE, SmallRun

RUN = "--model_config 60m --batch_size 1 --optimizer q_galore_adamw8bit_per_layer"


@pytest.mark.parametrize(
    ("capabilities", "flags", "machine", "steps"),
    [
        ([(8, 9), (8, 6)], "", 2, "muon"),
        ([(8, 9), (9, 0)], "", 2, "auto"),
        ([(8, 6), (8, 0)], "", 2, "auto"),
        ([(8, 9)], "", 1, "auto"),
        ([(8, 9), (8, 6)], "--newton_schulz polar5", 2, "polar5"),
        ([(8, 9), (8, 6)], "--shard optimizer", 2, "auto"),
        ([(8, 9), (8, 6)], "--shard full", 2, "auto"),
        ([(8, 9), (8, 9), (8, 6), (8, 6)], "--shard full", 2, "muon"),
    ],
)
def test_ranks_that_update_copies_make_the_same_steps(
    capabilities: list[tuple[int, int]], flags: str, machine: int, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machine))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(alike_steps, "use_triton", lambda device: True)
    args = parse_args(f"{RUN} {flags}".split(), world_size=len(capabilities))
    worlds = [World(rank, len(capabilities), torch.device("cuda", rank)) for rank in range(len(capabilities))]
    everyone = [alike_steps._makes_fp8(world.device) for world in worlds]
    monkeypatch.setattr(World, "gather", lambda world, value: everyone)
    note = f"--newton_schulz muon instead of auto: {sum(everyone)} of {len(everyone)} ranks have products in FP8"
    for world in worlds:
        found = with_steps_of_all(args, world)
        assert found.newton_schulz == steps and (note in str(found.notes)) == (steps == "muon")


def test_a_run_with_auto_may_go_on_with_what_auto_is_on_some_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SmallRun(tmp_path)
    flags = RECIPE | {"optimizer": "q_galore_adamw8bit", "weight_group_size": 48, "save_every": 4}
    whole = small.run("whole", **flags, num_training_steps=4)
    assert whole.checkpoint().state["newton_schulz"] == "auto"
    goes_on = flags | {"continue_from": "auto", "num_training_steps": 6, "newton_schulz": "muon"}
    small.run("whole", **goes_on, dry_run=True)
    assert "would be refused" not in capsys.readouterr().out
    small.run("whole", **goes_on)
    said = capsys.readouterr()
    assert "--newton_schulz auto -> muon" in said.err
    assert small.main("whole", **flags, continue_from="auto", num_training_steps=8, newton_schulz="auto") == 2
    assert "newton_schulz is 'auto' here and 'muon' there" in capsys.readouterr().err
