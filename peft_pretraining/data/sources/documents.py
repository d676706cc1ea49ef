"""Documents by their place: the interface of sources of text, and a source in memory.

A source is a number of shards; a shard is a sequence of documents. A document's place is its line or row number, and
what is no document keeps its number, so that a place means the same whatever happens to those before it: an empty
string stands for nothing (a blank line, null, an empty text), `Damage` for what should have been a document and is not.
`read(shard, slices, part, start)` yields the documents `part, part + slices, ...` of a shard from the `start`-th of
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
    """Stands in the place of what could not be read."""

    where: str
    reason: str


class Source(Protocol):
    """Documents by (shard, line)."""

    @property
    def name(self) -> str:
        """As the user gave it, for messages."""

    @property
    def shards(self) -> int:
        """Number of shards, at least 1."""

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """The documents of a part of a shard, from its `start`-th on."""

    def fingerprint(self) -> str:
        """Changes when the shards do."""


@dataclass(frozen=True)
class Files:
    """The files that a source reads, a shard each."""

    names: tuple[str, ...]
    """In the order of the shards."""
    sizes: tuple[int, ...]
    """Bytes of each."""
    settings: str = ""
    """What else decides what is read from them, such as the name of a column."""
    places: tuple[str, ...] = ()
    """Their paths, if they lie on this machine."""
    heads: tuple[str, ...] = ()
    """Of each of these a hash of its first and last 16 KiB, or "" if it cannot be read; from `with_heads` alone."""

    def with_heads(self) -> "Files":
        """The same with `heads`: a file that was changed to the same size is told by it. Reads at most 32 KiB of each
        file on this machine, of about 8,000 in a second; those elsewhere have none."""
        with ThreadPoolExecutor(_READERS) as readers:
            return replace(self, heads=tuple(readers.map(_head_of, self.places)))

    def identity(self) -> str:
        """Hash of names and settings: equal for a file and what it is replaced with."""
        return hashlib.sha256(repr((self.names, self.settings)).encode()).hexdigest()[:16]


def _head_of(place: str) -> str:
    try:
        with Path(place).open("rb") as file:
            digest = hashlib.blake2b(file.read(_HEAD_BYTES), digest_size=8)
            file.seek(max(_HEAD_BYTES, file.seek(0, os.SEEK_END) - _HEAD_BYTES))
            digest.update(file.read(_HEAD_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()


@runtime_checkable
class FileSource(Source, Protocol):
    """A source that knows its files. Shards of unequal size are then dealt in proportion, and a file that was replaced
    is told from another data set."""

    def file_list(self) -> Files | None:
        """One for each shard; None if it does not know them after all."""


@runtime_checkable
class LocalSource(Source, Protocol):
    """A source of files that may change without another size or name."""

    def stamp(self) -> str:
        """Where the files lie and when they were written: what is derived from their content is kept under it."""


@runtime_checkable
class PinnedSource(Source, Protocol):
    """A source that reads one state of a data set that may change meanwhile."""

    @property
    def revision(self) -> str:
        """The commit, for --dataset_revision of a run that goes on with the same files; "" if there is none."""


def revision_of(source: object) -> str:
    """The commit of a data set on the hub; "" for others."""
    return source.revision if isinstance(source, PinnedSource) else ""


@runtime_checkable
class DescribedSource(Source, Protocol):
    """A source that can say what it reads."""

    def describe(self) -> str:
        """A phrase for people: its name, and which files, field or documents that is."""


def describe_source(source: Source) -> str:
    """A phrase for people; its name alone where it knows no better."""
    return source.describe() if isinstance(source, DescribedSource) else source.name


def files_of(source: Source) -> Files | None:
    """The files of a source that knows them."""
    return source.file_list() if isinstance(source, FileSource) else None


@dataclass(frozen=True)
class Share:
    """A source of a mixture, or the only one."""

    source: Source
    weight: float = 1.0
    """In proportion to those of the others."""


def is_text(item: str | Damage) -> TypeGuard[str]:
    """Whether an item is a document, rather than nothing or damage: without text there is no token to predict."""
    return isinstance(item, str) and bool(item) and not item.isspace()


@dataclass(frozen=True)
class MemorySource:
    """Documents in a list: pydocs, and tests."""

    name: str
    documents: list[str]
    shards: int = 1

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`; document i lies in shard i mod `shards`."""
        yield from self.documents[shard :: self.shards][part + start * slices :: slices]

    def describe(self) -> str:
        """See `DescribedSource`."""
        return f"{self.name}: {len(self.documents):,} documents"

    def fingerprint(self) -> str:
        """Hash of all texts."""
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "replace")).hexdigest()[:16]
