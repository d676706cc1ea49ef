"""Read files of documents in the usual formats; each file is a shard.

A document is a line of JSON lines, a row of parquet, arrow or csv, and of a text file a line, a paragraph or all of it;
its index is that of the line or row. `datasets` streams each file on its own, as arrow tables, and does not decide the
order. Strings are made only for the documents that are returned, and each JSON line is parsed alone, so that no type is
guessed from other lines and damage costs one line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.data.sources.builders import AMBIGUOUS, TEXT, FileRows, in_words
from peft_pretraining.data.sources.compression import SUFFIXES as COMPRESSIONS
from peft_pretraining.data.sources.documents import Damage, Files
from peft_pretraining.data.sources.file_heads import NUMBER, columns_of, what_is
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.log_once import log_once
from peft_pretraining.errors import UserError

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
}
IN_WORDS = ".json, .jsonl, .parquet, .arrow, .txt or .csv, each also with .gz, .zst, .xz or .bz2"


@dataclass(frozen=True)
class DataFile:
    """A file of documents."""

    path: str
    """A local path or an address hf://datasets/OWNER/NAME@COMMIT/PATH."""
    format: str
    """json (lines of it), text, csv, parquet or arrow."""
    size: int
    """Bytes of the file, which may be compressed."""


def bytes_in_words(count: float) -> str:
    """Format a number of bytes, such as 3.2 MB, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_of(name: str) -> str:
    """The format by a file's name, such as json for a.jsonl.gz; "" if it is no file of documents."""
    name = name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), "")


@dataclass(frozen=True)
class FileShards:
    """A source (see `Source`) of which each shard is a file."""

    name: str
    files: tuple[DataFile, ...]
    identity: str
    """A text that changes when the files do: their sizes, or the revision of a repository."""
    column: str = "text"
    """The column or field that holds the text."""
    unit: str = "line"
    """The unit of a text file that is a document: line, paragraph or file."""

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def fingerprint(self) -> str:
        """A hash of `identity` and, where they are not the defaults, of column and unit."""
        chosen = self.identity
        if self.column != "text":
            chosen += repr(("column", self.column))
        if self.unit != "line" and any(file.format == "text" for file in self.files):
            chosen += repr(("unit", self.unit))
        return hashlib.sha256(chosen.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def describe(self) -> str:
        """See `documents.DescribedSource`."""
        endings = sorted({"".join(Path(file.path).suffixes[-2:]) or file.format for file in self.files})
        sizes = [file.size for file in self.files]
        size = "" if min(sizes) < 0 else f", {bytes_in_words(sum(sizes))}"
        what = f"a document a {self.unit}" if self.files[0].format == "text" else f"field {self.column}"
        if self.files[0].format == "text" and self.unit == "file":
            what = "each a document"
        return f"{self.name}: {len(self.files)} file{'s' * (len(self.files) > 1)} ({', '.join(endings)}{size}), {what}"

    def file_list(self) -> Files | None:
        """See `documents.FileSource.file_list`; a folder may be moved."""
        paths = [Path(file.path) for file in self.files]
        if any(file.size < 0 for file in self.files):  # the hub was not asked for sizes
            return None
        common = os.path.commonpath([path.parent for path in paths])
        names = tuple(os.path.relpath(path, common) for path in paths)
        local = tuple(file.path for file in self.files if "://" not in file.path)
        return Files(names, tuple(file.size for file in self.files), f"{self.column}, {self.unit}", local)

    def stamp(self) -> str:
        """See `documents.LocalSource.stamp`; files on the hub are identified by their commit."""
        return repr([stamp_of(file.path) for file in self.files if "://" not in file.path])

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        yield from read_file(self.files[shard], self.column, self.unit, part + start * slices, slices)


def stamp_of(path: str) -> tuple[str, int]:
    """(real path, modification time in ns) of a local file; 0 if it cannot be read."""
    try:
        return os.path.realpath(path), Path(path).stat().st_mtime_ns
    except OSError:
        return path, 0


def read_file(
    file: DataFile, column: str = "text", unit: str = "line", first: int = 0, step: int = 1
) -> Iterator[str | Damage]:
    """Yield the documents first, first + step, ... of a file: a text, "" for none, or Damage.

    If damage ends the file early, the document after the last good one is a Damage with the reason. Raises UserError if
    a network fails.
    """
    if not file.size:
        return  # in some formats even a file without rows has bytes
    word = "line" if file.format in _LINE_FORMATS else "row"
    text_of = _json_text(column) if file.format == "json" else plain_text
    rows = FileRows(file.path, file.format, column, unit if file.format == "text" else "line", first)
    for row, values in rows.tables():
        begin = first if row <= first else row + (first - row) % step
        if begin >= rows.end:
            continue
        for number, value in zip(range(begin, rows.end, step), values_of(values, begin - row, step), strict=True):
            text = _NoText(rows.lost[number]) if number in rows.lost else text_of(value)
            yield text if isinstance(text, str) else Damage(f"{file.path} {word} {number + 1}", text.reason)
    # Damage before `first` belongs to another reader.
    if rows.damage and rows.end >= first and (rows.end - first) % step == 0:
        reason = f"{_reason(file, rows.damage)}; the rest of the file is lost"
        yield Damage(f"{file.path} after {word} {rows.end}", reason)


def values_of(column: Any, begin: int, step: int) -> list[Any]:
    """Every `step`-th value of an arrow column: str, bytes or None."""
    import pyarrow as pa

    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())  # string views do not support `take`
    chosen = column.slice(begin) if step == 1 else column.take(pa.array(range(begin, len(column), step)))
    try:
        return list(chosen.to_pylist())
    except UnicodeDecodeError:  # not UTF-8
        return list(chosen.cast(pa.large_binary()).to_pylist())


