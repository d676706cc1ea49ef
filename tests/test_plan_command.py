"""`qgalore plan`: what trains in the memory of a card, in tables and in sentences."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import run_pretrain
from docs.make import cards_tables
from peft_pretraining import commands
from peft_pretraining.commands import plan as command
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.shipped_runs import RECIPES, TOKENS_PER_UPDATE, ShippedRun
from peft_pretraining.models.config_files import shipped_configs
from peft_pretraining.speed.cards import CARDS
from tests.small_run import SmallRun

ROOT = Path(__file__).resolve().parent.parent


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert commands.main(["plan", *argv]) == 0
    return capsys.readouterr().out.strip()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@cache
def shipped(model: str) -> ShippedRun:
    return ShippedRun(model)


def test_several_memories_are_a_table_with_a_column_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the page of cards, which has more models."""
    page = (ROOT / "docs" / "results" / "cards.md").read_text(encoding="utf-8")
    shown = [cells(line) for line in page.splitlines() if line.startswith("| ")]
    argv = shlex.split(cards_tables.FULL)
    argv[argv.index("--model") + 1] = "60m,1b"
    head, _, *rows = [cells(line) for line in printed(capsys, *argv).splitlines() if line.startswith("|")]
    assert head in shown and [row[0] for row in rows] == ["60M", "1B"] and all(row in shown for row in rows)


def test_a_memory_has_a_line_for_each_model_that_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--memory", "3GB", "--gpu", "h100", "--model", "60m,7b")
    head, _, small, large = (cells(line) for line in text.splitlines() if line.startswith("|"))
    fit = shipped("60m").fit(3 * 10**9, CARDS["h100"])
    assert fit.chosen is not None
    args = fit.chosen.args
    row = dict(zip(head, small, strict=True))
    assert row["micro-batch"] == f"{args.batch.gradient_accumulation} x {args.batch.batch_size}"
    assert (row["length"], row["rank"], row["planned GB"]) == ("256", "128", f"{fit.chosen.peak / 1e9:.2f}")
    assert plan(args, fit.chosen.config).peak_bytes == fit.chosen.peak < 3e9
    assert float(row["days"]) == pytest.approx(10_000 * TOKENS_PER_UPDATE / fit.tokens_per_second / 86_400, abs=0.001)
    assert large[0] == "7B" and re.fullmatch(r"at least \d+\.\d\d GB", large[1])
    # What was measured on that card within that memory, and what was not measured at all.
    assert "60M: 1,200,219 tokens/s, 2.12 GB, 1 x 256, rank 128, all recomputed (caf4340)" in text
    assert "1,421,841" not in text and "No consumer card was measured" in text


def test_a_setting_that_was_measured_has_the_measured_speed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--gpu", "h100", "--memory", "15.5GB", "--model", "7b", "--grad_accum_dtype", "int8", "--batch_size", "16")
    text = printed(capsys, *argv, "--activation_checkpointing", "--checkpoint_every", "1")
    assert re.search(r"\| 7B +\| 32 x 16 .*\| all +\| sums +\| 15\.\d\d +\| 11,422 +\| measured \|", text)


def test_flags_of_a_run_take_the_place_of_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "--memory", "8GB", "--model", "9m", "--max_length", "512", "--total_batch_size", "64", "--rank", "32"
    )
    row = cells(text.splitlines()[4])
    assert row[2:4] == ["512", "32"] and math.prod(map(int, row[1].split(" x "))) == 64
    text = printed(capsys, "--memory", "8GB", "--model", "9m", "--optimizer", "adamw")
    assert cells(text.splitlines()[4])[3] == "-"
    assert "| 56 " in printed(capsys, "--memory", "8GB", "--model", "9m", "--recipe", "orthogonal")
    for full in (("--rank", "full"), ("--rank=full",)):
        assert "| full " in printed(capsys, "--memory", "8GB", "--model", "9m", *full)


def test_models_of_a_shorter_context_are_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    table, _, note = printed(capsys, "--memory", "8GB", "--max_length", "4096").rpartition("\n\n")
    assert re.findall(r"^\| (\d+[MB]) ", table, re.MULTILINE) == ["70B"]
    assert note.startswith("Left out, as --max_length is longer than their max_position_embeddings: 9m, 20m, ")
    assert "13b, 30b. For one" in note
    assert commands.main(["plan", "--memory", "8GB", "--model", "1b,7b", "--max_length", "2048"]) == 2
    assert "llama_1b.json has max_position_embeddings 1024" in capsys.readouterr().err


