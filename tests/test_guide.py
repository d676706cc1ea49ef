"""The commands of docs/guide/my_own_data.md, other_sources.md and tokenizers.md: each as it stands, but in small."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_pretrain
from peft_pretraining.commands import tokenize as tokenize_dataset
from tests.data.files import write_texts
from tests.data.hub_server import DatasetHub, HubRepository, point_at
from tests.small_run import CONFIG, ROOT, restored_process

PAGES = [ROOT / "docs" / "guide" / name for name in ("my_own_data.md", "other_sources.md", "tokenizers.md")]
SMALL = (
    "--batch_size 2 --total_batch_size 4 --max_length 32 --num_training_steps 2 --warmup_steps 0 --data_lanes 4 "
    "--workers 0 --dtype float32 --device cpu --optimizer adamw --save_every 0 --eval_every 0 --eval_tokens 200 "
    "--unset_wandb"
)
REPOSITORY = "HuggingFaceFW/fineweb-edu"


def commands() -> list[str]:
    """The commands of the pages, a line each, in their order."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("TRAIN=")]


def documents(count: int, begin: int = 0) -> list[str]:
    return [
        f"document {i} has the words {' '.join(f'w{i * k % 89}' for k in range(2, 14))}" for i in range(begin, count)
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with everything that the page speaks of, and a hub."""
    import datasets

    texts = documents(120)
    write_texts(tmp_path / "my_text" / "a.jsonl", texts[:60])
    write_texts(tmp_path / "my_text" / "b.jsonl", texts[60:])
    write_texts(tmp_path / "crawl" / "part-0.jsonl.gz", texts)
    write_texts(tmp_path / "table.parquet", texts, column="body")
    for number, text in enumerate(texts):
        write_texts(tmp_path / "books" / f"{number:03}.txt", [text, "its second line"])
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved_dataset")
    for folder in ("sample/10BT", "data/CC-MAIN-2013-20"):
        write_texts(tmp_path / "repository" / folder / "000.parquet", texts)
    (tmp_path / "repository" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/*/*\n- config_name: sample-10BT\n"
        "  data_files: sample/10BT/*\n---\n"
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 8192}))
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub = DatasetHub({REPOSITORY: HubRepository(tmp_path / "repository")})
    point_at(hub, tmp_path / "hub_cache", monkeypatch)
    yield tmp_path
    hub.close()


def run(command: str, place: Path, number: int) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "scripts/tokenize_dataset.py"]:
        assert tokenize_dataset.main(words[2:]) == 0
        return
    assert words[:2] == ["python", "$TRAIN"], command
    argv = ["--model_config", str(place / "config.json"), *SMALL.split(), *words[2:]]
    argv += ["--save_dir", str(place / f"run{number}")]
    text = not words[-1].endswith("tokens")
    argv += [] if "--tokenizer" in words or not text else ["--tokenizer", "train:400"]
    with restored_process():
        assert run_pretrain.main(argv) == 0
    metrics = [json.loads(line) for line in (place / f"run{number}" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/perplexity" in line for line in metrics) and any("train/loss" in line for line in metrics)


def test_each_command_of_my_own_data_works(place: Path) -> None:
    found = commands()
    assert len(found) >= 10
    for number, command in enumerate(found):
        run(command, place, number)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_training_command_of_the_page_is_one_that_can_be_parsed(page: Path) -> None:
    (line,) = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("TRAIN="))
    words = shlex.split(line.removeprefix("TRAIN="))[0].split()
    assert words[0] == "run_pretrain.py" and (ROOT / words[2]).is_file()
    with restored_process():
        assert run_pretrain.main([*words[1:], "--dry_run", "--dataset", "pydocs"]) == 0


def test_a_run_goes_on_with_its_tokenizer_and_says_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where today's documents would give one of more ids than the model has, and would be held out otherwise."""
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path / "text" / "a.jsonl", documents(120))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 5000}))

    def go_on(updates: int) -> str:
        argv = ["--model_config", str(tmp_path / "config.json"), "--dataset", str(tmp_path / "text"), *SMALL.split()]
        argv += ["--save_dir", str(tmp_path / "run"), "--tokenizer", "train:5000", "--save_every", "1"]
        argv += ["--continue_from", "auto", "--num_training_steps", str(updates)]
        with restored_process():
            assert run_pretrain.main(argv) == 0
        return "".join(capfd.readouterr())

    first = go_on(1)
    (ids,) = re.findall(r"BPE of ([\d,]+) ids", first)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": int(ids.replace(",", ""))}))
    shutil.rmtree(tmp_path / "run")
    go_on(1)
    write_texts(tmp_path / "text" / "a.jsonl", [*documents(120), *(f"other words {i} {i * i}" for i in range(300))])
    said = go_on(2)
    assert f"BPE of {ids} ids" in said and "as the run began with it" in said
    assert "validation  12 documents of it" in said and "a.jsonl (" in said
