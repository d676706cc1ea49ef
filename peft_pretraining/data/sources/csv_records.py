"""Records of csv: the fields of each, by Python's parser, and which line a quote that is never closed costs.

A field in quotes may hold line ends, so a quote that was not meant as one takes the lines after it for its own: to the
end of the file, or to the next quote. A field that runs to the end costs the line in which it began, and the lines
after that are read anew. So it does where the field ends in a line that looks like a record by itself; any other stray
quote is taken as a part of the text. A field that has line ends and more than `LONGEST_RECORD_CHARS` is taken for one
that runs to the end: a text that long is rare in csv, and every logical shard keeps what it has to read anew.

A first line `sep=;`, as spreadsheets write and read it, says what stands between the fields and is no record.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

DELIMITERS = ",;\t|"
"""What may stand between fields."""
LONGEST_RECORD_CHARS = 1 << 20
"""A field over several lines that is not closed by then is taken for one that never is."""
_COMPARED_RECORDS = 50
_JOINED_LINES = 1024
"""So many lines of a record become one string: short ones take far more memory than their text."""
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_SAYS_DELIMITER = re.compile(r'"?sep=([^\r\n"])"?[\r\n]*', re.IGNORECASE)

csv.field_size_limit((1 << 31) - 1)  # of the process; its usual 131,072 are fewer than a document may have


@dataclass(frozen=True)
class Unclosed:
    """In the place of a record: a line in which a quote opens that nothing closes."""

    line: int
    """Counted from 1."""
    too_long: bool = False
    """Whether it was given up at `LONGEST_RECORD_CHARS`."""

    def __str__(self) -> str:
        within = f" within {LONGEST_RECORD_CHARS:,} characters" if self.too_long else ""
        return f"a quote in line {self.line} is not closed{within}"


def read_records(lines: Iterable[str], delimiter: str) -> Iterator[list[str] | Unclosed]:
    """The records of a text, given with its line ends, that begins with a header. Blank lines are none."""
    source = _Lines(lines)
    source.begin()
    if _SAYS_DELIMITER.fullmatch(next(source, "")) is None:
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
            record = _mended(source, delimiter, width)
            strict = csv.reader(source, delimiter=delimiter, strict=True)  # the old one keeps its longest field
        if isinstance(record, list):
            if not record or (len(record) == 1 and record[0].isspace()):
                continue
            width = width or len(record)
        yield record


def _mended(source: "_Lines", delimiter: str, width: int) -> list[str] | Unclosed:
    """What stands in the place of a record with a stray quote, whose lines were taken from `source`."""
    begun_anew = source.count > 1 and _looks_like_a_record(source.last, delimiter, width)
    if not source.ended and not begun_anew:
        source.give_back(but_first=False)
        source.begin()
        record = next(csv.reader(source, delimiter=delimiter))
        if not source.ended:
            return record
    too_long = source.too_long
    source.give_back(but_first=True)
    return Unclosed(source.number, too_long)


def _looks_like_a_record(line: str, delimiter: str, width: int) -> bool:
    """Whether a line is a record of `width` fields, or its first quote stands where one of these would begin."""
    before = line.partition('"')[0]
    if before.endswith(delimiter) and before.count(delimiter) < width:
        return True
    try:
        return [len(record) for record in csv.reader([line], delimiter=delimiter, strict=True)] == [width]
    except csv.Error:
        return False


class _Lines:
    """Lines in turn, of which those of the record that is being read can be given back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._again, self._at = "", 0
        """Lines that were given back, and from where on they are still to be taken."""
        self._taken: list[str] = []
        """The text of this record, in some pieces."""
        self._chars = 0
        self.number = 0
        """Lines that were taken and not given back."""
        self.begin()

    def begin(self) -> None:
        """From here on lines belong to another record."""
        self._taken, self._chars = [], 0
        self.count = 0
        """Lines of this record."""
        self.first = self.last = ""
        self.ended = self.too_long = False
        """Whether the record wanted more lines than there are, and whether more than it may have."""

    def give_back(self, but_first: bool) -> None:
        """The lines of this record are to be taken again, all of them or all but the first."""
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
    """What stands between the fields of a text that begins so: `usual`, unless another of `DELIMITERS` divides the
    records into as many fields as the header and `usual` does not. A first line that says it is believed."""
    lines = list(io.StringIO(head, newline=""))
    if lines and (said := _SAYS_DELIMITER.fullmatch(lines[0])):
        return said[1]
    lines = lines[:-1] if len(lines) > 1 else lines  # the last one may be cut off
    shares = {delimiter: _share_alike(lines, delimiter) for delimiter in DELIMITERS}
    # A comma may divide texts by chance, and rows may have more or fewer fields than the header.
    enough = 0.5 if shares[usual][0] == 1 else 1.0
    others = [each for each, (fields, share) in shares.items() if fields > 1 and share >= enough]
    if (shares[usual][0] > 1 and shares[usual][1] == 1.0) or not others:
        return usual
    return max(others, key=lambda each: (shares[each][1], shares[each][0]))


def _share_alike(lines: list[str], delimiter: str) -> tuple[int, float]:
    """(fields of the header, share of the records that have as many)."""
    records = islice(read_records(lines, delimiter), _COMPARED_RECORDS)
    widths = [len(record) for record in records if isinstance(record, list)]
    return (widths[0], sum(width == widths[0] for width in widths) / len(widths)) if widths else (1, 0.0)
