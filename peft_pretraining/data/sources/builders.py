"""Builders of `datasets`: one streamed `IterableDataset` of arrow tables a file, that ends where the file is damaged.

Parquet and arrow are read by the library's own builders. Lines have a builder of our own, because the library's loses
what it was told about encodings where a file is compressed, takes a cut-off zstd file for a whole one and gives up a
chunk for one bad byte: it hands out lines as bytes, whose array is the block that was read and the places of its line
ends, so that a line that is skipped is never made. So has csv, because the library's gives up the rest of a file for
one quote that is not closed.

Builders are used without `load_dataset`, which would take `*` and `[` in a path for a pattern.
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
"""Lines become a table in blocks of at least so much."""
_ROWS = 256
"""Rows of a table that is handed out; of parquet and csv they are read so many at a time."""
LONGEST_PARAGRAPH_BYTES = 1 << 20
"""A text without blank lines is divided at the first line end after so much, or each logical shard would keep all of
it in memory."""
_PARAGRAPHS = 8
"""In the place of `_ROWS` for them."""
_HEAD_BYTES = 1 << 16
"""From so much of a csv file it is seen what stands between its fields."""
TEXT = "text"
"""What a column of text is called; others have the type that their file gives them."""
SEVERAL = "several columns of this name"
"""In the place of the type of columns that a name does not tell apart."""

_PREFIX = "qgalore-datasets-"
"""Of temporary folders."""

_COLUMNAR = ("parquet", "arrow")
"""Their readers jump in a file: a compressed one is decompressed into a temporary file first."""

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)

_lock = threading.Lock()
_scratch_folders: "list[tempfile.TemporaryDirectory[str]]" = []
"""None, or the one there is."""


class FileRows:
    """The rows of one file, as arrow tables of one column; afterwards, why it ended before its end."""

    def __init__(self, place: str, file_format: str, column: str, unit: str, first: int) -> None:
        """`column` for parquet, arrow and csv; `unit` for text: line, paragraph or file; `first`: the row to reach."""
        self.damage = ""
        self.end = 0
        """Rows that were passed over or handed out."""
        self.lost: dict[int, str] = {}
        """Why a row that was handed out as null is damaged."""
        self._place, self._format, self._column, self._unit, self._first = place, file_format, column, unit, first

    def tables(self) -> Iterator[tuple[int, Any]]:
        """(number of its first row, column (rows,)); rows long before `first` may be passed over."""
        try:
            builder = self._builder()
            data = builder.as_streaming_dataset("train").with_format("arrow")
        except Exception as error:
            self.damage = self.damage or _damage(error, self._place)
            return
        self.end, self.lost = builder.first_row, builder.lost
        for table in data.iter(batch_size=_PARAGRAPHS if self._unit == "paragraph" else _ROWS):
            column = table.column(self._column if self._format in _COLUMNAR else 0)
            begin, self.end = self.end, self.end + len(column)
            yield begin, column
        self.damage = self.damage or builder.damage

    def _unpacked_file(self, place: str) -> str:
        """Name of a file with the content of a compressed one, up to its damage; it is there as long as its users."""
        self._unpacked = unpacked_copy(place)
        name = self._unpacked.name(lambda: _content(place), _scratch())
        self.damage = in_words(self._unpacked.damage) if self._unpacked.damage else ""
        return name

    def _builder(self) -> Any:
        from datasets.data_files import DataFilesDict, DataFilesList

        place, settings = self._place, dict[str, Any]()
        if self._format in _COLUMNAR and compression_of(place):
            place = self._unpacked_file(place)
        elif self._format in _COLUMNAR and "::" in place and "://" not in place:
            self._link = plain_link(place, _scratch())  # fsspec takes :: for the end of an address
            place = link_in(self._link)
        if self._format == "parquet":
            import pyarrow.dataset as ds

            # Else it keeps what it has read up to the end of the file.
            scan = ds.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20)
            settings = {"columns": [self._column], "batch_size": _ROWS, "fragment_scan_options": scan}
        # The library changes modules while a builder is made, and leaves a lock in its cache.
        with _lock, tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as cache:
            builder = _classes()["text" if self._format == "json" else self._format](
                data_files=DataFilesDict({"train": DataFilesList([place], [()])}),
                config_id="stream",
                cache_dir=cache,
                **settings,
            )
        builder.unit, builder.column, builder.wanted_row = self._unit, self._column, self._first
        builder.lost = {}
        return builder


def open_binary(place: str) -> IO[bytes]:
    """A local file or one at an hf:// address, as it lies there."""
    if "://" not in place:
        return io.open(place, "rb")  # noqa: UP020 - the library replaces `open` in this module
    from datasets.utils.file_utils import xopen

    opened: IO[bytes] = xopen(place, "rb")
    return opened


def open_content(place: str) -> IO[bytes]:
    """The same decompressed. Reading raises DamagedError where it is damaged."""
    if not (compression := compression_of(place)):
        return open_binary(place)
    return io.BufferedReader(_Pieces(decompressed(_chunks(place), compression)))


