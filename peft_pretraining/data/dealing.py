"""Deal the shards of a source (as a rule its files) to the logical shards of a run.

A unit is a shard, or with few shards every `slices`-th document of one. The units are dealt to the logical shards once,
by the seed. Where each logical shard has many units it does no harm if one of them is empty: of local files only the
largest of each logical shard is probed, and all of them only if a logical shard would have nothing but empty ones. With
fewer shards the beginning of each is probed, and a shard whose slices do not all hold documents goes into the pool: it
is empty, short, unreadable, or has a document in every second line only. The documents of the pool are numbered across
its shards, whatever lies between them, and dealt one by one, so that such a file costs its own documents and nothing
else. Shards whose files are of very unequal size are cut in proportion, so that no logical shard repeats a small file
while another has not finished a large one.

The cut is saved with a run's state, so that replacing a damaged file does not change which documents the other logical
shards read.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from peft_pretraining.data.permutation import hash64, permutation
from peft_pretraining.data.sources.documents import Damage, Source, files_of, is_text

# Domain of the hash, unlike those of `order`.
_DEAL = 1
# Logical shards with unequal numbers of units end their epochs at different times; with 8 units each by an eighth.
_UNITS_PER_UNEQUAL_SHARD = 8
# A slice holds documents if 8 of its first 16 items are documents.
_PROBED_ITEMS, _PROBED_DOCUMENTS = 16, 8
# A shard holds a document if one of its first 1024 items is a document.
_PROBED_FOR_ONE = 1024
# Files whose sizes differ by a smaller factor are treated as equal ones.
_UNEQUAL_SIZES = 4.0
# Beginnings are read concurrently, because over a network the wait for each is long.
_READERS = 16
_NAMED_FILES = 3

POOLED = 0
"""Given instead of a shard's number of slices: the shard is in the pool."""


@dataclass(frozen=True)
class Unit:
    """Documents part, part + slices, ... of a shard; the shard with index `Source.shards` is the pool."""

    shard: int
    slices: int
    part: int


def even_slices(shards: int, logical_shards: int) -> int:
    """The number of slices into which each of equally large shards is cut."""
    slices = max(1, math.ceil(logical_shards / shards))
    while shards * slices % logical_shards and shards * slices < _UNITS_PER_UNEQUAL_SHARD * logical_shards:
        slices += 1
    return slices


def cut_shards(source: Source, logical_shards: int, seed: int | None = None) -> tuple[int, ...]:
    """The number of slices of each shard, or POOLED. Reads the beginnings of the shards where there are few.

    Many shards are cut as if all held documents, unless a logical shard would have no document when dealt by `seed`.
    """
    shards = source.shards
    regular = list(range(shards))
    with ThreadPoolExecutor(min(shards, _READERS)) as readers:
        if shards >= _UNITS_PER_UNEQUAL_SHARD * logical_shards:
            cut = [even_slices(shards, logical_shards)] * shards
            if seed is None or _each_finds_documents(source, deal_units(cut, logical_shards, seed), readers):
                return tuple(cut)
            holds = list(readers.map(partial(_holds_a_document, source), regular))
            regular = [shard for shard, good in zip(regular, holds, strict=True) if good]
            cut = [even_slices(len(regular), logical_shards)] * len(regular) if regular else []
        while 0 < len(regular) < _UNITS_PER_UNEQUAL_SHARD * logical_shards:
            cut = _cut_regular(source, regular, logical_shards)
            holds = list(readers.map(partial(_holds_documents, source), regular, cut))
            if all(holds):
                break
            # The remaining ones are cut into more slices, which have to hold documents as well.
            regular = [shard for shard, good in zip(regular, holds, strict=True) if good]
    slices = [POOLED] * shards
    for shard, count in zip(regular, cut if regular else [], strict=True):
        slices[shard] = count
    return tuple(slices)


def _each_finds_documents(source: Source, dealt: Sequence[Sequence["Unit"]], readers: ThreadPoolExecutor) -> bool:
    """Whether each logical shard has a unit with documents; True for a source on a network, which is not probed."""
    files = files_of(source)
    if files is None:
        return True

    def finds(units: Sequence[Unit]) -> bool:
        largest_first = sorted({unit.shard for unit in units}, key=lambda shard: (-files.sizes[shard], shard))
        return any(_holds_a_document(source, shard) for shard in largest_first)

    return all(readers.map(finds, dealt))


