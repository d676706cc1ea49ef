"""docs/guide/reproduce.md and docs/results/papers_tables.md: commands list their runs, figures are those of rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import table_guide, table_methods, tables
from benchmarks.models import LENGTH
from benchmarks.rows import ROOT
from benchmarks.table_methods import ABLATION, FACTORS, METHODS, RECIPES, SEQUENCES
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS
from tests.small_run import restored_process
from tests.test_tables import row_of

PAGE = ROOT / "docs" / "guide" / "reproduce.md"
TEXT, RESULTS = PAGE.read_text(encoding="utf-8"), table_guide.PAGE.read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_each_command_of_the_page_lists_its_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"DIR": str(tmp_path)}.get(word, word) for word in shlex.split(command)]
    assert words[:3] == ["python", "-m", "benchmarks.tables"]
    with restored_process():
        assert tables.main([*words[3:], "--dry_run", "--results", str(tmp_path / "none.csv")]) == 0
    assert re.search(r"^[1-9]\d* runs are missing", capsys.readouterr().out, re.MULTILINE)


def test_every_flag_and_every_table_has_a_place_on_the_page() -> None:
    marks = [words for _, words in table_guide.MARKED.findall(RESULTS)]
    assert {name for words in marks for name in re.findall(r"--table (\w+)", words)} == set(tables.TABLES)
    tabled = {word for command in commands() for word in re.findall(r"--table (\w+)", command)}
    assert tabled == set(tables.TABLES)
    assert [name for name in METHODS if name not in TEXT] == []
    known = {flag for action in tables.build_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"`(--\w+)", TEXT)) <= {*known, "--recipe"}, "that is one of run_pretrain.py"


def test_hours_are_those_of_measured_speeds() -> None:
    found = re.findall(r"^\| (\d+[MB]) \| ([\d.]+)B \| ([\d,]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert [model.lower() for model, *_ in found] == list(RECIPES)
    for model, tokens, speed, hours in found:
        recipe, rate = RECIPES[model.lower()], int(speed.replace(",", ""))
        exact = recipe.updates * SEQUENCES * LENGTH
        assert float(tokens) == round(exact / 1e9, 2)
        assert float(hours) == pytest.approx(exact / rate / 3600, rel=0.02)
        assert any(
            (each.card, each.model, each.rank, each.tokens_per_second) == ("h100", model.lower(), recipe.rank, rate)
            for each in MEASURED_SPEEDS
        ), model


def test_the_numbers_of_runs() -> None:
    assert f"has {len(METHODS)} runs for each model and seed" in TEXT
    assert (
        f"at most {(len(FACTORS) - 1) * len(METHODS)} more in all; that of ablations has {len(ABLATION) + 1}." in TEXT
    )


def test_measured_tables_are_those_of_the_rows() -> None:
    assert len(table_guide.MARKED.findall(RESULTS)) == 7
    assert table_guide.fill(RESULTS, tables.measured_table) == RESULTS, "python -m benchmarks.tables --guide"


def test_a_page_without_marks_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for page, said in ((PAGE, "has no table between"), (tmp_path / "none.md", "cannot be read (No such file")):
        with restored_process():
            assert tables.main(["--guide", str(page)]) == 2
        assert f"tables: --guide {page} {said}" in capsys.readouterr().err
    assert PAGE.read_text(encoding="utf-8") == TEXT
    assert tables.build_parser().parse_args(["--guide"]).guide == str(table_guide.PAGE)


def test_a_measured_table_has_only_what_has_rows(tmp_path: Path) -> None:
    flags = ["--table", "pretrain", "--models", "60m,130m", "--budget", "updates:800", "--dataset", "tokens"]
    results, page = tmp_path / "tables.csv", tmp_path / "page.md"
    page.write_text(f"a\n\n<!-- measured: {' '.join(flags)} --results {results} -->\nold\n<!-- end -->\nb\n")
    with restored_process():
        assert tables.main(["--guide", str(page)]) == 0
        assert "-->\n\nNot measured yet.\n\n<!-- end -->\nb\n" in page.read_text()
        study = tables.study_of(tables.build_parser().parse_args(flags))
        job = study.job("60m", "muon", 0)
        tables.append_row(results, row_of(job))
        assert tables.main(["--guide", str(page)]) == 0
    text = page.read_text()
    assert "| method | 60M, ours | 60M, paper |\n| --- | --- | --- |\n| Muon | 40.00 / 0.18 |  |\n\n" in text
    assert "130M" not in text and "old" not in text and text.startswith("a\n") and text.endswith("<!-- end -->\nb\n")


def test_a_rate_of_the_page_is_that_of_the_recipes() -> None:
    assert "0.001 up to 130M and 0.0005 beyond" in RESULTS
    rates = {model: recipe.full_rank_lr for model, recipe in table_methods.RECIPES.items()}
    assert rates == {"60m": 0.001, "130m": 0.001, "350m": 0.0005, "1b": 0.0005, "7b": 0.0005}
