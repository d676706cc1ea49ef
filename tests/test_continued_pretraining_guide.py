"""The commands of docs/guide/continued_pretraining.md, each as it stands but for the flags that they share."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_pretrain
from tests.data.files import write_texts
from tests.data.hub_server import DatasetHub, HubRepository, point_at
from tests.small_run import ROOT, restored_process
from tests.test_guide import SMALL, documents
from tests.test_init_from import theirs

PAGE = ROOT / "docs" / "guide" / "continued_pretraining.md"


def lines() -> tuple[list[str], list[str]]:
    """The flags that the commands of the page share, and the commands in their order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    shared, *commands = [line for block in blocks for line in block.splitlines()]
    return shlex.split(shared.removeprefix("TRAIN="))[0].split(), commands


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with everything that the page speaks of, and a hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "my_text" / "a.jsonl", documents(120))
    write_texts(tmp_path / "other_text" / "a.jsonl", documents(240, begin=120))
    theirs(tie_word_embeddings=True).save_pretrained(tmp_path / "my_model")
    words = ["<pad>", "</s>", "<unk>", "document", "has", "the", "words", *(f"w{i}" for i in range(89))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "my_model" / "tokenizer.json"))
    hub = DatasetHub({"HuggingFaceTB/SmolLM2-135M": HubRepository(tmp_path / "my_model")})
    point_at(hub, tmp_path / "cache", monkeypatch)
    yield tmp_path
    hub.close()


def run(argv: list[str]) -> int:
    with restored_process():
        return run_pretrain.main(argv)


def test_each_command_of_continued_pretraining_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, commands = lines()
    small = [*SMALL.split(), "--optimizer", "q_galore_adamw8bit_per_layer", "--weight_quant", "--rank", "16"]
    first = ["--init_from", "my_model", "--dataset", "my_text", "--save_dir", "runs/first"]
    assert run([*small, *first, "--num_training_steps", "2", "--save_every", "1"]) == 0
    assert len(commands) == 5
    for number, command in enumerate(commands):
        words = shlex.split(command)
        assert words[:2] == ["python", "$TRAIN"], command
        folder = [] if "--save_dir" in words else ["--save_dir", f"run{number}"]
        tokenizer = [] if "--init_from" in words else ["--tokenizer", "my_model"]
        capsys.readouterr()
        assert run([*small, *words[2:], *folder, *tokenizer]) == 0
        said = capsys.readouterr().err
        goes_on = "--continue_from" in words
        assert ("update 0: perplexity" in said) == ("--init_from" in words and not goes_on)
        assert ("the run began with the weights of runs/first/step_00000002 (2 updates)" in said) == goes_on
    metrics = [json.loads(line) for line in (place / "runs" / "second" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["update_step"] == 0 and metrics[-1]["update_step"] == 2


def test_the_flags_of_the_page_can_be_parsed(place: Path) -> None:
    shared, _ = lines()
    assert shared[0] == "run_pretrain.py"
    assert run([*shared[1:], "--model_config", "60m", "--dataset", "pydocs", "--dry_run"]) == 0