def test_flags_of_a_run_print_what_dry_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = SmallRun(tmp_path).argv("run", {})
    assert run_pretrain.main([*argv, "--dry_run"]) == 0
    expected = capsys.readouterr().out.strip().replace("--dry_run True", "--dry_run False")
    assert printed(capsys, *argv) == expected
    with_card = printed(capsys, *argv, "--gpu", "4090")
    assert with_card.startswith(expected) and re.search(
        r"speed: [\d,]+ tokens/s counted for GeForce RTX 4090, where all updates take less than an hour$", with_card
    )
    within = printed(capsys, *argv, "--memory", "1GB")
    assert "counted for GeForce RTX 4060 Ti 8 GB" in within.splitlines()[-1]  # of the smallest cards in the table
    assert "--memory_budget 1GB chooses" in within and "--memory_budget 1000000000" in within


def test_the_time_of_a_run_is_its_tokens_by_the_counted_speed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--gpu 4090 --model_config 1b --dataset pydocs --total_batch_size 512 --max_length 256 --batch_size 16"
    argv = [*flags.split(), *["--optimizer", "q_galore_adamw8bit_per_layer"]]
    for updates, unit, hours in ((20_000, "days", 24), (2_000, "hours", 1)):
        text = printed(capsys, *argv, "--num_training_steps", str(updates))
        speed, time, found = re.findall(r"speed: ([\d,]+) .* take ([\d.]+) (\w+)$", text)[0]
        assert float(time) * hours == pytest.approx(updates * 512 * 256 / int(speed.replace(",", "")) / 3600, rel=0.05)
        assert found == unit


def test_the_recipes_are_those_of_the_scripts() -> None:
    for model, (rank, updates) in RECIPES.items():
        text = (ROOT / "scripts" / "pretrain_c4" / f"llama_{model}.sh").read_text(encoding="utf-8")
        values = dict(re.findall(r"^(\w+)=(\d+)$", text, re.MULTILINE))
        assert (values["RANK"], values["UPDATES"]) == (str(rank), str(updates))
    common = (ROOT / "scripts" / "recipe.sh").read_text(encoding="utf-8")
    assert "--total_batch_size 512" in common and "--max_length 256" in common and TOKENS_PER_UPDATE == 512 * 256


def test_all_shipped_models_are_planned_where_none_is_named() -> None:
    assert command.model_names("") == list(shipped_configs())
    assert command.model_names("7B, llama_60m") == ["7b", "60m"]


@pytest.mark.parametrize("model", list(shipped_configs()))
def test_every_shipped_model_can_be_planned(model: str) -> None:
    """As `qgalore plan --gpu 4090` does; 70B has matrices that are narrower than half of its hidden size."""
    assert ShippedRun(model).candidates.chains


