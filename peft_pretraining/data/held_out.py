"""Hold documents out of the training split for validation, where a data set has no validation split.

A document is chosen by its content: the distinct texts with the smallest hashes (BLAKE2b, 8 bytes) are held out, so
that the same texts give the same split whatever the number of ranks and shards and the order of the files. They are
0.1 % of the documents, at least 500, and never more than 10 % or 10,000. Copies count, and a text with so many copies
that it would exceed the limit is not held out. Training skips every document whose text is held out, in any file.

Up to a million documents are read for it in the order of the files (half as many over a network), with a progress bar.
In a larger data set the held-out documents are all among these; how many they are depends on the number of all
documents, which is estimated from the sizes of the files. The choice is cached under the fingerprint of the data set.

The hashes are part of a run's state, so that a resumed run holds out the same documents even if the files have changed.
"""

import base64
import gzip
import hashlib
import heapq
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peft_pretraining.data.cache import cache_dir, publish
from peft_pretraining.data.sources.documents import (
    Damage,
    Files,
    LocalSource,
    Source,
    SourceWrapper,
    describe_source,
    files_of,
    is_text,
    revision_of,
)
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, SourceOptions, Splits, TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.waiting import with_progress
from peft_pretraining.errors import UserError

FEWEST_DOCUMENTS = 64
"""With fewer documents a run has to name a validation file."""
_LEAST, _MOST = 500, 10_000
_SCANNED, _SCANNED_OVER_NETWORK = 1_000_000, 500_000
# Twice as many candidates as can be held out, because texts with many copies are not chosen.
_CANDIDATES = 2 * _MOST
_CANDIDATE_CHARS = 1 << 29
_FIRST = 200  # documents by which their number is estimated
_FORMAT = 2


def open_splits(dataset: str, options: SourceOptions = DEFAULT_OPTIONS) -> Splits:
    """Open both splits of `--dataset`; without a validation split, documents of train are held out. Raises UserError.

    A held-out text is in no document of train.
    """
    kind = find_kind(dataset)
    splits = kind.open_splits(dataset, options)
    if not isinstance(kind, TextKind) or "validation" not in kind.splits or splits.validation is not None:
        return splits
    assert splits.train is not None and not isinstance(splits.train, TokenFiles | TokenMixture)
    return Splits(*hold_out(splits.train, options, _SCANNED_OVER_NETWORK if kind.needs_network else _SCANNED))


def open_split(
    dataset: str, split: str, options: SourceOptions = DEFAULT_OPTIONS
) -> Source | TokenFiles | TokenMixture:
    """Open split "train" or "validation" as `open_splits` does; token ids need not have both. Raises UserError."""
    kind = find_kind(dataset)
    is_alone = split not in kind.splits or not isinstance(kind, TextKind)
    opened = open_dataset(dataset, split, options) if is_alone else open_splits(dataset, options)._asdict()[split]
    assert opened is not None
    return opened


@dataclass
class HeldOut:
    """The documents held out of a data set; its training source and its validation source share this object."""

    name: str
    """Of the data set, as the user gave it."""
    key: str
    """Of the file in the cache."""
    texts: list[str] = field(repr=False)
    hashes: frozenset[int] = field(default=frozenset(), repr=False)
    """Hashes of all texts that are not trained on: those of `texts`, and of texts whose files are gone."""

    def __post_init__(self) -> None:
        self.hashes = self.hashes or frozenset(map(hash_of, self.texts))

    def state(self) -> dict[str, str]:
        """The hashes for a checkpoint; JSON-able, 11 bytes per document."""
        packed = b"".join(digest.to_bytes(8) for digest in sorted(self.hashes))
        return {"key": self.key, "hashes": base64.b64encode(packed).decode()}

    def load_state(self, saved: dict[str, str], source: Source) -> list[str]:
        """Restore the documents that a run held out at its start, if the files differ since; returns lines for the log.

        The texts are read from the cache, or found in `source` by their hashes. Raises UserError if none is left.
        """
        if saved == self.state():
            return []
        packed = base64.b64decode(saved["hashes"])
        hashes = frozenset(int.from_bytes(packed[i : i + 8]) for i in range(0, len(packed), 8))
        notice = f"--dataset {self.name}: the documents held out stay those that the run began with"
        if hashes == self.hashes:  # of other files with the same texts
            return []
        texts = _read(_cache_file(saved["key"]))
        if texts is None:
            texts = list(dict.fromkeys(text for text in _documents(source, None) if hash_of(text) in hashes))
            if not texts:
                raise UserError(
                    f"--dataset {self.name}: none of the documents that were held out when the run began is there any "
                    "longer. Put the files back that it began with, or begin a new run in another --save_dir."
                )
            if len(texts) < len(hashes):
                notice += f", of which {len(hashes) - len(texts)} of {len(hashes)} are no longer there"
        self.key, self.texts, self.hashes = saved["key"], texts, hashes
        return [notice]


