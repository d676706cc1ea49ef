"""Find out from a file's first bytes whether it is of the format of its name, and which columns it has."""

import contextlib
import io
import json
from collections.abc import Iterator
from itertools import islice

from peft_pretraining.data.sources.builders import (
    TEXT,
    columns_of_table,
    delimiter_of,
    in_words,
    open_binary,
    open_content,
)
from peft_pretraining.data.sources.compression import MAGIC, DamagedError, compression_of, compression_seen
from peft_pretraining.data.sources.csv_records import Unclosed, read_records

_HEAD_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 26
_BINARY_MAGIC = {
    b"ARROW1\0\0": "an arrow file",
    b"\xff\xff\xff\xff": "an arrow file",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array (if it holds token ids, write them with array.astype('<u4').tofile('train.uint32'))",
    b"\xff\xfe": "text in UTF-16 (convert it to UTF-8)",
    b"\xfe\xff": "text in UTF-16 (convert it to UTF-8)",
}
_HAS_MAGIC = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
_COMPARED_RECORDS = 50
NUMBER = "number"
"""The type of a csv column that has only numbers in its first records."""
_LFS = b"version https://git-lfs"


def what_is(path: str, file_format: str) -> str:
    """Describe a file, such as "a Git LFS pointer (...)", that is not what its name and `file_format` promise.

    Returns "" if its first 64 KiB are as promised, or if it is empty or cannot be decompressed at all: these are
    reported when it is read. Raises OSError if it cannot be opened.
    """
    compression = compression_of(path)
    with open_binary(path) as file:
        raw = file.read(_HEAD_BYTES)
    packed = compression_seen(raw)
    if not raw.strip(b"\0"):
        # As lines it is reported as damage when it is read; a decompressor would skip it silently.
        return "nothing but zero bytes, as a crash can leave them" if raw and compression else ""
    if compression:
        if raw.startswith(MAGIC[compression]):  # a damaged header is reported when it is read, too
            return _unexpected(_head(path), file_format)
        if packed:
            return f"compressed with {packed}"
        return f"{_in_general(raw)}, not compressed with {compression}"
    return f"compressed with {packed}, which its name does not end with" if packed else _unexpected(raw, file_format)


def columns_of(path: str, file_format: str) -> dict[str, str]:
    """The type of each column or field in order, TEXT for text. Raises OSError or ValueError if it cannot be read."""
    if file_format in _HAS_MAGIC:
        return columns_of_table(path, file_format)
    if file_format == "csv":
        head = _head(path)
        lines = io.StringIO(head.decode("utf-8-sig", "replace"), newline="")
        records = read_records(lines, delimiter_of(path, head))
        header = next(records, [])
        if isinstance(header, Unclosed):
            raise ValueError("a quote in its first line is not closed")
        columns = dict.fromkeys(header, TEXT)
        rows = [row for row in islice(records, _COMPARED_RECORDS) if isinstance(row, list)]
        for i, name in enumerate(header):
            values = [row[i] for row in rows if len(row) > i and row[i].strip()]
            if values and all(map(_is_number, values)):
                columns[name] = NUMBER
        return columns
    found: dict[str, str] = {}
    for item in _objects(_head(path, whole_line=True)):
        for key, value in item.items():
            if isinstance(value, str):
                found[key] = TEXT
            elif value is not None:
                found.setdefault(key, type(value).__name__)
            else:
                found.setdefault(key, "null")
    return found


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _head(path: str, whole_line: bool = False) -> bytes:
    """The first bytes of the decompressed content, up to any damage; with `whole_line` at least a line if possible."""
    pieces: list[bytes] = []
    size, found = 0, False
    with contextlib.suppress(DamagedError), open_content(path) as file:
        while (size < _HEAD_BYTES or (whole_line and not found and size < _LONGEST_LINE_BYTES)) and (
            piece := file.read(1 << 12)
        ):
            pieces.append(piece)
            size += len(piece)
            found = found or b"\n" in piece
    return b"".join(pieces)


def _objects(head: bytes) -> Iterator[dict[str, object]]:
    """The JSON objects among the first lines."""
    for line in islice(head.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1000):
        try:
            item = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            yield item


def _unexpected(head: bytes, file_format: str) -> str:
    """Describe content that is not of the format; else ""."""
    if not head.strip():
        return ""
    if file_format in _HAS_MAGIC:
        return "" if head.startswith(_HAS_MAGIC[file_format]) else _in_general(head)
    if file_format != "json":
        found = _in_general(head)
        if found not in _TEXTS and not (file_format == "text" and found in _MARKUP):
            return found
        return _OTHER_ENCODING if _is_in_another_encoding(head) else ""
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not _spread_out(first) and next(_objects(head), None) is not None:
        return _OTHER_ENCODING if _is_in_another_encoding(head) else ""
    if first.startswith(b"{") and b"\n" not in first.rstrip():
        return ""  # one long line, perhaps a damaged one
    return _in_general(head)


_FEWEST_WRONG_BYTES = 8
_TEXT_BYTES_PER_NUL = 1000
_OTHER_ENCODING = "text that is not in UTF-8 (convert it, as with iconv -f WINDOWS-1252 -t UTF-8)"
_TEXTS = (
    "plain text",
    "a JSON array, not a JSON object a line (jq -c '.[]' FILE makes such lines of it)",
    "a JSON object over several lines",
    "JSON lines",
)
_MARKUP = ("an HTML page",)


def _spread_out(first: bytes) -> bool:
    """Whether this is the beginning of one JSON value over many lines, some of which may look like JSON lines."""
    return first.split(b"\n", 1)[0].strip() in (b"[", b"{")


def _in_general(head: bytes) -> str:
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith(_LFS):
        return "a Git LFS pointer (get the file itself with: git lfs pull)"
    for magic, name in _BINARY_MAGIC.items():
        if head.startswith(magic):
            return name
    if head.startswith(_HAS_MAGIC["parquet"]) and b"\0" in head:  # a text may begin with these letters, too
        return "a parquet file"
    if first[:200].lower().startswith((b"<!doctype html", b"<html")):
        return _MARKUP[0]
    if not _spread_out(first) and next(_objects(head), None) is not None:
        return _TEXTS[3]
    if first.startswith(b"["):
        return _TEXTS[1]
    if first.startswith(b"{"):
        return _TEXTS[2]
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    return "binary data" if _is_binary(head) else _TEXTS[0]


def _is_binary(head: bytes) -> bool:
    """Whether there are many NUL bytes; a few in a long text are damage."""
    return (nulls := head.count(b"\0")) > 1 and nulls * _TEXT_BYTES_PER_NUL > len(head)


def _is_in_another_encoding(head: bytes) -> bool:
    """Whether most non-ASCII bytes are not UTF-8; a few in a long text are damage."""
    text = head[:-3].decode("utf-8", "replace")  # the last character may be cut off
    wrong = text.count("\ufffd") - head.count("\ufffd".encode())
    return wrong >= _FEWEST_WRONG_BYTES and wrong > sum(not character.isascii() for character in text) / 2


def why_unreadable(path: str) -> str:
    """The system's reason why a file cannot be opened; "" if it can."""
    try:
        with open_binary(path) as file:
            file.read(1)
    except OSError as error:
        return in_words(error)
    return ""