_LINE_FORMATS = ("json", "text")


@dataclass(frozen=True)
class _NoText:
    reason: str


def plain_text(value: str | bytes | None) -> str:
    """The text of a line or value; "" for None and for white space alone."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace").rstrip("\r\n")
    return "" if value is None or value.isspace() else value


def _json_text(column: str) -> Callable[[bytes], str | _NoText]:
    """A function that returns the text of the field `column` of a JSON line."""

    def text_of(line: bytes) -> str | _NoText:
        try:
            item = json.loads(line.decode())
        except UnicodeDecodeError:
            return text_of(line.decode("utf-8", "replace").encode())
        except (ValueError, RecursionError) as error:
            return _NoText(f"not a JSON object ({in_words(error)})") if line.strip() else ""
        if not isinstance(item, dict):
            return _NoText("not a JSON object")
        if column not in item:
            return _NoText(f"it has no field {column}")
        text = item[column]
        if text is None:
            return ""
        if not isinstance(text, str):
            return _NoText(f"its field {column} is not a string")
        if text.isascii():
            return "" if text.isspace() else text
        # JSON can contain half of a surrogate pair, which no tokenizer accepts.
        return "" if text.isspace() else text.encode("utf-8", "replace").decode()

    return text_of


def _reason(file: DataFile, damage: str) -> str:
    """The damage, or what the file is if it is of another format altogether."""
    try:
        found = what_is(file.path, file.format)
    except Exception:  # also a network fault: then only the damage is known
        found = ""
    return f"it is {found}" if found else damage


# ---- before reading


@dataclass(frozen=True)
class CheckedFile:
    """A file, and what its first bytes show to be wrong with it."""

    file: DataFile
    found: str = ""
    """What the file is if it is not of the format of its name, such as "a zip archive"; else ""."""
    unreadable: str = ""
    """The system's reason why it cannot be opened; "" if it can."""

    def error(self, dataset: str) -> UserError:
        """The error for a file that is not of the format of its name."""
        expected = {"json": "a JSON object a line", "text": "plain text"}.get(self.file.format, self.file.format)
        return UserError(
            f"--dataset {dataset}: {self.file.path} is {self.found}; by its name it should hold {expected}."
        )


