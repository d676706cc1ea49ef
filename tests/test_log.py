"""The log: a file a month that begins with its table of experiments, and nothing that points to where it was before."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "docs" / "log"
MONTHS = sorted(path.name for path in LOG.glob("*.md") if path.name != "README.md")


def test_the_readme_lists_the_months() -> None:
    text = (LOG / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[[\d-]+\]\((.*?)\) \|", text, re.MULTILINE) == MONTHS and MONTHS


@pytest.mark.parametrize("name", MONTHS)
def test_a_month_begins_with_a_row_an_experiment(name: str) -> None:
    head, *entries = re.split(r"^## ", (LOG / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(entry.startswith(f"{name.removesuffix('.md')}-") for entry in entries), "an entry of another month"
    assert [entry[:10] for entry in entries] == sorted(entry[:10] for entry in entries)
    titles, line, *rows = [row for row in head.splitlines() if row.startswith("|")]
    assert titles == "| idea | predicted | measured | kept |" and set(line) <= set("|- ")
    assert len(rows) >= len(entries), "fewer experiments than entries"
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4 and cells[0] and (cells[1] or cells[2]) and cells[3], row


def test_nothing_points_to_the_file_that_was() -> None:
    old = "docs/" + "log.md"
    found = subprocess.run(["git", "grep", "-l", old], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    assert found.stdout == ""