@dataclass(frozen=True)
class HeldOutSource:
    """The documents of a `HeldOut` as a source; follows its `load_state`."""

    held_out: HeldOut
    shards: int = 1

    @property
    def name(self) -> str:
        """See `Source.name`."""
        return self.held_out.name

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        yield from self.held_out.texts[part + start * slices :: slices]

    def describe(self) -> str:
        """See `DescribedSource`."""
        return f"{len(self.held_out.texts):,} documents of it, held out by a hash of their content"

    def fingerprint(self) -> str:
        """A hash of the texts."""
        return hashlib.sha256(repr(sorted(self.held_out.hashes)).encode()).hexdigest()[:16]


def hold_out(
    source: Source, options: SourceOptions = DEFAULT_OPTIONS, scanned: int = _SCANNED
) -> tuple["WithoutHeldOut", HeldOutSource]:
    """Split a source into (training documents, held-out documents), chosen among the first `scanned` documents.

    `options`: those with which the source was opened. Raises UserError for fewer than 64 documents.
    """
    settings = (options.config, options.revision, options.train_split, options.text_column, options.text_unit)
    # A fingerprint may cover the sizes of files only, and so be equal for other texts.
    stamp = source.stamp() if isinstance(source, LocalSource) else ""
    identity = repr((_FORMAT, source.fingerprint(), settings, scanned, stamp))
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    texts = _read(_cache_file(key))
    if texts is None:
        found = json.dumps(choose(source, scanned)).encode()
        texts = json.loads(gzip.decompress(publish(_cache_file(key), gzip.compress(found, mtime=0))))
    held_out = HeldOut(source.name, key, texts)
    return WithoutHeldOut(source, (held_out,)), HeldOutSource(held_out)


