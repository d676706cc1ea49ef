"""The commands of docs/guide: those of pages that have no test file of their own, and that every page has tests."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_pretrain
from docs.make.csv_rows import rows_of
from peft_pretraining.commands import main as qgalore
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.shipped_runs import ShippedRun
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS
from tests.data.files import write_texts
from tests.small_run import CONFIG, ROOT, restored_process
from tests.test_guide import documents
from tests.test_scripts import run_script

GUIDE = ROOT / "docs" / "guide"
SMALL = (
    "--batch_size 4 --total_batch_size 4 --max_length 32 --num_training_steps 2 --warmup_steps 0 --data_lanes 4 "
    "--workers 0 --dtype float32 --device cpu --eval_every 0 --eval_tokens 200 --unset_wandb --tokenizer train:400"
)


def commands(page: str) -> list[str]:
    """The lines of a page's blocks of bash, those that go on joined."""
    text = (GUIDE / page).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", "")
    return blocks.splitlines()


def test_every_page_of_the_guide_has_a_test_and_a_line_in_its_index() -> None:
    index, tests = (GUIDE / "index.md").read_text(encoding="utf-8"), sorted((ROOT / "tests").glob("test_*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in tests)
    pages = [path.name for path in GUIDE.glob("*.md") if path.name != "index.md"]
    assert len(pages) >= 8
    for name in pages:
        assert f"]({name})" in index, name
        assert f'"{name}"' in text or f"docs/guide/{name}" in text, f"no test reads the commands of {name}"


@pytest.mark.parametrize("name", sorted(page.stem for page in GUIDE.glob("*.md")))
def test_a_page_is_one_screen(name: str) -> None:
    assert len((GUIDE / f"{name}.md").read_text(encoding="utf-8").splitlines()) <= 70


# ---- 7B on 16 GB


@pytest.mark.parametrize("line", commands("seven_b.md"))
def test_a_command_of_7b_on_16_gb_plans_the_run(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    if words[0] == "qgalore":
        assert qgalore(words[1:]) == 0 and "| 7B " in capsys.readouterr().out
        return
    if words[0] == "bash":
        done = run_script(*words[1:], launcher="echo")
        assert done.returncode == 0, done.stderr
        argv = done.stdout.split()[1:]
    else:
        assert words[:2] == ["python", "run_pretrain.py"]
        argv = words[2:]
    text = tmp_path / "my_text"
    write_texts(text / "a.jsonl", documents(120))
    argv = [str(text) if word == "my_text" else word for word in argv]
    with restored_process():
        assert run_pretrain.main([*argv, "--dry_run"]) == 0
    planned = capsys.readouterr().out
    assert "7b" in planned and "Planned memory of one rank" in planned


def test_the_planned_figures_of_the_page_are_those_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text, peaks = (GUIDE / "seven_b.md").read_text(encoding="utf-8"), []
    for extra in ("", "--batch_size 8 --rank 768"):
        script = "scripts/single_gpu/llama_7b.sh"
        done = run_script(script, "q_galore_streaming", *extra.split(), launcher="echo")
        with restored_process():
            assert run_pretrain.main([*done.stdout.split()[1:], "--device", "cuda", "--dry_run"]) == 0
        peaks.append(float(re.findall(r"^  peak +([\d.]+) GB", capsys.readouterr().out, re.MULTILINE)[0]))
    assert f"stops: {peaks[0]:.1f} GB" in text and f"{peaks[1]:.1f} GB by the plan" in text
    for line, sentence in (
        ("--accumulate_by", "12.6 GiB on an H200; {:.1f} by the plan"),
        ("--sum_in_momentum", "capped to 15.4 GiB; {:.1f} by the plan"),
    ):
        (command,) = (command for command in commands("seven_b.md") if line in command)
        args = parse_args(shlex.split(command)[2:])
        assert sentence.format(plan(args, read_config(args.model.model_config)).peak_bytes / 1e9) in text
    rows = [row for row in rows_of("compare.csv") if row["commit"] == "164f053" and row["cap_gib"]]
    assert [(row["cap_gib"], f"{float(row['run_peak_gb']):.1f}") for row in rows] == [
        ("15.4", "15.4"),
        ("12.6", "12.4"),
    ]
    fit = ShippedRun("7b").fit(16 * 10**9, CARDS["4060ti"])
    assert 10e9 / fit.tokens_per_second / 86_400 == pytest.approx(182, rel=0.1) and "half a year" in text


# ---- which recipe, when it stops


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with text and a small model."""
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "my_text" / "a.jsonl", documents(120))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    yield tmp_path


def run(line: str, shared: list[str], extra: str) -> int:
    """A command of a page in small: its own flags over the page's shared ones, and over those `SMALL`."""
    words = shlex.split(line)
    assert words[:2] == ["python", "$TRAIN"], line
    with restored_process():
        return run_pretrain.main([*shared, *words[2:], "--model_config", "config.json", *SMALL.split(), *extra.split()])


def shared_and_commands(page: str) -> tuple[list[str], list[str]]:
    """The flags that the commands of a page share, and the commands."""
    first, *lines = commands(page)
    words = shlex.split(first.removeprefix("TRAIN="))[0].split()
    assert words[0] == "run_pretrain.py"
    return words[1:], lines


def test_the_shared_flags_of_the_pages_can_be_parsed(place: Path) -> None:
    for page in ("which_recipe.md", "when_it_stops.md"):
        shared, _ = shared_and_commands(page)
        with restored_process():
            assert run_pretrain.main([*shared, "--dry_run"]) == 0


def test_the_bytes_of_recipes_on_the_page_are_those_of_the_plan() -> None:
    def planned(model: str, recipe: str) -> float:
        flags = f"--model_config {model} --optimizer q_galore_adamw8bit_per_layer --recipe {recipe} --batch_size 16"
        args = parse_args(f"{flags} --device cuda".split())
        return plan(args, read_config(args.model.model_config)).weights_and_states_bytes / 1e9

    text = (GUIDE / "which_recipe.md").read_text(encoding="utf-8")
    assert planned("130m", "full_rank") < planned("130m", "orthogonal")
    assert planned("350m", "full_rank") > planned("350m", "orthogonal")
    assert f"plan {planned('7b', 'full_rank'):.1f} GB" in text and f"has {planned('7b', 'orthogonal'):.1f})" in text


def test_each_recipe_of_the_page_trains(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, lines = shared_and_commands("which_recipe.md")
    table = re.findall(r"^\| .* \| `(--optimizer .*)` \|$", (GUIDE / "which_recipe.md").read_text(), re.MULTILINE)
    assert len(lines) >= 6 and [line.removeprefix("python $TRAIN ") for line in lines] == table
    for number, line in enumerate(lines):
        rank = "--rank 16" if "--rank" in line else ""
        assert run(line, shared, f"--save_every 0 --save_dir run{number} {rank}") == 0
        losses = [each for each in read_lines(place / f"run{number}") if "train/loss" in each]
        assert len(losses) == 2
    said = capsys.readouterr().err
    for words in ("recipe orthogonal", "recipe full_rank", "recipe paper"):
        assert words in said


def test_each_command_of_when_it_stops_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, lines = shared_and_commands("when_it_stops.md")
    start, longer, elsewhere, *after = lines
    assert run(start, shared, "--num_training_steps 2 --save_every 1") == 0
    assert run(start, shared, "--num_training_steps 2 --save_every 1") == 0  # the same command again
    assert "2 of 2 updates are made already" in capsys.readouterr().err
    assert run(longer, shared, "--num_training_steps 4 --save_every 1") == 0
    (place / "runs/mine/step_00000002").rename(place / "runs/mine/step_00000500")
    assert "step_00000500" in elsewhere and run(elsewhere, shared, "--num_training_steps 4 --save_every 0") == 0
    assert [line["update_step"] for line in read_lines(place / "runs/other") if "train/loss" in line] == [3, 4]
    pytest.importorskip("matplotlib")
    assert [shlex.split(line)[:2] for line in after] == [["qgalore", "plot"], ["qgalore", "report"]]
    for line in after:
        words = shlex.split(line)[1:]
        assert qgalore([*words, *(["--device", "cpu"] if words[0] == "report" else [])]) == 0


def read_lines(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
