"""Records of csv: the fields of each, by Python's parser, and which line a quote that is never closed costs.

A field in quotes may hold line ends, so a quote that was not meant as one takes the lines after it for its own: to the
end of the file, or to the next quote. A field that runs to the end costs the line in which it began, and the lines
after that are read anew. So it does where the field ends in a line that looks like a record by itself; any other stray
quote is taken as a part of the text.
"""

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

DELIMITERS = ",;\t|"
"""What may stand between fields."""
LONGEST_RECORD_CHARS = 1 << 26
"""A field that is not closed by then is taken for one that never is."""
_COMPARED_RECORDS = 50

csv.field_size_limit((1 << 31) - 1)  # of the process; its usual 131,072 are fewer than a document may have


@dataclass(frozen=True)
class Unclosed:
    """In the place of a record: a line in which a quote opens that nothing closes."""

    line: int
    """Counted from 1."""


def read_records(lines: Iterable[str], delimiter: str) -> Iterator[list[str] | Unclosed]:
    """The records of a text, given with its line ends, that begins with a header. Blank lines are none."""
    source = _Lines(lines)
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
        if isinstance(record, list):
            if not record or (len(record) == 1 and record[0].isspace()):
                continue
            width = width or len(record)
        yield record


def _mended(source: "_Lines", delimiter: str, width: int) -> list[str] | Unclosed:
    """What stands in the place of a record with a stray quote, whose lines were taken from `source`."""
    begun_anew = len(source.taken) > 1 and _looks_like_a_record(source.taken[-1], delimiter, width)
    if not source.ended and not begun_anew:
        source.give_back(len(source.taken))
        source.begin()
        record = next(csv.reader(source, delimiter=delimiter))
        if not source.ended:
            return record
    source.give_back(len(source.taken) - 1)
    return Unclosed(source.number)


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
        self._lines, self._again = iter(lines), deque[str]()
        self._chars = 0
        self.number = 0
        """Lines that were taken and not given back."""
        self.taken: list[str] = []
        """Those of this record."""
        self.ended = False
        """Whether the record wanted more lines than there are."""

    def begin(self) -> None:
        """From here on lines belong to another record."""
        self.taken, self.ended, self._chars = [], False, 0

    def give_back(self, count: int) -> None:
        """The last `count` lines are to be taken again."""
        self._again.extendleft(self.taken[: -count - 1 : -1])
        self.number -= count

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = None
        if self._chars < LONGEST_RECORD_CHARS:
            line = self._again.popleft() if self._again else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.number += 1
        self._chars += len(line)
        self.taken.append(line)
        return line


def find_delimiter(head: str, usual: str) -> str:
    """What stands between the fields of a text that begins so: `usual`, unless another of `DELIMITERS` divides the
    records into as many fields as the header and `usual` does not."""
    lines = list(io.StringIO(head, newline=""))
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
