"""Documents by their place: the interface of sources of text, and a source in memory.

A source is a number of shards; a shard is a sequence of documents. A document's place is its line or row number, and
what is no document keeps its number, so that a place means the same whatever happens to those before it: an empty
string stands for nothing (a blank line, null, an empty text), `Damage` for what should have been a document and is not. `read(shard, slices,
part, start)` yields the documents `part, part + slices, ...` of a shard from the `start`-th of them on: with fewer
shards than lanes several lanes share a shard.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


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
class MemorySource:
    """Documents in a list: pydocs, and tests."""

    name: str
    documents: list[str]
    shards: int = 1

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`; document i lies in shard i mod `shards`."""
        yield from self.documents[shard :: self.shards][part + start * slices :: slices]

    def fingerprint(self) -> str:
        """Hash of all texts."""
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "replace")).hexdigest()[:16]
