"""Shards of gzip-compressed JSON lines, C4's layout: in a directory, or on the hub.

Gzip cannot seek, so skipping decompresses (about 140 MB of text a second) but neither parses nor decodes.
"""

import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.data.sources.documents import Damage, MemorySource, Source
from peft_pretraining.data.sources.hub import C4_REPOSITORY, C4_REVISION, C4_SHARDS, HubFiles, RetryPolicy
from peft_pretraining.data.sources.pydocs import pydocs_documents
from peft_pretraining.errors import UserError

_READ_BYTES = 1 << 18
_PIECE_BYTES = 1 << 13
"""Decompressed at a time: what is lost with a damaged piece. Divides what is read at a time, here and in `hub`."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GzipShards:
    """Shards of gzip-compressed JSON lines with a field `text`: a directory, or the hub."""

    name: str
    files: tuple[str, ...]
    """Names for messages and, joined with the folder or the repository, places."""
    identity: str
    folder: Path | None
    hub: HubFiles | None = None

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self.files)

    def fingerprint(self) -> str:
        """Hash of names and sizes, or of the hub's revision."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        first = part + start * slices
        file = self.files[shard]
        for line_number, item in _lines(self._chunks(file), first):
            if line_number % slices != part:
                continue
            if isinstance(item, bytes):
                yield _text(item, file, line_number)
            else:
                yield Damage(f"{file} after line {line_number}", f"{item}; the rest of the file is lost")

    def _chunks(self, file: str) -> Iterator[bytes]:
        if self.hub is not None:
            return self.hub.chunks(file)
        assert self.folder is not None
        return _file_chunks(self.folder / file)


def open_source(
    dataset: str,
    split: str,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
    stop: threading.Event | None = None,
) -> Source:
    """The documents of split "train" or "validation" of --dataset. Raises UserError; token files are not documents."""
    if dataset == "pydocs":
        return MemorySource("pydocs", pydocs_documents(split))
    if dataset == "c4":
        count = C4_SHARDS[split]
        files = tuple(f"en/c4-{split}.{i:05d}-of-{count:05d}.json.gz" for i in range(count))
        hub = HubFiles(endpoint=endpoint, retry=retry, stop=stop)
        return GzipShards("c4", files, f"{C4_REPOSITORY}@{C4_REVISION}/{split}", None, hub)
    return _directory(dataset, split)


def _directory(dataset: str, split: str) -> GzipShards:
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--dataset {dataset}: no such directory. Give c4, pydocs, a directory with c4-train.*.json.gz and "
            "c4-validation.*.json.gz, or a file or folder of token ids."
        )
    for place in (folder, folder / "en"):
        if files := sorted(path.name for path in place.glob(f"*{split}*.json.gz")):
            sizes = [(file, (place / file).stat().st_size) for file in files]
            return GzipShards(dataset, tuple(files), repr(sizes), place)
    raise UserError(
        f"--dataset {dataset}: neither it nor its folder en/ holds a file *{split}*.json.gz "
        "(gzip-compressed JSON lines with a field text, as in allenai/c4)."
    )


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(f"--dataset: {path} cannot be read ({error.strerror}).") from error


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
