"""The protocol of sources of text, and a source in memory.

A source has shards, and a shard is a sequence of documents. The index of a document is that of its line or row. Lines
without a document keep their index, so that an index means the same whatever happens to documents before it: an empty
string stands for no document (a blank line, null, an empty text), `Damage` for one that cannot be read.
`read(shard, slices, part, start)` yields the documents `part, part + slices, ...` of a shard, from the `start`-th of
them on: with fewer shards than logical shards several of these read one shard.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

_HEAD_BYTES = 1 << 14
_READERS = 4


@dataclass(frozen=True)
class Damage:
    """Returned instead of a document that cannot be read."""

    where: str
    reason: str


class Source(Protocol):
    """Documents by (shard, index)."""

    @property
    def name(self) -> str:
        """The name that the user gave, for error texts."""

    @property
    def shards(self) -> int:
        """The number of shards, at least 1."""

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """Yield the documents of a part of a shard, from its `start`-th on."""

    def fingerprint(self) -> str:
        """A hash that changes when the shards do."""


@dataclass(frozen=True)
class Files:
    """The files that a source reads; each is a shard."""

    names: tuple[str, ...]
    """In the order of the shards."""
    sizes: tuple[int, ...]
    """Bytes of each."""
    settings: str = ""
    """Other values that decide which documents are read from them, such as the name of a column."""
    paths: tuple[str, ...] = ()
    """Their paths, if they are local."""
    heads: tuple[str, ...] = ()
    """For each path a hash of the file's first and last 16 KiB, or "" if it cannot be read; set by `with_heads`."""

    def with_heads(self) -> "Files":
        """A copy with `heads`, which show that a file was replaced by one of the same size. Reads at most 32 KiB of
        each local file, about 8,000 files per second."""
        with ThreadPoolExecutor(_READERS) as readers:
            return replace(self, heads=tuple(readers.map(_head_of, self.paths)))

    def identity(self) -> str:
        """A hash of names and settings, which does not change when files are replaced."""
        return hashlib.sha256(repr((self.names, self.settings)).encode()).hexdigest()[:16]


def _head_of(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.blake2b(file.read(_HEAD_BYTES), digest_size=8)
            file.seek(max(_HEAD_BYTES, file.seek(0, os.SEEK_END) - _HEAD_BYTES))
            digest.update(file.read(_HEAD_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()


@runtime_checkable
class FileSource(Source, Protocol):
    """A source that knows its files, so that shards of unequal size are dealt in proportion, and a file that was
    replaced is not mistaken for another data set."""

    def file_list(self) -> Files | None:
        """One file for each shard; None if they are unknown."""


@runtime_checkable
class LocalSource(Source, Protocol):
    """A source of local files, which may change without a change of size or name."""

    def stamp(self) -> str:
        """The paths and modification times of the files, as a cache key for what is derived from their content."""


@runtime_checkable
class PinnedSource(Source, Protocol):
    """A source that reads one revision of a data set that may change."""

    @property
    def revision(self) -> str:
        """The commit, for --dataset_revision of a resumed run; "" if there is none."""


def revision_of(source: object) -> str:
    """The commit of a data set on the hub; "" for others."""
    return source.revision if isinstance(source, PinnedSource) else ""


@runtime_checkable
class DescribedSource(Source, Protocol):
    """A source that can describe what it reads."""

    def describe(self) -> str:
        """A phrase for the log: its name, and its files, field or number of documents."""


def describe_source(source: Source) -> str:
    """A phrase for the log: `DescribedSource.describe`, or else its name."""
    return source.describe() if isinstance(source, DescribedSource) else source.name


def files_of(source: Source) -> Files | None:
    """The files of a source; None if it does not know them."""
    return source.file_list() if isinstance(source, FileSource) else None


class SourceWrapper:
    """A source that forwards to another one, `source`; subclasses override what differs."""

    source: Source

    @property
    def name(self) -> str:
        """See `Source.name`."""
        return self.source.name

    @property
    def shards(self) -> int:
        """See `Source.shards`."""
        return self.source.shards

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        yield from self.source.read(shard, slices, part, start)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self.source.fingerprint()

    def describe(self) -> str:
        """See `DescribedSource.describe`."""
        return describe_source(self.source)

    def file_list(self) -> Files | None:
        """See `FileSource.file_list`."""
        return files_of(self.source)


@dataclass(frozen=True)
class Share:
    """A source of a mixture, or the only one."""

    source: Source
    weight: float = 1.0
    """Relative to those of the other sources."""


def is_text(item: str | Damage) -> TypeGuard[str]:
    """Whether an item of `Source.read` is a document with text, rather than empty or damage."""
    return isinstance(item, str) and bool(item) and not item.isspace()


@dataclass(frozen=True)
class MemorySource:
    """Documents in a list, for pydocs and tests."""

    name: str
    documents: list[str]
    shards: int = 1

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`; document i is in shard i mod `shards`."""
        yield from self.documents[shard :: self.shards][part + start * slices :: slices]

    def describe(self) -> str:
        """See `DescribedSource`."""
        return f"{self.name}: {len(self.documents):,} documents"

    def fingerprint(self) -> str:
        """A hash of all texts."""
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "replace")).hexdigest()[:16]
