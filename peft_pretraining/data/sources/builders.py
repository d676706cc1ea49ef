"""Stream the rows of a file as arrow tables with builders of `datasets`, up to the point where it is damaged.

Parquet and arrow are read by builders of the library. Lines and csv have builders of this module. For lines the
library's ignores its encoding options in compressed files, accepts a truncated zstd file and drops a chunk for one bad
byte; the builder here returns lines as bytes, in an array that consists of the block that was read and the offsets of
its line ends, so that no string is made for a line that is skipped. For csv the library's drops the rest of a file for
one quote that is not closed.

Builders are used without `load_dataset`, which treats `*` and `[` in a path as a pattern.
"""

import errno
import functools
import io
import logging
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, Any

import numpy as np

from peft_pretraining.data.sources.compression import DamagedError, compression_of, decompressed, unpacked_copy
from peft_pretraining.data.sources.csv_records import Unclosed, find_delimiter, read_records
from peft_pretraining.data.sources.plain_links import link_in, plain_link
from peft_pretraining.errors import UserError

# This module imports neither os nor pathlib: the library replaces them where a builder is defined.

_CHUNK_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 18
"""The smallest size of a block of lines that becomes a table."""
_ROWS = 256
"""Rows of a table; parquet and csv are read in batches of this size."""
LONGEST_PARAGRAPH_BYTES = 1 << 20
"""A text without blank lines is divided at the first line end after this size, or each logical shard would keep all of
it in memory."""
_PARAGRAPHS = 8
"""Rows of a table of paragraphs."""
_HEAD_BYTES = 1 << 16
"""The size of the beginning of a csv file from which its delimiter is found."""
TEXT = "text"
"""The type of a column of text in the results of this module; other types are those of the file."""
AMBIGUOUS = "several columns of this name"
"""The type of columns that have the same name."""

_PREFIX = "qgalore-datasets-"
"""Of temporary folders."""

_COLUMNAR = ("parquet", "arrow")
"""Formats whose readers seek: a compressed file is decompressed into a temporary file first."""

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)

_lock = threading.Lock()
_scratch_folders: "list[tempfile.TemporaryDirectory[str]]" = []
"""Empty, or the one folder of this process."""


class FileRows:
    """The rows of a file as arrow tables of one column; after reading, `damage` says why it ended early."""

    def __init__(self, path: str, file_format: str, column: str, unit: str, first: int) -> None:
        """`column` for parquet, arrow and csv; `unit` for text: line, paragraph or file; `first`: first row needed."""
        self.damage = ""
        self.end = 0
        """Rows that were skipped or returned."""
        self.lost: dict[int, str] = {}
        """By row that was returned as null because it is damaged: the reason."""
        self._path, self._format, self._column, self._unit, self._first = path, file_format, column, unit, first

    def tables(self) -> Iterator[tuple[int, Any]]:
        """Yield (index of its first row, column (rows,)) for each table; rows long before `first` may be skipped."""
        try:
            builder = self._builder()
            data = builder.as_streaming_dataset("train").with_format("arrow")
        except Exception as error:
            self.damage = self.damage or _damage(error, self._path)
            return
        self.end, self.lost = builder.first_row, builder.lost
        for table in data.iter(batch_size=_PARAGRAPHS if self._unit == "paragraph" else _ROWS):
            column = table.column(self._column if self._format in _COLUMNAR else 0)
            begin, self.end = self.end, self.end + len(column)
            yield begin, column
        self.damage = self.damage or builder.damage

    def _unpacked_file(self, path: str) -> str:
        """The path of a decompressed copy of a file, up to its damage; the copy is deleted with its last user."""
        self._unpacked = unpacked_copy(path)
        name = self._unpacked.name(lambda: _content(path), _scratch())
        self.damage = in_words(self._unpacked.damage) if self._unpacked.damage else ""
        return name

    def _builder(self) -> Any:
        from datasets.data_files import DataFilesDict, DataFilesList

        path, settings = self._path, dict[str, Any]()
        if self._format in _COLUMNAR and compression_of(path):
            path = self._unpacked_file(path)
        elif self._format in _COLUMNAR and "::" in path and "://" not in path:
            self._link = plain_link(path, _scratch())  # fsspec takes :: for the end of an address
            path = link_in(self._link)
        if self._format == "parquet":
            import pyarrow.dataset as ds

            # Otherwise the reader keeps all it has read in memory up to the end of the file.
            scan = ds.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20)
            settings = {"columns": [self._column], "batch_size": _ROWS, "fragment_scan_options": scan}
        # The library patches modules while it makes a builder, and leaves a lock file in its cache.
        with _lock, tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as cache:
            builder = _classes()["text" if self._format == "json" else self._format](
                data_files=DataFilesDict({"train": DataFilesList([path], [()])}),
                config_id="stream",
                cache_dir=cache,
                **settings,
            )
        builder.unit, builder.column, builder.wanted_row = self._unit, self._column, self._first
        builder.lost = {}
        return builder