def in_words(error: BaseException | str) -> str:
    """An error of a library, or its text, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def delimiter_of(place: str, head: bytes) -> str:
    """What stands between the fields of a csv file that begins with `head`."""
    usual = "\t" if re.search(r"\.tsv(\.\w+)?$", place.lower()) else ","
    return find_delimiter(head.decode("utf-8-sig", "replace"), usual)


def _damage(error: Exception, place: str) -> str:
    """How an error says that the file is damaged. Raised again if it means something else: a network, a shortage."""
    if isinstance(error, UserError | MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        raise UserError(f"--dataset: {place} cannot be read now ({in_words(error)}).") from error
    # Arrow raises a bare OSError for a damaged page; what a network raises is of a class of its own.
    if "://" in place and not isinstance(error, ValueError | DamagedError) and type(error) is not OSError:
        raise error
    return in_words(error)


def remove_scratch() -> None:
    """Remove what lies in temporary files, for a process that ends without an ordinary end, which does so itself."""
    for folder in _scratch_folders:
        folder.cleanup()


def _scratch() -> str:
    """A folder for copies and links, made for the first of them and removed with the process."""
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


def _chunks(place: str) -> Iterator[bytes]:
    with open_binary(place) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _content(place: str) -> Iterator[bytes]:
    compression = compression_of(place)
    return decompressed(_chunks(place), compression) if compression else _chunks(place)


# ---- lines


def _whole_lines(place: str) -> Iterator[bytes]:
    """Blocks that end with a line, but for the last of the file; at damage the lines before it, then the error."""
    pieces: list[bytes] = []
    size, begun = 0, False
    content = _content(place)
    while True:
        fault = None
        try:
            piece = next(content, None)
        except Exception as error:
            piece, fault = None, error
        if piece is None:
            block = b"".join(pieces)
            # The line that damage lies in is lost.
            block = block[: block.rfind(b"\n") + 1] if fault else block
            if block := block if begun else block.removeprefix(b"\xef\xbb\xbf"):
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
        yield block if begun else block.removeprefix(b"\xef\xbb\xbf")
        begun = True


_BETWEEN_PARAGRAPHS = re.compile(rb"(?:\A|\n)(?:[ \t]*\n)+")


def _paragraphs(blocks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """What stands between blank lines, without them; at `LONGEST_PARAGRAPH_BYTES` a paragraph ends with its line.

    Every block but the last ends with a line, so that a blank line is in one block.
    """
    begun: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = _BETWEEN_PARAGRAPHS.split(block.replace(b"\r\n", b"\n"))
        begun.append(first)
        size += len(first)
        if not others and size < LONGEST_PARAGRAPH_BYTES:
            continue
        *found, rest = [b"".join(begun), *(others or [b""])]
        begun, size = [rest], len(rest)
        yield [text for paragraph in found if (text := paragraph.strip(b"\n"))]
    yield [text] if (text := b"".join(begun).strip(b"\n")) else []


def _line_array(block: bytes) -> Any:
    """The lines of a block with their ends, an array (lines,) of binary that shares the block's memory."""
    import pyarrow as pa

    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A) + 1
    inside = [] if len(ends) and ends[-1] == len(block) else [len(block)]
    offsets = np.concatenate([[0], ends, inside]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _line_arrays(place: str, unit: str) -> Iterator[Any]:
    import pyarrow as pa

    blocks = _whole_lines(place)
    if unit == "line":
        yield from map(_line_array, blocks)
    elif unit == "paragraph":
        for paragraphs in _paragraphs(blocks):
            yield pa.array(paragraphs, pa.large_binary())
    else:
        yield pa.array([b"".join(blocks)], pa.large_binary())


# ---- csv


def _csv_texts(place: str, column: str, lost: dict[int, str]) -> Iterator[list[str | None]]:
    """The values of a column, at most `_ROWS` at a time; at damage of the bytes those before it, then the error.

    A row that is damaged is None, and why is put into `lost` by its number. Raises ValueError for another column.
    """
    head, content = _begun(_content(place))
    lines = io.TextIOWrapper(io.BufferedReader(_Pieces(content)), "utf-8-sig", "replace", newline="")
    delimiter = delimiter_of(place, head)
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
                elif any(map(str.strip, record[width:])):  # a text in which a delimiter stands is cut there
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


def _begun(pieces: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """(the first 64 KiB or so, all pieces with these); what goes wrong is raised where it stands."""
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


def columns_of_table(place: str, file_format: str) -> dict[str, str]:
    """Type of each column of a parquet or arrow file, in order; TEXT for text. Raises OSError or ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_content(place) as file:
        source = io.BytesIO(file.read()) if compression_of(place) else file
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
        found[field.name] = SEVERAL if field.name in found else kind
    return found


def _check_column(columns: dict[str, str], column: str) -> None:
    if column not in columns:
        raise ValueError(f"it has no column {column}, but {', '.join(columns)}")
    if columns[column] == SEVERAL:
        raise ValueError(f"it has several columns called {column}")
    if columns[column] not in (TEXT, "null"):
        raise ValueError(f"its column {column} holds {columns[column]}, not text")


def _groups_from(rows_of_groups: list[int], row: int) -> tuple[tuple[int, ...], int]:
    """(groups of rows that reach to the row `row` and beyond, the first row of the first)."""
    first, passed = 0, 0
    while first < len(rows_of_groups) and passed + rows_of_groups[first] <= row:
        passed += rows_of_groups[first]
        first += 1
    return tuple(range(first, len(rows_of_groups))), passed


class _EndsAtDamage:
    """Ends at damage, where with an error the library would lose the rows that it has collected."""

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
    """The builder of each format; made when first used, since the library takes seconds to load."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ArrowBasedBuilder, DatasetInfo, SplitGenerator
    from datasets.builder import Key
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet

    for builder in (Arrow, Parquet):
        logging.getLogger(builder.__module__).setLevel(logging.CRITICAL)  # what is damaged is said by who counts it

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
