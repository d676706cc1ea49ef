"""docs/guide/offload.md: its commands are command lines, and its figures those of the plan."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.rows import ROOT
from peft_pretraining.build import shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan

TEXT = (ROOT / "docs" / "guide" / "offload.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python run_pretrain.py (.*)$", TEXT, flags=re.MULTILINE)
ROWS = re.findall(r"^\| (\d+b) \| (\d+), (\d+) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_read_without_warnings(command: str) -> None:
    args = parse_args(shlex.split(command))
    assert args.runtime.offload != "none" and args.by_layer and args.runtime.dry_run and not args.warnings


def test_there_is_a_row_for_each_model() -> None:
    assert [row[0] for row in ROWS] == ["7b", "13b", "30b", "70b"] and len(COMMANDS) == 3


@pytest.mark.parametrize("row", ROWS)
def test_planned_bytes_are_those_of_the_plan(row: tuple[str, str, str, str]) -> None:
    model, batch, total, cells = row
    command = f"--model_config {model} --optimizer q_galore_adamw8bit_per_layer --batch_size {batch} --device cuda"
    command += f" --total_batch_size {total} --accumulate_by layer --dataset pydocs"
    command += " --recipe orthogonal --rank 1024" if model == "70b" else ""
    found = []
    for offload in ("none", "states", "weights"):
        args = parse_args([*command.split(), "--offload", offload])
        config = shape_of(args.model)
        assert config is not None
        found.append(plan(args, config))
    expected = [f"{each.peak_bytes / 1e9:.1f}" for each in found] + [f"{each.host / 1e9:.1f}" for each in found]
    assert cells.split(" | ") == expected