def _holds_a_document(source: Source, shard: int) -> bool:
    return any(is_text(item) for item in islice(source.read(shard, 1, 0, 0), _PROBED_FOR_ONE))


def _cut_regular(source: Source, shards: Sequence[int], logical_shards: int) -> list[int]:
    files = files_of(source)
    sizes = [files.sizes[shard] for shard in shards] if files else []
    if not sizes or max(sizes) <= _UNEQUAL_SIZES * min(sizes):
        return [even_slices(len(shards), logical_shards)] * len(shards)
    unit = sum(sizes) / (_UNITS_PER_UNEQUAL_SHARD * logical_shards)
    return [min(logical_shards, round(size / unit)) for size in sizes]


def _holds_documents(source: Source, shard: int, slices: int) -> bool:
    """Whether the beginning of every slice has documents."""
    if slices == POOLED:
        return False
    found = [0] * slices
    for index, item in enumerate(islice(source.read(shard, 1, 0, 0), _PROBED_ITEMS * slices)):
        found[index % slices] += is_text(item)
    return min(found) >= _PROBED_DOCUMENTS


def deal_units(cut: Sequence[int], logical_shards: int, seed: int) -> list[list[Unit]]:
    """The units of each logical shard, of shards cut by `cut_shards`. Every document is in exactly one unit."""
    regular = [shard for shard, slices in enumerate(cut) if slices != POOLED]
    even = len({cut[shard] for shard in regular}) <= 1
    # Where shards are unequal each logical shard has its share of each large shard, besides some of the smaller units,
    # which are of about equal size.
    dealt = [shard for shard in regular if even or cut[shard] < logical_shards]
    units = [Unit(shard, cut[shard], part) for shard in dealt for part in range(cut[shard])]
    order = permutation(len(units), hash64(_DEAL, seed))
    lists = [[units[i] for i in order[index::logical_shards]] for index in range(logical_shards)]
    for index, own in enumerate(lists):
        own += [Unit(shard, logical_shards, index) for shard in regular if shard not in dealt]
        if len(regular) < len(cut):
            own.append(Unit(len(cut), logical_shards, index))
    return lists


@dataclass(frozen=True)
class DealtSource:
    """A source whose pooled shards form one more shard, in which only documents and damage are numbered."""

    source: Source
    cut: Sequence[int]
    _counts: dict[int, int] = field(default_factory=dict, compare=False)
    """How many items of each pooled shard are numbered, once it was read to its end; later readers skip over it."""

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        if shard < len(self.cut):
            yield from self.source.read(shard, slices, part, start)
            return
        yield from self._pool(slices, part, part + start * slices)

    def why_nothing(self, units: Sequence[Unit], index: int) -> str:
        """The error text for logical shard `index`, which found no document in its units."""
        begin = f"--dataset {self.source.name}: there is no document for logical shard {index}"
        if any(unit.shard == len(self.cut) or unit.slices > 1 for unit in units):
            return (
                f"{begin}. The data set is empty, damaged, or has fewer documents than --data_lanes; lower "
                "--data_lanes or give more data."
            )
        files = files_of(self.source)
        names = [files.names[unit.shard] if files else f"shard {unit.shard}" for unit in units]
        more = f" and {len(names) - _NAMED_FILES} more" if len(names) > _NAMED_FILES else ""
        return (
            f"{begin}: what it reads, {', '.join(names[:_NAMED_FILES])}{more} of {self.source.shards}, holds none. "
            "Replace these files or remove them, or lower --data_lanes."
        )

    def _pool(self, slices: int, part: int, first: int) -> Iterator[str | Damage]:
        """The items numbered part, part + slices, ... in the pool, from number `first` on."""
        number = 0
        for shard, cut in enumerate(self.cut):
            if cut != POOLED:
                continue
            count = self._counts.get(shard)
            next_own = max(number, first)
            next_own += (part - next_own) % slices
            if count is not None and next_own >= number + count:
                number += count
                continue
            begin = number
            for item in self.source.read(shard, 1, 0, 0):
                if isinstance(item, Damage) or is_text(item):
                    if number % slices == part and number >= first:
                        yield item
                    number += 1
            self._counts[shard] = number - begin
