"""The measured tables of `docs/results/papers_tables.md`, each between two marks and made of rows alone.

    <!-- measured: --table pretrain --models 60m --budget updates:800 -->
    ...
    <!-- end -->

The first mark has flags of `benchmarks/tables.py`. Methods and models without a row are left out; nothing is run.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.rows import ROOT
from benchmarks.table_jobs import Key, Row, Study
from peft_pretraining.errors import UserError

PAGE = ROOT / "docs/results/papers_tables.md"
MARKED = re.compile(r"(<!-- measured: (.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
NOTHING = "Not measured yet."


def fill(text: str, table_of: Callable[[list[str]], str]) -> str:
    """Replace what stands between the marks of a page by the tables that `table_of` makes of the flags."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table_of(shlex.split(match[2]))}\n\n"

    return MARKED.sub(filled, text)


def write(page: Path, table_of: Callable[[list[str]], str]) -> None:
    """`fill` a page; raises UserError where there is none, or none with marks."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--guide {page} cannot be read ({error.strerror}): --guide alone takes {PAGE}") from error
    if not MARKED.search(text):
        raise UserError(
            f"--guide {page} has no table between <!-- measured: FLAGS --> and <!-- end -->: --guide alone takes {PAGE}"
        )
    page.write_text(fill(text, table_of), encoding="utf-8")


def measured(study: Study, rows: Mapping[Key, Row]) -> Study | None:
    """The study without models and methods that have no row; None if nothing is left."""
    found = {cell for cell, jobs in study.chosen(rows).items() if any(job.key in rows for job in jobs)}
    if not found:
        return None
    return dataclasses.replace(
        study,
        models=[model for model in study.models if any(model == cell[0] for cell in found)],
        methods=[method for method in study.methods if any(method == cell[1] for cell in found)],
    )