def check_contents(files: Iterable[DataFile]) -> Iterator[CheckedFile]:
    """Compare the first bytes of each file with the format of its name; reads a file when its result is asked for."""
    for file in files:
        try:
            yield CheckedFile(file, found=what_is(file.path, file.format) if file.size else "")
        except OSError as error:
            yield CheckedFile(file, unreadable=in_words(error))


def text_column_of(where: str, word: str, columns: dict[str, str], wanted: str) -> str:
    """The column that holds the text: `wanted` if given, else text, else the only one of text.

    `columns`: the type of each, TEXT for text; `where`: the beginning of error texts; `word`: "column" or "field".
    """
    texts = [name for name, kind in columns.items() if kind == TEXT]
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    name = wanted or ("text" if "text" in columns else "")
    if name and name not in columns:
        raise UserError(f"{where} has no {word} {name} (--text_column). It has: {listed}.")
    if name and columns[name] == AMBIGUOUS:
        raise UserError(
            f"{where} has several {word}s called {name}: rename all but one, or choose another with --text_column."
        )
    if name and columns[name] not in (TEXT, "null", NUMBER):  # numbers of csv may be followed by text
        other = f"; text is in {', '.join(texts)} (--text_column)" if texts else ""
        raise UserError(f"{where}: its {word} {name} holds {columns[name]}, not text{other}.")
    if name or len(texts) == 1:
        return name or texts[0]
    if texts:
        called = ", ".join(texts)
        raise UserError(
            f"{where} has several {word}s of text, none of them called text: {called}. Choose one with --text_column."
        )
    raise UserError(f"{where} has no {word} of text. It has: {listed}.")


def _log_unused_options(dataset: str, are_text: set[bool], options: SourceOptions) -> None:
    if options.text_column and are_text == {True}:
        log_once(f"--text_column {options.text_column} has no effect: --dataset {dataset} is text without columns")
    if options.text_unit != "line" and are_text == {False}:
        log_once(
            f"--text_unit {options.text_unit} has no effect: --dataset {dataset} is no plain text, and has a document "
            "in each line or row"
        )


def open_files(
    dataset: str,
    files: tuple[DataFile, ...],
    identity: str,
    options: SourceOptions,
    checked: Iterable[CheckedFile] | None = None,
) -> FileShards:
    """Open the chosen files as a source, with the text column of the first one that can be read.

    `checked`: the `check_contents` of the files, if they were checked before; else they are, up to that first one.
    Other files that cannot be read are damage. Raises UserError if no file can be read, or if those that can are of
    other formats than their names.
    """
    reason, wrong = "it is empty", list[CheckedFile]()
    for each in check_contents(files) if checked is None else checked:
        file = each.file
        if each.found:
            wrong.append(each)
        elif each.unreadable:
            reason = f"{file.path} cannot be read ({each.unreadable})"
        elif file.size:
            try:
                columns = {"text": TEXT} if file.format == "text" else columns_of(file.path, file.format)
            except (OSError, ValueError) as error:
                reason = f"{file.path} cannot be read ({in_words(error)})"
                continue
            if not columns:
                reason = f"{file.path} holds nothing, as far as its beginning tells"
                continue
            wanted = "" if file.format == "text" else options.text_column
            word = "field" if file.format == "json" else "column"
            column = text_column_of(f"--dataset {dataset}: {file.path}", word, columns, wanted)
            _log_unused_options(dataset, {each.format == "text" for each in files}, options)
            return FileShards(dataset, files, identity, column, options.text_unit)
    if wrong:
        raise wrong[0].error(dataset)
    raise UserError(f"--dataset {dataset}: it has no file that can be read: {reason}.")
