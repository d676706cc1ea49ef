"""Rows of measurements in CSV files, with the commit that was measured."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit that is measured, from git or, for a copy without a repository, from the variable COMMIT."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def rows_by(path: Path, columns: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a CSV file by their values in `columns`, none of a file that is not there; of two the later one."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[name] for name in columns): row for row in csv.DictReader(file)}


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file, with a header where it is new; raises SystemExit if the file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, columns = not path.exists(), list(row)
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        differing = sorted(set(columns) ^ set(row))
        if differing:
            raise SystemExit(f"{path} has not the columns of this row ({', '.join(differing)}): name a new file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