def test_every_card_has_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [cells(line) for line in printed(capsys, "--cards").splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == list(CARDS)
    assert all("white paper" in line[6] or "data sheet" in line[6] for line in lines[2:])
    assert {line[0] for line in lines[2:] if line[7] == "yes"} == {"h100", "h200"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --memory, such as --memory 12GB, or --gpu, such as --gpu 4090"),
        ("--memroy 12GB", "(--memroy is no flag of this command)"),
        (
            "--memory 12",
            "--memory is '12', it must be a size with its unit, such as 24GB (10^9 bytes) or 22.5GiB (2^30)",
        ),
        ("--gpu 4099", "--gpu 4099 is not in the table of cards: did you mean 4090?"),
        ("--gpu 4090 --memory 48GB", "--memory 48GB is more than the 24 GB of GeForce RTX 4090: give at most that"),
        ("--memory 8GB --model 61m", "--model 61m is none of the shipped models, which are 9m, 20m, "),
        ("--memory 8GB --model 9m --frobnicate 1", "--frobnicate is no flag of this program"),
        (
            "--memory 8GB --model 9m --model_config x",
            "--model 9m is for shipped models, and --model_config names one run",
        ),
        ("--gpu", "--gpu has no value: write --gpu NAME"),
        ("--memory -5GB", "--memory has no value: write --memory SIZE"),
        ("--cards all", "all: --cards prints the table of all cards, and takes nothing: leave it out"),
        ("--cards --gpu 4090", "--gpu: --cards prints the table of all cards, and takes nothing: leave it out"),
        ("--cards=4090", "--cards prints the table of all cards: write --cards alone"),
        ("--gpu 4090 --memory_budget 2GB", "--memory_budget is the budget of a run, which --memory or --gpu gives"),
        ("--memory 8GB --memory_budget 2GB", "--memory_budget is the budget of a run, which --memory or --gpu gives"),
        ("--gpu 4090 --device=cpu", "--device cpu: what a card trains is planned with --gpu and --memory: leave one"),
        ("--gpu 4090 --shard full", "--shard deals a model to several ranks, and one is planned: give --nproc"),
        (
            "--gpu 4090 --shard full --nproc 1",
            "--shard deals a model to several ranks, and one is planned: give --nproc",
        ),
        ("--gpu 4090 --nproc 0", "--nproc is 0, it must be at least 1 (ranks)"),
    ],
)
def test_what_cannot_work_is_a_sentence(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["plan", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qgalore plan: ") and message in error


def test_a_plan_of_several_cards_says_so_and_calls_no_speed_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are of one GPU. Without --nproc the same setting has the speed of a row."""
    argv = ("--gpu", "h100", "--memory", "15.5GB", "--model", "7b", "--grad_accum_dtype", "int8", "--batch_size", "16")
    one, two = printed(capsys, *argv), printed(capsys, *argv, "--nproc", "2", "--activation_checkpointing")
    assert (
        one.startswith("What trains in 15.5 GB (10^9 bytes), at the speed of H100 SXM:") and "on one such card" in one
    )
    assert two.startswith(
        "What trains in 15.5 GB (10^9 bytes) of each, at the speed of 2 x H100 SXM, without the time of messages:"
    )
    assert "on 2 such cards" in two
    rows = [cells(next(line for line in text.splitlines() if line.startswith("| 7B "))) for text in (one, two)]
    assert [row[8] for row in rows] == ["measured", "counted"] and [row[1] for row in rows] == ["32 x 16", "16 x 16"]
    speeds = [float(row[7].replace(",", "")) for row in rows]
    assert 1.8 < speeds[1] / speeds[0] < 2.2


def test_cards_and_refusals_load_nothing_heavy() -> None:
    program = "import sys; from peft_pretraining.commands import main; main(['plan', '--cards']); main(['plan']); "
    program += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "RTX 4090" in done.stdout and "give --memory" in done.stderr


@pytest.mark.parametrize("flags", ["--fp8_products", "--newton_schulz muon_fp8", "--newton_schulz=muon4_fp8"])
def test_a_card_without_fp8_has_no_products_in_fp8(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (f"--model 60m {flags}", f"--model_config configs/llama_60m.json --dataset pydocs {flags}"):
        assert commands.main(["plan", "--gpu", "3090", *run.split()]) == 2
        asked = flags.replace("=", " ")
        said = f"{asked} on --gpu 3090: GeForce RTX 3090 has no products in FP8, which need compute capability 8.9"
        assert said in capsys.readouterr().err


def test_steps_of_a_checkpoint_are_held_against_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    state = {"optimizer": "q_galore_adamw8bit", "recipe": "full_rank", "newton_schulz": "muon_fp8"}
    (folder / "state.json").write_text(json.dumps(state))
    run = "--model_config 60m --dataset pydocs --batch_size 8 --optimizer q_galore_adamw8bit --continue_from"
    assert commands.main(["plan", "--gpu", "3090", *run.split(), str(folder)]) == 2
    said = "--newton_schulz muon_fp8, as in the checkpoint, on --gpu 3090: GeForce RTX 3090 has no products in FP8"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--newton_schulz auto", "--optimizer AdamW --newton_schulz muon_fp8"])
def test_flags_that_make_no_products_in_fp8_are_no_fault_of_a_card(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, "--gpu", "3090", "--model", "60m", *flags.split())
