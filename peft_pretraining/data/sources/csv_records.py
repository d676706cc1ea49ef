"""Parse csv so that a quote which is never closed costs one line instead of the rest of the file.

A quoted field may contain line ends, so a stray quote makes Python's parser swallow the lines after it, up to the next
quote or the end of the file. Here a field that reaches the end of the file costs only the line in which it began, and
the lines after that are parsed again. The same holds if the field ends in a line that looks like a record by itself;
any other stray quote is part of the text. A field with line ends and more than `LONGEST_RECORD_CHARS` is treated as one
that is never closed: such a text is rare in csv, and every logical shard keeps in memory what it may have to parse
again.

A first line `sep=;`, as spreadsheets write it, sets the delimiter and is no record.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

DELIMITERS = ",;\t|"
"""The delimiters that are recognized."""
LONGEST_RECORD_CHARS = 1 << 20
"""A field over several lines that is longer than this counts as never closed."""
_COMPARED_RECORDS = 50
_JOINED_LINES = 1024
"""Lines of a record that are joined into one string: many short strings take far more memory than their text."""
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_DELIMITER_LINE = re.compile(r'"?sep=([^\r\n"])"?[\r\n]*', re.IGNORECASE)

csv.field_size_limit((1 << 31) - 1)  # for the process; a document may be longer than the default of 131,072


@dataclass(frozen=True)
class Unclosed:
    """Returned instead of a record: a line with a quote that is never closed."""

    line: int
    """Counted from 1."""
    too_long: bool = False
    """Whether the search for its end stopped at `LONGEST_RECORD_CHARS`."""

    def __str__(self) -> str:
        within = f" within {LONGEST_RECORD_CHARS:,} characters" if self.too_long else ""
        return f"a quote in line {self.line} is not closed{within}"


def read_records(lines: Iterable[str], delimiter: str) -> Iterator[list[str] | Unclosed]:
    """Yield the records of a text, header first, without blank lines; `lines` include their line ends."""
    source = _Lines(lines)
    source.begin()
    if _DELIMITER_LINE.fullmatch(next(source, "")) is None:
        source.give_back(but_first=False)
    strict = csv.reader(source, delimiter=delimiter, strict=True)
    width = 0  # of the header
    while True:
        source.begin()
        try:
            record: list[str] | Unclosed = next(strict)
        except StopIteration:
            return
        except csv.Error:
            record = _repaired(source, delimiter, width)
            strict = csv.reader(source, delimiter=delimiter, strict=True)  # the old one keeps the long field in memory
        if isinstance(record, list):
            if not record or (len(record) == 1 and record[0].isspace()):
                continue
            width = width or len(record)
        yield record


def _repaired(source: "_Lines", delimiter: str, width: int) -> list[str] | Unclosed:
    """The result for a record with a stray quote, whose lines were taken from `source`."""
    starts_anew = source.count > 1 and _looks_like_a_record(source.last, delimiter, width)
    if not source.ended and not starts_anew:
        source.give_back(but_first=False)
        source.begin()
        record = next(csv.reader(source, delimiter=delimiter))
        if not source.ended:
            return record
    too_long = source.too_long
    source.give_back(but_first=True)
    return Unclosed(source.number, too_long)


def _looks_like_a_record(line: str, delimiter: str, width: int) -> bool:
    """Whether a line is a record of `width` fields, or its first quote is where one of these would begin."""
    before = line.partition('"')[0]
    if before.endswith(delimiter) and before.count(delimiter) < width:
        return True
    try:
        return [len(record) for record in csv.reader([line], delimiter=delimiter, strict=True)] == [width]
    except csv.Error:
        return False


class _Lines:
    """An iterator of lines that can give back the lines of the current record, to be parsed again."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again, self._at = "", 0
        """The text that was given back, and the offset up to which it was taken again."""
        self._taken: list[str] = []
        """The text of this record, in pieces."""
        self._chars = 0
        self.number = 0
        """Lines that were taken and not given back."""
        self.begin()

    def begin(self) -> None:
        """Start another record."""
        self._taken, self._chars = [], 0
        self.count = 0
        """Lines of this record."""
        self.first = self.last = ""
        self.ended = self.too_long = False
        """Whether the parser asked for a line after the last one, and for one beyond `LONGEST_RECORD_CHARS`."""

    def give_back(self, but_first: bool) -> None:
        """Give back the lines of this record, all of them or all but the first."""
        text = "".join(self._taken)
        self._again = text[len(self.first) if but_first else 0 :] + self._again[self._at :]
        self._at = 0
        self.number -= self.count - but_first
        self.begin()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.too_long = self._chars >= LONGEST_RECORD_CHARS
        line = None if self.too_long else self._next()
        if line is None:
            self.ended = True
            raise StopIteration
        self.first = line if not self.count else self.first
        self.last = line
        self.count += 1
        self.number += 1
        self._chars += len(line)
        self._taken.append(line)
        if len(self._taken) > _JOINED_LINES:
            self._taken = ["".join(self._taken)]
        return line

    def _next(self) -> str | None:
        if not self._again:
            return next(self._lines, None)
        found = _LINE.match(self._again, self._at)
        assert found is not None
        self._at = found.end()
        if self._at == len(self._again):
            self._again, self._at = "", 0
        return found[0]


def find_delimiter(head: str, usual: str) -> str:
    """The delimiter of a text that begins with `head`: that of a first line `sep=`, else `usual`, unless another of
    `DELIMITERS` splits the records into as many fields as the header and `usual` does not."""
    lines = list(io.StringIO(head, newline=""))
    if lines and (found := _DELIMITER_LINE.fullmatch(lines[0])):
        return found[1]
    lines = lines[:-1] if len(lines) > 1 else lines  # the last one may be cut off
    shares = {delimiter: _share_alike(lines, delimiter) for delimiter in DELIMITERS}
    # A comma may split texts by chance, and rows may have more or fewer fields than the header.
    enough = 0.5 if shares[usual][0] == 1 else 1.0
    others = [each for each, (fields, share) in shares.items() if fields > 1 and share >= enough]
    if (shares[usual][0] > 1 and shares[usual][1] == 1.0) or not others:
        return usual
    return max(others, key=lambda each: (shares[each][1], shares[each][0]))


def _share_alike(lines: list[str], delimiter: str) -> tuple[int, float]:
    """(fields of the header, share of the records with as many fields)."""
    records = islice(read_records(lines, delimiter), _COMPARED_RECORDS)
    widths = [len(record) for record in records if isinstance(record, list)]
    return (widths[0], sum(width == widths[0] for width in widths) / len(widths)) if widths else (1, 0.0)
