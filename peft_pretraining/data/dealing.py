"""How the shards of a source are dealt to lanes.

A unit is a shard, or with few shards every `slices`-th document of one. The units are dealt to the lanes once, by the
seed. Where each lane has many units it does no harm if one of them is empty; of files on this machine the largest of
each lane is looked at, and only if a lane has nothing but empty ones all are. With fewer shards the beginning of each
is looked at, and a shard whose slices do not all hold documents joins the pool: it is empty, short, unreadable, or its
documents stand at every second line. The documents of the pool are counted through, whatever lies between them, and
dealt one by one, so that such a file costs its own documents and nothing else. Shards whose files are of very unequal
size are cut in proportion, so that no lane reads a small file over and over while another reads a large one once.

The cut is part of a run's state: a damaged file that is replaced by a good one does not deal the others anew.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from peft_pretraining.data.permutation import hash64, permutation
from peft_pretraining.data.sources.documents import Damage, Source, files_of, is_text

# Purpose of the hash, unlike those of `order`.
_DEAL = 1
# Unequal lanes finish their epochs at different times; with so many units each they differ by an eighth at most.
_UNITS_PER_UNEQUAL_LANE = 8
# Of the first places of each slice so many have to be documents.
_PROBED_PLACES, _PROBED_DOCUMENTS = 16, 8
# Where any document will do it has to be among so many places.
_PROBED_FOR_ONE = 1024
# Files whose sizes differ by less are taken for equal ones.
_UNEQUAL_SIZES = 4.0
# Beginnings are read at the same time, because over a network the wait for each is long.
_READERS = 16
_NAMED_FILES = 3

POOLED = 0
"""In the place of a shard's number of slices: it belongs to the pool."""


@dataclass(frozen=True)
class Unit:
    """Documents part, part + slices, ... of a shard; shard `Source.shards` is the pool."""

    shard: int
    slices: int
    part: int


def even_slices(shards: int, lanes: int) -> int:
    """The number of slices of each of equal shards."""
    slices = max(1, math.ceil(lanes / shards))
    while shards * slices % lanes and shards * slices < _UNITS_PER_UNEQUAL_LANE * lanes:
        slices += 1
    return slices


def cut_shards(source: Source, lanes: int, seed: int | None = None) -> tuple[int, ...]:
    """The number of slices of each shard, or POOLED. Reads the beginnings of few shards.

    Of many shards they are cut as if all held documents, unless dealt by `seed` a lane would have none of them.
    """
    shards = source.shards
    regular = list(range(shards))
    with ThreadPoolExecutor(min(shards, _READERS)) as readers:
        if shards >= _UNITS_PER_UNEQUAL_LANE * lanes:
            cut = [even_slices(shards, lanes)] * shards
            if seed is None or _each_finds_documents(source, deal_units(cut, lanes, seed), readers):
                return tuple(cut)
            holds = list(readers.map(partial(_holds_a_document, source), regular))
            regular = [shard for shard, good in zip(regular, holds, strict=True) if good]
            cut = [even_slices(len(regular), lanes)] * len(regular) if regular else []
        while 0 < len(regular) < _UNITS_PER_UNEQUAL_LANE * lanes:
            cut = _cut_regular(source, regular, lanes)
            holds = list(readers.map(partial(_holds_documents, source), regular, cut))
            if all(holds):
                break
            # Those that are left are cut into more slices, which have to hold documents as well.
            regular = [shard for shard, good in zip(regular, holds, strict=True) if good]
    slices = [POOLED] * shards
    for shard, count in zip(regular, cut if regular else [], strict=True):
        slices[shard] = count
    return tuple(slices)


def _each_finds_documents(source: Source, dealt: Sequence[Sequence["Unit"]], readers: ThreadPoolExecutor) -> bool:
    """Whether each lane has a shard with documents, as far as that is known without a network."""
    files = files_of(source)
    if files is None:
        return True

    def finds(lane: Sequence[Unit]) -> bool:
        largest_first = sorted({unit.shard for unit in lane}, key=lambda shard: (-files.sizes[shard], shard))
        return any(_holds_a_document(source, shard) for shard in largest_first)

    return all(readers.map(finds, dealt))


def _holds_a_document(source: Source, shard: int) -> bool:
    return any(is_text(item) for item in islice(source.read(shard, 1, 0, 0), _PROBED_FOR_ONE))


def _cut_regular(source: Source, shards: Sequence[int], lanes: int) -> list[int]:
    files = files_of(source)
    sizes = [files.sizes[shard] for shard in shards] if files else []
    if not sizes or max(sizes) <= _UNEQUAL_SIZES * min(sizes):
        return [even_slices(len(shards), lanes)] * len(shards)
    unit = sum(sizes) / (_UNITS_PER_UNEQUAL_LANE * lanes)
    return [min(lanes, round(size / unit)) for size in sizes]


def _holds_documents(source: Source, shard: int, slices: int) -> bool:
    """Whether every slice has documents from its beginning on."""
    if slices == POOLED:
        return False
    found = [0] * slices
    for place, item in enumerate(islice(source.read(shard, 1, 0, 0), _PROBED_PLACES * slices)):
        found[place % slices] += is_text(item)
    return min(found) >= _PROBED_DOCUMENTS


def deal_units(cut: Sequence[int], lanes: int, seed: int) -> list[list[Unit]]:
    """The units of each lane, of shards cut as `cut_shards` says. Every document is in exactly one of them."""
    regular = [shard for shard, slices in enumerate(cut) if slices != POOLED]
    even = len({cut[shard] for shard in regular}) <= 1
    # Of unequal shards a lane reads its share of each large one, and some of the smaller units, which are of about
    # equal size.
    dealt = [shard for shard in regular if even or cut[shard] < lanes]
    units = [Unit(shard, cut[shard], part) for shard in dealt for part in range(cut[shard])]
    order = permutation(len(units), hash64(_DEAL, seed))
    lists = [[units[i] for i in order[lane::lanes]] for lane in range(lanes)]
    for lane, own in enumerate(lists):
        own += [Unit(shard, lanes, lane) for shard in regular if shard not in dealt]
        if len(regular) < len(cut):
            own.append(Unit(len(cut), lanes, lane))
    return lists


@dataclass(frozen=True)
class DealtSource:
    """A source whose pooled shards are one more shard, in which only documents and damage have a number."""

    source: Source
    cut: Sequence[int]
    _counts: dict[int, int] = field(default_factory=dict, compare=False)
    """What has a number in each shard of the pool that was read to its end: others find theirs without reading it."""

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        if shard < len(self.cut):
            yield from self.source.read(shard, slices, part, start)
            return
        yield from self._pool(slices, part, part + start * slices)

    def why_nothing(self, units: Sequence[Unit], lane: int) -> str:
        """The sentence for a lane that found no document in its units."""
        begin = f"--dataset {self.source.name}: there is no document for lane {lane}"
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
        """What is numbered part, part + slices, ... in the pool, from the number `first` on."""
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
