"""The commands of docs/guide/finetuning.md: each as it stands, but for smaller models and data where it names none."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.finetune import glue, mmlu
from tests.finetune_files import offline, save_llama, save_roberta, write_glue, write_mmlu
from tests.small_run import ROOT
from tests.test_scripts import run_script

for package in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes", "sklearn"):
    pytest.importorskip(package)
PAGE = (ROOT / "docs" / "guide" / "finetuning.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page speaks of."""
    folder = tmp_path_factory.mktemp("guide")
    save_roberta(folder / "my_roberta")
    save_llama(folder / "my_llama")
    for name, task in glue.TASKS.items():
        write_glue(folder / "my_glue", name, task.columns, task.classes, task.validation)
    write_mmlu(folder / "my_mmlu")
    return folder


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path) -> Iterator[None]:
    with offline(tmp_path):
        yield


def flags_of(command: str) -> list[str]:
    """The program and the flags that a script calls it with."""
    words = shlex.split(command)
    assert words[0] == "bash"
    done = run_script(words[1], *words[2:], launcher="echo")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1:]


def test_the_page_has_these_commands() -> None:
    assert len(COMMANDS) == 6 and all(line.startswith("bash scripts/finetune/") for line in COMMANDS)


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=() if i in (3, 4) else pytest.mark.slow) for i in range(len(COMMANDS))]
)
def test_each_command_of_the_page_works(number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *argv = flags_of(COMMANDS[number])
    monkeypatch.chdir(place)
    name = program.rpartition(".")[2]
    own: dict[str, Any] = {"init_from": {"glue": "my_roberta", "mmlu": "my_llama"}[name], "dataset": f"my_{name}"}
    small = [word for flag, value in own.items() if f"--{flag}" not in argv for word in (f"--{flag}", value)]
    small += ["--device", "cpu", "--max_length", "48", "--num_training_steps", "1", "--max_examples", "16"]
    assert {"glue": glue, "mmlu": mmlu}[name].main([*argv, *small]) == 0
    row = json.loads((place / "runs" / "finetune" / "results.jsonl").read_text().splitlines()[-1])
    assert row["method"] == argv[argv.index("--method") + 1]
    named = f"runs/finetune/{row['task']}-{row['method']}-{row['seed']}"
    folder = Path("runs/mine" if "runs/mine" in argv else named)
    assert (folder / "model").is_dir() and row["flags"]["save_dir"] == str(folder)


def test_what_the_page_says_of_defaults() -> None:
    method, tuning = mmlu.MmluMethodArgs(), mmlu.MmluTuningArgs()
    for text in (
        f"{tuning.lr:g}".replace("e-0", "e-") + f" after {tuning.warmup:.0%}".replace("%", " %"),
        f"{tuning.epochs:g} epoch, {tuning.total_batch_size} questions, {tuning.max_length} tokens",
        f"{method.rank}; `galore_scale` {method.galore_scale:g}, adapters `lora_alpha` {method.lora_alpha:g} with",
        f"with dropout {method.lora_dropout:g} |",
        f"every {method.update_proj_gap} updates",
        f"clipped at {tuning.grad_clipping:g}",
    ):
        assert text in PAGE, text


def test_the_bytes_of_the_page_are_rows() -> None:
    with (ROOT / "benchmarks" / "results" / "finetune.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "roberta_base" and row["updates"] == "0"]
    counted = {
        (row["method"], row["embeddings"]): round((int(row["weight_bytes"]) + int(row["state_bytes"])) / 1e6)
        for row in rows
    }
    for embeddings, start in (("trained", "| here |"), ("frozen", "| here, `--embeddings frozen` |")):
        cells = [
            counted[method, "trained" if "lora" in method else embeddings]
            for method in ("full", "lora", "galore", "qlora", "q_galore")
        ]
        assert f"{start} {' | '.join(map(str, cells))} |" in PAGE