def open_binary(path: str) -> IO[bytes]:
    """Open a local file, or one at an hf:// address, without decompression."""
    if "://" not in path:
        return io.open(path, "rb")  # noqa: UP020 - the library replaces `open` in this module
    from datasets.utils.file_utils import xopen

    opened: IO[bytes] = xopen(path, "rb")
    return opened


def open_content(path: str) -> IO[bytes]:
    """Open a file with decompression by its name. Reading raises DamagedError where it is damaged."""
    if not (compression := compression_of(path)):
        return open_binary(path)
    return io.BufferedReader(_Pieces(decompressed(_chunks(path), compression)))


def in_words(error: BaseException | str) -> str:
    """Shorten an error, or its text, to one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def delimiter_of(path: str, head: bytes) -> str:
    """The delimiter of a csv file that begins with `head`."""
    usual = "\t" if re.search(r"\.tsv(\.\w+)?$", path.lower()) else ","
    return find_delimiter(head.decode("utf-8-sig", "replace"), usual)


def _damage(error: Exception, path: str) -> str:
    """The text of an error that means a damaged file; raises it again if it means something else.

    That is a network fault, a shortage or a package that is not installed.
    """
    if isinstance(error, UserError | MemoryError | ImportError):
        raise error
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        raise UserError(f"--dataset: {path} cannot be read now ({in_words(error)}).") from error
    # Arrow raises a bare OSError for a damaged page; network faults raise subclasses.
    if "://" in path and not isinstance(error, ValueError | DamagedError) and type(error) is not OSError:
        raise error
    return in_words(error)


def remove_scratch() -> None:
    """Delete temporary files, for a process that ends without Python's shutdown, which would delete them."""
    for folder in _scratch_folders:
        folder.cleanup()


def _scratch() -> str:
    """The temporary folder for copies and links, created on first use and deleted with the process."""
    with _lock:
        if not _scratch_folders:
            _scratch_folders.append(tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True))
        return _scratch_folders[0].name


