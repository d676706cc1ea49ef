"""Shards of gzip-compressed JSON lines, as C4 has them, wherever their bytes come from.

Gzip cannot seek, so skipping decompresses (about 140 MB of text a second) but neither parses nor decodes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from peft_pretraining.data.sources.documents import Damage

_PIECE_BYTES = 1 << 13
"""Decompressed at a time: what is lost with a damaged piece. Divides what `c4_folder` and `hub` read at a time."""


@dataclass(frozen=True)
class GzipShards:
    """Shards of gzip-compressed JSON lines with a field `text`."""

    name: str
    files: tuple[str, ...]
    """Names, for messages and for `chunks`."""
    identity: str
    """Changes when the files do: their sizes, or the revision of a repository."""
    chunks: Callable[[str], Iterator[bytes]]
    """The bytes of a file by its name, in pieces."""

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def fingerprint(self) -> str:
        """Hash of `identity`."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        first = part + start * slices
        file = self.files[shard]
        for line_number, item in _lines(self.chunks(file), first):
            if line_number % slices != part:
                continue
            if isinstance(item, bytes):
                yield _text(item, file, line_number)
            else:
                yield Damage(f"{file} after line {line_number}", f"{item}; the rest of the file is lost")


def _text(line: bytes, file: str, line_number: int) -> str | Damage:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Damage(f"{file} line {line_number + 1}", f"not a JSON object with a text ({type(error).__name__})")
    if not isinstance(text, str):
        return Damage(f"{file} line {line_number + 1}", "its text is not a string")
    # JSON can hold half of a surrogate pair, which is not text that a tokenizer accepts.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _lines(chunks: Iterable[bytes], first: int) -> Iterator[tuple[int, bytes | str]]:
    """(line number, line) from line `first` on; at damage, as the last item, (first lost line number, reason)."""
    number = 0
    rest = b""
    try:
        for block in _gunzip(chunks):
            # Lines before `first` are only counted.
            skipped = block.count(b"\n") if number < first else 0
            if number + skipped < first:
                number += skipped
                rest = b""
                continue
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if number >= first:
                    yield number, line
                number += 1
    except (zlib.error, EOFError) as error:
        # Damage before `first` was reported by whoever read that far.
        if number >= first:
            yield number, f"damaged gzip ({error})"
        return
    if rest and number >= first:
        yield number, rest


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress one or more gzip members. Raises zlib.error or EOFError."""
    member = zlib.decompressobj(wbits=31)
    begun = False
    for chunk in (read[i : i + _PIECE_BYTES] for read in chunks for i in range(0, len(read), _PIECE_BYTES)):
        while chunk:
            if member.eof:
                # Some writers pad the end of a file with zeros.
                if not (chunk := chunk.lstrip(b"\0") if not begun else chunk):
                    break
                member = zlib.decompressobj(wbits=31)
            if block := member.decompress(chunk):
                yield block
            begun = not member.eof
            chunk = member.unused_data if member.eof else b""
    if begun:
        raise EOFError("it ends too early")
