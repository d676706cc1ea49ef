"""`--dataset` with a folder that `save_to_disk` of `datasets` wrote: memory-mapped rows.

A `DatasetDict` has splits; of a single `Dataset` documents are held out. The shards are its arrow files.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.data.sources.builders import TEXT, in_words
from peft_pretraining.data.sources.data_files import plain_text, stamp_of, text_column_of, values_of
from peft_pretraining.data.sources.documents import Damage
from peft_pretraining.data.sources.kind import SourceOptions, TextKind
from peft_pretraining.data.sources.log_once import log_once
from peft_pretraining.data.sources.split_names import WORDS
from peft_pretraining.data.waiting import with_progress
from peft_pretraining.errors import UserError

_SPLITS = "dataset_dict.json"
_STATE, _INFO = "state.json", "dataset_info.json"
_ROWS = 256
"""Rows that are converted to strings at a time."""


class SavedDataset(TextKind):
    """A `Dataset` or `DatasetDict` on disk."""

    in_words = "a folder written by save_to_disk of datasets"

    def recognises(self, dataset: str) -> bool:
        """Whether it is a folder with the library's list of splits, or of files."""
        folder = Path(dataset).expanduser()
        single = (folder / _STATE).is_file() and (folder / _INFO).is_file()
        return single or (folder / _SPLITS).is_file()

    def open(self, dataset: str, split: str, options: SourceOptions) -> "SavedRows | None":
        """See `DatasetKind.open`."""
        folder = Path(dataset).expanduser()
        chosen = {each: _split_folder(dataset, folder, each, options) for each in ("train", "validation")}
        if (path := chosen[split]) is None:
            return None
        if chosen["train"] == chosen["validation"]:
            raise UserError(f"--train_split and --validation_split of --dataset {dataset} are the same: {path.name}.")
        _log_unread_test_split(dataset, folder, options)
        return _open_rows(dataset, path, options)


KIND = SavedDataset()


@dataclass(frozen=True)
class SavedRows:
    """A source (see `Source`) of the rows of one column; each arrow file is a shard."""

    name: str
    path: str
    files: tuple[tuple[str, int, int], ...]
    """(name, index of its first row, number of rows) of each."""
    column: str
    written: str
    """The library's own fingerprint of the data set."""
    rows: Any
    """The `datasets.Dataset` of this column alone, in arrow format."""

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def fingerprint(self) -> str:
        """A hash of names and row counts of the files, of the column, and of the library's own fingerprint."""
        return hashlib.sha256(repr((self.files, self.column, self.written)).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """See `documents.DescribedSource`."""
        rows = sum(count for *_, count in self.files)
        return f"{self.name}: {rows:,} rows as save_to_disk wrote them, column {self.column}"

    def stamp(self) -> str:
        """See `documents.LocalSource.stamp`."""
        return repr([stamp_of(str(Path(self.path, name))) for name, _, _ in self.files])

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        _, begin, count = self.files[shard]
        rows = range(part + start * slices, count, slices)
        for i in range(0, len(rows), _ROWS):
            some = rows[i : i + _ROWS]
            column = self.rows[range(begin + some.start, begin + some.stop, slices)].column(0)
            yield from map(plain_text, values_of(column, 0, 1))


def _split_folder(dataset: str, folder: Path, split: str, options: SourceOptions) -> Path | None:
    """The folder of a split; None for a missing validation split."""
    wanted = options.train_split if split == "train" else options.validation_split
    if not (folder / _SPLITS).is_file():
        if wanted:
            raise UserError(f"--{split}_split {wanted}: --dataset {dataset} is a single data set without splits.")
        return folder if split == "train" else None
    there = _read_list(dataset, folder / _SPLITS, "splits")
    names = (wanted,) if wanted else WORDS[split]
    if name := next((name for name in names if name in there), None):
        return folder / name
    if wanted or split == "train":
        flag = f"--{split}_split {wanted}: " if wanted else f"--{split}_split: "
        raise UserError(f"{flag}--dataset {dataset} has no such split. It has {', '.join(there) or 'none'}.")
    return None


def _log_unread_test_split(dataset: str, folder: Path, options: SourceOptions) -> None:
    if options.train_split or options.validation_split or not (folder / _SPLITS).is_file():
        return
    there = _read_list(dataset, folder / _SPLITS, "splits")
    if name := next((name for name in WORDS["test"] if name in there), ""):
        log_once(f"--dataset {dataset}: its split {name} is left unread; --validation_split {name} evaluates on it")


def _read_list(dataset: str, path: Path, key: str) -> list[Any]:
    """Read a list from one of the library's JSON files. Raises UserError."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--dataset {dataset}: {path} is not as save_to_disk writes it ({in_words(error)}); write the data set "
            "once more."
        ) from error


def _open_rows(dataset: str, folder: Path, options: SourceOptions) -> SavedRows:
    from datasets import Dataset

    names = [str(file["filename"]) for file in _read_list(dataset, folder / _STATE, "_data_files")]
    if not names:
        raise UserError(f"--dataset {dataset}: {folder} has no rows.")
    try:
        with _without_bars():  # the one below is of the same files
            rows = Dataset.load_from_disk(str(folder))
        files_of_rows = with_progress(names, f"{dataset}: opening", "files")
        counts = [len(Dataset.from_file(str(folder / name))) for name in files_of_rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--dataset {dataset}: {folder} cannot be read as a saved data set ({in_words(error)}); write it once more "
            "with save_to_disk."
        ) from error
    columns = {name: _kind(feature) for name, feature in rows.features.items()}
    column = text_column_of(f"--dataset {dataset}: {folder}", "column", columns, options.text_column)
    if sum(counts) != len(rows):
        names, counts = ["rows"], [len(rows)]  # saved with indices that select rows
    if not len(rows):
        raise UserError(f"--dataset {dataset}: {folder} has no rows.")
    begins = [sum(counts[:i]) for i in range(len(counts))]
    files = tuple(zip(names, begins, counts, strict=True))
    written = str(rows._fingerprint)
    return SavedRows(dataset, str(folder), files, column, written, rows.select_columns([column]).with_format("arrow"))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the library's progress bars, unless they are hidden already."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _kind(feature: Any) -> str:
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    return TEXT if kind in ("string", "large_string") else kind
