"""The commands of docs/guide/after_training.md: each is run as it stands, on a small run."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_pretraining.commands import main
from peft_pretraining.commands.export import three_lines
from tests.data.files import write_texts
from tests.golden.record import restored_process
from tests.small_run import CONFIG, ROOT, SmallRun, flags_of

transformers = pytest.importorskip("transformers")
matplotlib = pytest.importorskip("matplotlib")

PAGE = (ROOT / "docs" / "guide" / "after_training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """An evaluation allows deterministic kernels alone."""
    with restored_process():
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page speaks of."""
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    texts = [f"The first of {i} has the words {' '.join(f'w{i * k % 89}' for k in range(2, 14))}" for i in range(120)]
    write_texts(tmp_path / "my_text.jsonl", texts)
    write_texts(tmp_path / "other.jsonl", [f"Another text {i}, which is not of the run" for i in range(9)])
    (tmp_path / "prompts.txt").write_text("The first\nA second\n")
    small = SmallRun(tmp_path)
    small.config.write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    flags = {**flags_of("q_galore_adamw8bit_per_layer"), "num_training_steps": 2, "tokenizer": "train:400"}
    small.run("runs/mine", **flags, dataset=tmp_path / "my_text.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_command_of_the_page_works(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(blocks("bash")).splitlines()
    assert len(lines) == 11
    printed = {}
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "qgalore"
        if "<" in words:
            monkeypatch.setattr("sys.stdin", io.StringIO((place / words[-1]).read_text()))
            words = words[:-2]
        assert main([*words[1:], *([] if words[1] in ("export", "plot") else ["--device", "cpu"])]) == 0, line
        printed[line] = capsys.readouterr().out
    of_run, of_two, of_file, *_ = printed.values()
    assert of_run.startswith("The first thing that") and "\nA second" in of_two and "\nA second" in of_file
    measured = [text for line, text in printed.items() if "evaluate" in line]
    assert len(measured) == 4 and all("perplexity_official" in text and "bits" in text for text in measured)
    assert (place / "runs/mine/report.html").is_file() and (place / "runs/mine/curves.png").is_file()
    (python,) = blocks("python")
    assert python.split() == three_lines(Path("exported")).split()
    exec(python, {})
    assert capsys.readouterr().out.startswith("The")
