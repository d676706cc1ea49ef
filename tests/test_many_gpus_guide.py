"""docs/guide/many_gpus.md: its commands are command lines, and its figures those of the plan."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.rows import ROOT
from peft_pretraining.build import shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan

TEXT = (ROOT / "docs" / "guide" / "many_gpus.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()
]  # fmt: skip


def flags_of_command(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("run_pretrain.py") + 1 :]


@pytest.mark.parametrize("command", [line for line in COMMANDS if "run_pretrain.py" in line])
def test_commands_are_read_on_all_their_ranks(command: str) -> None:
    ranks = [int(number) for number in re.findall(r"--n(?:nodes|proc_per_node) (\d+)", command)]
    world_size = ranks[0] * (ranks[1] if len(ranks) > 1 else 1) if ranks else 1
    args = parse_args(flags_of_command(command), world_size)
    assert args.runtime.shard != "none" and args.batch.total_batch_size == 512
    assert not [text for text in args.warnings if "--shard" in text]


def test_scripts_of_the_page_are_there() -> None:
    (command,) = [line for line in COMMANDS if line.startswith("sbatch")]
    scripts = [word for word in shlex.split(command) if word.endswith(".sh")]
    assert len(scripts) == 2 and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("row", re.findall(r"^\| (\d) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE))
def test_planned_bytes_are_those_of_the_plan(row: tuple[str, str]) -> None:
    (command,) = [line for line in COMMANDS if "--dry_run" in line]
    ranks, cells = row[0], row[1].split(" | ")
    expected = []
    for model, rank in (("7b", "1024"), ("13b", "1280")):
        for shard in ("none", "optimizer", "full"):
            changed = {"--model_config": f"configs/llama_{model}.json", "--rank": rank, "--nproc": ranks}
            words = flags_of_command(command)
            for flag, value in (changed | {"--shard": shard}).items():
                words[words.index(flag) + 1] = value
            args = parse_args(words)
            config = shape_of(args.model)
            assert config is not None and args.world_size == int(ranks)
            expected.append(f"{plan(args, config).peak_bytes / 1e9:.1f}")
    assert cells == expected


def test_there_are_rows_for_two_four_and_eight() -> None:
    assert [row[0] for row in re.findall(r"^\| (\d) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE)] == ["2", "4", "8"]