class _Pieces(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if not (piece := next(self._pieces, b"")):
                return 0
            self._rest = memoryview(piece)
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _chunks(path: str) -> Iterator[bytes]:
    with open_binary(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _content(path: str) -> Iterator[bytes]:
    compression = compression_of(path)
    return decompressed(_chunks(path), compression) if compression else _chunks(path)


# ---- lines


def _whole_lines(path: str) -> Iterator[bytes]:
    """Yield blocks of whole lines (the last may lack its line end); at damage the lines before it, then raise."""
    pieces: list[bytes] = []
    size, is_first = 0, True
    content = _content(path)
    while True:
        fault = None
        try:
            piece = next(content, None)
        except Exception as error:
            piece, fault = None, error
        if piece is None:
            block = b"".join(pieces)
            # The damaged line is dropped.
            block = block[: block.rfind(b"\n") + 1] if fault else block
            if block := block.removeprefix(b"\xef\xbb\xbf") if is_first else block:
                yield block
            if fault:
                raise fault
            return
        pieces.append(piece)
        size += len(piece)
        if size < _BLOCK_BYTES or (end := piece.rfind(b"\n") + 1) == 0:
            continue
        pieces[-1] = piece[:end]
        block, pieces, size = b"".join(pieces), [piece[end:]], len(piece) - end
        yield block.removeprefix(b"\xef\xbb\xbf") if is_first else block
        is_first = False


_BETWEEN_PARAGRAPHS = re.compile(rb"(?:\A|\n)(?:[ \t]*\n)+")


def _paragraphs(blocks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Split blocks of whole lines at blank lines; a paragraph of `LONGEST_PARAGRAPH_BYTES` ends with its line."""
    unfinished: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = _BETWEEN_PARAGRAPHS.split(block.replace(b"\r\n", b"\n"))
        unfinished.append(first)
        size += len(first)
        if not others and size < LONGEST_PARAGRAPH_BYTES:
            continue
        *found, rest = [b"".join(unfinished), *(others or [b""])]
        unfinished, size = [rest], len(rest)
        yield [text for paragraph in found if (text := paragraph.strip(b"\n"))]
    yield [text] if (text := b"".join(unfinished).strip(b"\n")) else []


def _line_array(block: bytes) -> Any:
    """The lines of a block with their ends, an array (lines,) of binary that shares the block's memory."""
    import pyarrow as pa

    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A) + 1
    inside = [] if len(ends) and ends[-1] == len(block) else [len(block)]
    offsets = np.concatenate([[0], ends, inside]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _line_arrays(path: str, unit: str) -> Iterator[Any]:
    import pyarrow as pa

    blocks = _whole_lines(path)
    if unit == "line":
        yield from map(_line_array, blocks)
    elif unit == "paragraph":
        for paragraphs in _paragraphs(blocks):
            yield pa.array(paragraphs, pa.large_binary())
    else:
        yield pa.array([b"".join(blocks)], pa.large_binary())


# ---- csv


def _csv_texts(path: str, column: str, lost: dict[int, str]) -> Iterator[list[str | None]]:
    """Yield the values of a column, at most `_ROWS` at a time; at damaged bytes the values before them, then raise.

    A damaged row is None, and its reason is put into `lost` by its index. Raises ValueError for an unknown column.
    """
    head, content = _with_head(_content(path))
    lines = io.TextIOWrapper(io.BufferedReader(_Pieces(content)), "utf-8-sig", "replace", newline="")
    delimiter = delimiter_of(path, head)
    records = read_records(lines, delimiter)
    header = next(records, None)
    if header is None:
        return
    if isinstance(header, Unclosed):
        raise ValueError("a quote in its first line is not closed")
    _check_column(dict.fromkeys(header, TEXT), column)
    width = len(header)
    at, number = header.index(column), 0
    while True:
        texts: list[str | None] = []
        fault = None
        try:
            for record in islice(records, _ROWS):
                if isinstance(record, Unclosed):
                    lost[number] = str(record)
                    texts.append(None)
                elif any(map(str.strip, record[width:])):  # a delimiter inside an unquoted text has split it
                    sign = "tab" if delimiter == "\t" else delimiter
                    lost[number] = (
                        f"{len(record)} fields where the header has {width}: put text with a {sign} in quotes"
                    )
                    texts.append(None)
                else:
                    texts.append(record[at] if at < len(record) else "")
                number += 1
        except Exception as error:
            fault = error
        if texts:
            yield texts
        if fault:
            raise fault
        if not texts:
            return


def _with_head(pieces: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """(the first 64 KiB or so, all pieces from the start); an error is raised by the iterator at its position."""
    first: list[bytes] = []
    fault = None
    try:
        while sum(map(len, first)) < _HEAD_BYTES and (piece := next(pieces, b"")):
            first.append(piece)
    except Exception as error:
        fault = error

    def whole() -> Iterator[bytes]:
        yield from first
        if fault:
            raise fault
        yield from pieces

    return b"".join(first), whole()


# ---- the library's builders


def columns_of_table(path: str, file_format: str) -> dict[str, str]:
    """The type of each column of a parquet or arrow file, in order; TEXT for text. Raises OSError or ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_content(path) as file:
        source = io.BytesIO(file.read()) if compression_of(path) else file
        if file_format == "parquet":
            return _types(pq.read_schema(source))
        try:
            return _types(pa.ipc.open_stream(source).schema)
        except (OSError, pa.ArrowInvalid):
            source.seek(0)
            return _types(pa.ipc.open_file(source).schema)


def _types(schema: Any) -> dict[str, str]:
    import pyarrow as pa

    def text(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            return text(kind.value_type)
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    found: dict[str, str] = {}
    for field in schema:
        kind = TEXT if text(field.type) else str(field.type)
        found[field.name] = AMBIGUOUS if field.name in found else kind
    return found


def _check_column(columns: dict[str, str], column: str) -> None:
    if column not in columns:
        raise ValueError(f"it has no column {column}, but {', '.join(columns)}")
    if columns[column] == AMBIGUOUS:
        raise ValueError(f"it has several columns called {column}")
    if columns[column] not in (TEXT, "null"):
        raise ValueError(f"its column {column} holds {columns[column]}, not text")


def _groups_from(rows_of_groups: list[int], row: int) -> tuple[tuple[int, ...], int]:
    """(indices of the row groups from that of row `row` on, index of their first row)."""
    first, passed = 0, 0
    while first < len(rows_of_groups) and passed + rows_of_groups[first] <= row:
        passed += rows_of_groups[first]
        first += 1
    return tuple(range(first, len(rows_of_groups))), passed


class _EndsAtDamage:
    """A mixin that ends iteration at damage; an exception would make the library lose the rows it has collected."""

    damage = ""
    unit, column = "line", "text"
    wanted_row = 0
    first_row = 0
    lost: dict[int, str]

    def _generate_tables(self, **arguments: Any) -> Iterator[Any]:
        try:
            yield from super()._generate_tables(**arguments)  # type: ignore[misc]
        except Exception as error:
            self.damage = _damage(error, self.config.data_files["train"][0])  # type: ignore[attr-defined]


@functools.cache
def _classes() -> dict[str, Any]:
    """The builder class of each format; defined on first use, since the library takes seconds to import."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ArrowBasedBuilder, DatasetInfo, SplitGenerator
    from datasets.builder import Key
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet

    for builder in (Arrow, Parquet):
        logging.getLogger(builder.__module__).setLevel(logging.CRITICAL)  # `DamageCount` logs damage

    class OneFile:
        def _split_generators(self, dl_manager: Any) -> list[Any]:
            files = list(self.config.data_files["train"])  # type: ignore[attr-defined]
            return [SplitGenerator("train", gen_kwargs={"files": files})]

    class LineBlocks(OneFile, ArrowBasedBuilder):
        def _info(self) -> Any:
            return DatasetInfo()

        def _generate_tables(self, files: list[str]) -> Iterator[Any]:
            for number, lines in enumerate(_line_arrays(files[0], self.unit)):
                yield Key(0, number), pa.table({"line": lines})

    class ParquetFrom(OneFile, Parquet):
        def _split_generators(self, dl_manager: Any) -> list[Any]:
            (split,) = super()._split_generators(dl_manager)
            with open_binary(split.gen_kwargs["files"][0]) as file:
                read = pq.ParquetFile(file)
                _check_column(_types(read.schema_arrow), self.column)
                rows = [read.metadata.row_group(i).num_rows for i in range(read.metadata.num_row_groups)]
            groups, self.first_row = _groups_from(rows, self.wanted_row)
            split.gen_kwargs["row_groups_list"] = [groups]
            return [split]

    class ArrowOfText(OneFile, Arrow):
        def _split_generators(self, dl_manager: Any) -> list[Any]:
            (split,) = super()._split_generators(dl_manager)
            _check_column(columns_of_table(split.gen_kwargs["files"][0], "arrow"), self.column)
            return [split]

        def _cast_table(self, pa_table: Any) -> Any:
            return pa_table.select([self.column])

    class CsvColumn(OneFile, ArrowBasedBuilder):
        def _info(self) -> Any:
            return DatasetInfo()

        def _generate_tables(self, files: list[str]) -> Iterator[Any]:
            for number, texts in enumerate(_csv_texts(files[0], self.column, self.lost)):
                yield Key(0, number), pa.table({"text": pa.array(texts, pa.large_string())})

    bases = {"text": LineBlocks, "parquet": ParquetFrom, "arrow": ArrowOfText, "csv": CsvColumn}
    return {name: type(base.__name__, (_EndsAtDamage, base), {}) for name, base in bases.items()}
