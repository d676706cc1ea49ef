"""docs/quality.md: figures in tables that name flags are those of the rows, and its commands parse."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import quality, quality_plot
from benchmarks.models import config_path
from benchmarks.rows import ROOT
from peft_pretraining.config.parse import parse_args
from tests.test_quality import token_folder

TEXT = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
with (ROOT / "benchmarks" / "results" / "quality.csv").open(newline="") as file:
    ROWS = list(csv.DictReader(file))
Cells = dict[str, str]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").replace("**", "").split("|")]


def tables() -> list[list[Cells]]:
    """The lines of each table that has a column for setting and flags, by title."""
    found = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)]
    lines = [[dict(zip(cells_of(table[0]), cells_of(line), strict=True)) for line in table[2:]] for table in found]
    return [table for table in lines if "setting, flags" in table[0]]


def flags_of(cell: str, first: Cells) -> tuple[str, dict[str, str]]:
    """The setting of a cell and all its flags with their last value; + is what the first line of the table has."""
    words = cell.strip("`").split()
    if words[0] == "+":
        setting, flags = flags_of(first["setting, flags"], first)
        return setting, flags | last_values(words[1:])
    return words[0], last_values([*quality.SETTINGS[words[0]], *words[1:]])


def last_values(words: list[str]) -> dict[str, str]:
    pairs = re.findall(r"(--\w+)((?: (?!--)\S+)*)", " ".join(words))
    values = {name: value.strip() for name, value in pairs}
    # The oldest rows are from before the one had a name, others from when the other was the default.
    if values.get("--recipe") in ("paper", "orthogonal"):
        del values["--recipe"]
    return values


def rows_of(line: Cells, first: Cells, title: str) -> Iterator[tuple[float, Cells]]:
    """Each perplexity under a title, such as "60M, 800 updates", and its row."""
    model, updates = re.fullmatch(r"(\d+)M, ([\d,]+) updates", title).groups()  # type: ignore[union-attr]
    setting, flags = flags_of(line["setting, flags"], first)
    for seed, text in enumerate(line[title].split(", ")):
        if text in ("", "-"):
            continue
        found = [
            row for row in ROWS
            if (row["setting"], row["model"], row["updates"], row["seed"])
            == (setting, f"{model}m", updates.replace(",", ""), str(seed))
            and last_values(row["flags"].split()) == flags
            and abs(float(row["perplexity"]) - float(text)) < 0.00501
        ]  # fmt: skip
        assert found, f"no row of {line['setting, flags']} over {title} with seed {seed} has {text}"
        yield float(text), found[-1]


def lines_of(tables: list[list[Cells]]) -> list[tuple[Cells, Cells, str]]:
    return [
        (line, table[0], title) for table in tables for line in table for title in line if title.endswith(" updates")
    ]


@pytest.mark.parametrize(
    ("line", "first", "title"),
    [pytest.param(*case, id=f"{case[0]['setting, flags']} {case[2]}") for case in lines_of(tables())],
)
def test_the_figures_of_a_line_are_those_of_its_rows(line: Cells, first: Cells, title: str) -> None:
    figures = list(rows_of(line, first, title))
    if not figures:
        assert any(line[other] for other in line if other.endswith(" updates")), "a line without a figure"
        return
    rows, row = [row for _, row in figures], figures[0][1]
    if line.get("mean"):
        assert float(line["mean"]) == pytest.approx(
            sum(float(row["perplexity"]) for row in rows) / len(rows), abs=0.00501
        )
    if "C4, mean" in line:
        assert float(line["C4, mean"]) == pytest.approx(
            sum(float(row["c4_perplexity"]) for row in rows) / len(rows), abs=0.0501
        )
        assert float(line["GB"]) == pytest.approx(float(row["weights_gb"]) + float(row["states_gb"]), abs=0.000501)
        assert line["tokens/s"] == f"{int(row['tokens_per_second_median']):,}"
    if line.get("averaged"):
        averages = [re.findall(r"averaged(?: and quantized)? ([\d.]+)", row["note"])[-1] for row in rows]
        assert [float(text) for text in line["averaged"].split(", ")] == pytest.approx(
            [float(text) for text in averages], abs=0.00501
        )
    if line.get("change"):
        before = next(rows_of(first, first, title))[1]
        change = 100 * (float(row["perplexity"]) / float(before["perplexity"]) - 1)
        assert line["change"] == f"{round(change, 1) + 0.0:+.1f} %".replace("+0.0", "0.0")


def test_every_table_of_the_study_is_looked_at() -> None:
    assert len(tables()) == len(re.findall(r"^\|.*\bsetting, flags\b", TEXT, re.MULTILINE)) >= 6
    assert sum(bool(line[title]) for line, _, title in lines_of(tables())) > 40


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def test_the_commands_of_the_page_parse(tmp_path: Path) -> None:
    given = {"DIR": token_folder(tmp_path / "tokens", 0), "RUN": str(tmp_path / "run")}
    given["configs/llama_60m.json"] = str(config_path("60m"))
    parser, plain = quality.build_parser(), []
    for command in commands():
        words = [given.get(word, word) for word in shlex.split(command)]
        if words[:2] == ["python", "run_pretrain.py"]:
            plain.append(parse_args(words[2:]))
            continue
        assert words[:3] == ["python", "-m", "benchmarks.quality"]
        for run in quality.runs_of(words[3:], parser):
            if "--tokens" in words:
                flags = quality.flags_of_run(run.setting, run.seed, parser.parse_args(run.argv))
                parse_args([*flags, "--save_dir", given["RUN"]])
    of_setting = quality.flags_of_run("full_rank", 0, parser.parse_args(["--tokens", given["DIR"]]))
    assert plain == [parse_args([*of_setting, "--save_dir", given["RUN"]])], "not the setting full_rank"


def test_the_picture_shows_settings_that_have_rows() -> None:
    (command,) = [shlex.split(line) for line in commands() if "--plot" in line]
    args = quality.build_parser().parse_args(command[3:])
    assert (ROOT / args.plot).is_file() and f"]({Path(args.plot).name})" in TEXT
    for name in args.settings.split(","):
        assert quality_plot.read_points(Path(args.results), args.model, args.updates, [name]), name


def test_bytes_of_rows_are_those_of_the_plan() -> None:
    """Of settings that still are what they were: rows from before the plan knew Muon's dtype had twice its states."""
    checked = set()
    for row in ROWS:
        if row["weights_gb"] and row["setting"] in ("adamw_tuned", "adam8bit_tuned", "muon", "full_rank_recipe"):
            argv = ["--model_config", str(config_path(row["model"])), "--batch_size", row["micro_batch"]]
            run = parse_args([*argv, "--device", "cuda", *row["flags"].split()])
            planned = quality.planned_bytes(run)
            assert planned["weights_gb"] + planned["states_gb"] == pytest.approx(
                float(row["weights_gb"]) + float(row["states_gb"]), rel=0.01
            ), (row["setting"], row["model"], row["commit"])
            checked.add(row["setting"])
    assert len(checked) == 4