def held_out_count(documents: int) -> int:
    """The largest number of documents to hold out of `documents`."""
    return min(max(_LEAST, documents // 1000), documents // 10, _MOST)


def hash_of(text: str) -> int:
    """The 64-bit hash of a text by which it is chosen."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def choose(source: Source, scanned: int) -> list[str]:
    """Choose the distinct texts to hold out, in the order of the files. Raises UserError for too few documents."""
    candidates: dict[int, list[int]] = {}  # hash: copies, index of the first one
    texts: dict[int, str] = {}
    largest: list[int] = []  # a heap of the candidates' hashes, negated
    documents = chars = text_bytes = 0
    bound = 1 << 64  # the smallest hash that was discarded: none above it is a candidate any more
    for text in _documents(source, scanned):
        documents += 1
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
        digest = hash_of(text)
        if digest in candidates:
            candidates[digest][0] += 1
        elif digest < bound:
            candidates[digest], texts[digest] = [1, documents], text
            heapq.heappush(largest, -digest)
            chars += len(text)
            while len(largest) > _CANDIDATES or (chars > _CANDIDATE_CHARS and len(largest) > 1):
                bound = -heapq.heappop(largest)
                del candidates[bound]
                chars -= len(texts.pop(bound))
    if documents < FEWEST_DOCUMENTS:
        raise UserError(
            f"--dataset {source.name}: its {documents} documents are too few to hold some out for validation "
            f"({FEWEST_DOCUMENTS} at least): give a folder in which a file is named validation*, or "
            "the name of its split with --validation_split."
        )
    left = held_out_count(documents)
    if documents == scanned:
        total = _estimated_documents(source, documents, text_bytes) or documents
        left = min(held_out_count(total), documents // 10)
    chosen: list[int] = []
    for digest in sorted(candidates):
        copies = candidates[digest][0]
        if copies <= left:
            chosen.append(digest)
            left -= copies
    if not chosen:
        raise UserError(
            f"--dataset {source.name}: its {documents} documents are copies of a few texts, of which none can be held "
            "out for validation: give a folder in which a file is named validation*, or the name of its split with "
            "--validation_split."
        )
    return [texts[digest] for digest in sorted(chosen, key=lambda digest: candidates[digest][1])]


def _estimated_documents(source: Source, documents: int, text_bytes: int) -> int | None:
    """Estimate the number of documents of a source whose first `documents` documents have `text_bytes`.

    None if it does not know its files. They are treated as plain text, so that the estimate for compressed files is too
    low by their compression ratio.
    """
    files = files_of(source)
    return max(documents, sum(files.sizes) * documents // max(1, text_bytes)) if files else None


@dataclass(frozen=True)
class WithoutHeldOut(SourceWrapper):
    """A source in which held-out documents and their copies are replaced by empty strings."""

    source: Source
    held_out: tuple[HeldOut, ...]
    """First the documents held out of this source, if any; then those held out of other sources of its mixture."""

    @property
    def revision(self) -> str:
        """See `PinnedSource.revision`."""
        return revision_of(self.source)

    @property
    def own(self) -> HeldOut | None:
        """The documents held out of this source; None if they are all of others."""
        return next((each for each in self.held_out if each.name == self.name), None)

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        hashes = self._hashes()
        for item in self.source.read(shard, slices, part, start):
            yield "" if is_text(item) and hash_of(item) in hashes else item

    def describe(self) -> str:
        """See `DescribedSource`."""
        return f"{describe_source(self.source)}, without the documents held out"

    def fingerprint(self) -> str:
        """A hash of the source and of the held-out documents."""
        held_out = repr(sorted(self._hashes()))
        return hashlib.sha256(f"{self.source.fingerprint()} {held_out}".encode()).hexdigest()[:16]

    def file_list(self) -> Files | None:
        """See `FileSource.file_list`."""
        files = files_of(self.source)
        return files and replace(files, settings=f"{files.settings}, documents held out")

    def _hashes(self) -> frozenset[int]:
        first, *others = (each.hashes for each in self.held_out)
        return first.union(*others) if others else first  # `union` would copy the set for each block that is read


def held_out_state(source: Source) -> dict[str, Any]:
    """The state of the documents held out of a source, for a checkpoint; {} if there are none."""
    own = source.own if isinstance(source, WithoutHeldOut) else None
    return {"held_out": own.state()} if own else {}


def load_held_out_state(source: Source, saved: dict[str, Any]) -> list[str]:
    """Restore `held_out_state`, which old checkpoints lack. Returns lines for the log. Raises UserError."""
    if not isinstance(source, WithoutHeldOut) or source.own is None or "held_out" not in saved:
        return []
    return source.own.load_state(saved["held_out"], source.source)


def _documents(source: Source, limit: int | None) -> Iterator[str]:
    """Yield the first `limit` texts (None: all) in the order of the files, with a progress bar."""
    items = (item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0))
    texts = (item for item in items if is_text(item))
    what = f"{source.name}: choosing documents for validation"
    first = list(islice(texts, _FIRST))
    text_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in first)
    total = _estimated_documents(source, _FIRST, text_bytes) if len(first) == _FIRST else len(first)
    total = total if limit is None or total is None else min(limit, total)
    for count, text in enumerate(with_progress(chain(first, texts), what, "documents", total), 1):
        yield text
        if count == limit:
            return


def _cache_file(key: str) -> Path:
    return cache_dir() / f"held-out-{key}.json.gz"


def _read(path: Path) -> list[str] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None  # if it cannot be written either, `publish` raises
    try:
        return [str(text) for text in json.loads(gzip.decompress(content))]
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        path.unlink(missing_ok=True)  # a damaged cache file is written again
        return None
