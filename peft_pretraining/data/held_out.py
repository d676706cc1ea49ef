"""Documents held out of the training split, where a data set has no validation split.

A document is held out for its content: of all distinct texts those with the smallest hashes (BLAKE2b, 8 bytes) are, so
that the same texts give the same split whatever the number of ranks and shards and the order of the files. They are
0.1 % of the documents, at least 500, and never more than 10 % or 10,000; copies count, and a text of which there are so
many that it would break the limit is not held out. Training passes over every document whose text is held out, wherever
it stands.

Up to a million documents are looked at in the order of the files (half as many over a network), with a progress bar; of
a larger data set the split is that of its beginning. What was found is kept in the cache, under the fingerprint of the
data set, for other ranks and for runs that resume.
"""

import gzip
import hashlib
import heapq
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peft_pretraining.data.cache import cache_dir, publish
from peft_pretraining.data.sources.documents import Damage, Files, LocalSource, MemorySource, Source, files_of, is_text
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, SourceOptions, TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.waiting import with_progress
from peft_pretraining.errors import UserError

FEWEST_DOCUMENTS = 64
"""With fewer a validation file is asked for."""
_LEAST, _MOST = 500, 10_000
_SCANNED, _SCANNED_OVER_NETWORK = 1_000_000, 500_000
# Candidates: as many again as can be held out, because a text of many copies may be left out.
_CANDIDATES = 2 * max(_LEAST, _SCANNED // 1000)
_CANDIDATE_CHARS = 1 << 29
_FORMAT = 1


def open_split(
    dataset: str, split: str, options: SourceOptions = DEFAULT_OPTIONS
) -> Source | TokenFiles | TokenMixture:
    """Split "train" or "validation" of `--dataset`; if it has no validation split, documents of train are held out.

    They share no text that was held out. Raises UserError.
    """
    kind = find_kind(dataset)
    opened = open_dataset(dataset, split, options)
    if not isinstance(kind, TextKind) or "validation" not in kind.splits:
        assert opened is not None
        return opened
    if split == "validation":
        if opened is not None:
            return opened
        train = kind.open(dataset, "train", options)
    else:
        assert opened is not None and not isinstance(opened, TokenFiles | TokenMixture)
        if kind.open(dataset, "validation", options) is not None:
            return opened
        train = opened
    assert train is not None
    parts = hold_out(train, options, _SCANNED_OVER_NETWORK if kind.needs_network else _SCANNED)
    return parts[0] if split == "train" else parts[1]


def hold_out(
    source: Source, options: SourceOptions = DEFAULT_OPTIONS, scanned: int = _SCANNED
) -> tuple[Source, Source]:
    """(what is trained on, what is held out) of a source, of which `scanned` documents are looked at.

    `options` are those it was opened with. Raises UserError for fewer than 64 documents.
    """
    settings = (options.config, options.revision, options.train_split, options.text_column, options.text_unit)
    # A fingerprint may be that of sizes alone, and equal for files of other text.
    stamp = source.stamp() if isinstance(source, LocalSource) else ""
    identity = repr((_FORMAT, source.fingerprint(), settings, scanned, stamp))
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = cache_dir() / f"held-out-{key}.json.gz"
    texts = _read(path)
    if texts is None:
        found = json.dumps(choose(source, scanned)).encode()
        texts = json.loads(gzip.decompress(publish(path, gzip.compress(found, mtime=0))))
    return WithoutHeldOut(source, frozenset(map(hash_of, texts))), MemorySource(source.name, texts)


def held_out_count(documents: int) -> int:
    """How many of so many documents are held out at most."""
    return min(max(_LEAST, documents // 1000), documents // 10, _MOST)


def hash_of(text: str) -> int:
    """By which a text is chosen."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def choose(source: Source, scanned: int) -> list[str]:
    """The distinct texts to hold out, in the order of the files. Raises UserError for too few documents."""
    candidates: dict[int, list[int]] = {}  # hash: copies, place in the order
    texts: dict[int, str] = {}
    largest: list[int] = []  # a heap of the candidates' hashes, negated
    documents = chars = 0
    bound = 1 << 64  # of what was given up the smallest hash: nothing beyond it comes back
    for text in _documents(source, scanned):
        documents += 1
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
            f"({FEWEST_DOCUMENTS} at least): name its split with --validation_split, or put a file named validation* "
            "beside it."
        )
    left = held_out_count(documents)
    chosen: list[int] = []
    for digest in sorted(candidates):
        copies = candidates[digest][0]
        if copies <= left:
            chosen.append(digest)
            left -= copies
    if not chosen:
        raise UserError(
            f"--dataset {source.name}: its {documents} documents are copies of a few texts, of which none can be held "
            "out for validation: name its split with --validation_split, or put a file named validation* beside it."
        )
    return [texts[digest] for digest in sorted(chosen, key=lambda digest: candidates[digest][1])]


@dataclass(frozen=True)
class WithoutHeldOut:
    """A source in which nothing stands in the place of held-out documents and their copies."""

    source: Source
    held_out: frozenset[int]
    """Hashes of texts."""

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
        for item in self.source.read(shard, slices, part, start):
            yield "" if is_text(item) and hash_of(item) in self.held_out else item

    def fingerprint(self) -> str:
        """Of the source and of what is held out."""
        held_out = repr(sorted(self.held_out))
        return hashlib.sha256(f"{self.source.fingerprint()} {held_out}".encode()).hexdigest()[:16]

    def file_list(self) -> Files | None:
        """See `FileSource.file_list`."""
        files = files_of(self.source)
        return files and replace(files, settings=f"{files.settings}, documents held out")


def _documents(source: Source, limit: int) -> Iterator[str]:
    """The first texts in the order of the files."""
    items = (item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0))
    texts = (item for item in items if is_text(item))
    what = f"{source.name}: choosing documents for validation"
    for count, text in enumerate(with_progress(texts, what, "documents", limit), 1):
        yield text
        if count == limit:
            return


def _read(path: Path) -> list[str] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None  # if it cannot be written either, that is said
    try:
        return [str(text) for text in json.loads(gzip.decompress(content))]
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        path.unlink(missing_ok=True)  # a damaged cache file is made again
        return None
