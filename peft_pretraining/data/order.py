"""The order of documents: virtual lanes that exist whatever the number of ranks, workers or library versions.

A lane is an endless sequence of rows of token ids. The global sequence i is the next row of lane i mod `lanes`; rank r
of W owns the lanes l with l mod W = r, so every W that divides `lanes` sees the same global batches.

A unit is a shard, or with few shards every `slices`-th document of one. The units are dealt to the lanes once, by the
seed; a lane reads its units in an order of its own that is new each epoch, so each document is read once in a lane's
epoch. The shuffle buffer is a block: `shuffle_buffer` documents in a row are read and handed out in an order given by
(seed, lane, epoch, unit, block). Unlike a reservoir, whose content can be arbitrarily old, a block is found again from
its number. So the state of a lane is six integers, and no text or random state goes into a checkpoint; resuming reads
each lane's shard up to the block (decompressing only) and tokenises at most one batch twice.
"""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.permutation import hash64, permutation
from peft_pretraining.data.sources.documents import Damage, Source
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError

# Purposes of the hash, so that no two orders are derived from the same numbers.
_DEAL, _UNIT_ORDER, _BLOCK_ORDER = 1, 2, 3
# Unequal lanes finish their epochs at different times; with so many units each they differ by an eighth at most.
_UNITS_PER_UNEQUAL_LANE = 8
_DOCUMENTS_PER_ENCODING = 32

_logger = logging.getLogger(__name__)


class Lane(Protocol):
    """An endless sequence of rows."""

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The next `rows` rows (rows, max_length) and the number of ids in each (rows,)."""

    def state(self) -> dict[str, int]:
        """Where the next row begins."""


@dataclass(frozen=True)
class Unit:
    """Documents part, part + slices, ... of a shard."""

    shard: int
    slices: int
    part: int


class Position(NamedTuple):
    """Where a lane stands: what it hands out next."""

    epoch: int = 0
    unit: int = 0
    """Index in the epoch's order of the lane's units."""
    block: int = 0
    document: int = 0
    """Index in the shuffled block."""
    token: int = 0
    """Ids of that document that were handed out already (--packing pack)."""
    damaged: int = 0
    """Damages met before this block; each is counted in the first epoch only."""


class DamageCount:
    """What the lanes of a rank could not read, held against --damaged_limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Over the lanes of this rank."""
        with self._lock:
            return sum(self._counts.values())

    def of(self, lane: int) -> int:
        """Of one lane."""
        with self._lock:
            return self._counts.get(lane, 0)

    def restore(self, lane: int, count: int) -> None:
        """Set a lane's count, on resume."""
        with self._lock:
            self._counts[lane] = count

    def add(self, lane: int, damage: Damage) -> None:
        """Count one; past the limit raise UserError."""
        with self._lock:
            self._counts[lane] = self._counts.get(lane, 0) + 1
        _logger.warning("skipped %s: %s", damage.where, damage.reason)
        if self.total > self.limit:
            raise UserError(
                f"--dataset: more than {self.limit} damaged places, the last in {damage.where} ({damage.reason}). "
                "Replace the damaged files."
            )


def deal_units(shards: int, lanes: int, seed: int) -> list[list[Unit]]:
    """The units of each lane. Every document of every shard is in exactly one of them."""
    slices = max(1, math.ceil(lanes / shards))
    while shards * slices % lanes and shards * slices < _UNITS_PER_UNEQUAL_LANE * lanes:
        slices += 1
    units = [Unit(shard, slices, part) for shard in range(shards) for part in range(slices)]
    order = permutation(len(units), hash64(_DEAL, seed))
    return [[units[i] for i in order[lane::lanes]] for lane in range(lanes)]


@dataclass(frozen=True)
class RowFormat:
    """How documents become rows."""

    max_length: int
    packing: str
    """pad: a document a row, cut to max_length with eos last; pack: documents joined, each followed by eos."""
    tokenizer: Tokenizer

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The ids of each document as it goes into rows, with what begins and ends it; [] for one without ids."""
        # pad is the official format: T5's tokenizer cuts to max_length with the end-of-sequence token inside it.
        return self.tokenizer.encode_documents(texts, self.max_length if self.packing == "pad" else None)


class TextLane:
    """A lane over a source of documents."""

    def __init__(
        self,
        source: Source,
        units: Sequence[Unit],
        row_format: RowFormat,
        lane: int,
        seed: int,
        shuffle_buffer: int,
        damage: DamageCount,
        state: dict[str, int] | None = None,
    ) -> None:
        self._source, self._units, self._format = source, units, row_format
        self._lane, self._seed, self._shuffle_buffer, self._damage = lane, seed, shuffle_buffer, damage
        self._position = Position(**state) if state else Position()
        damage.restore(lane, self._position.damaged)
        self._rows = self._pad_rows() if row_format.packing == "pad" else self._pack_rows()

    def state(self) -> dict[str, int]:
        """See `Lane.state`."""
        return self._position._asdict()

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `Lane.take`. Raises UserError if the source cannot be read or has no documents for this lane."""
        batch = np.full((rows, self._format.max_length), self._format.tokenizer.pad_token_id, np.int32)
        lengths = np.empty(rows, np.int64)
        for i in range(rows):
            ids, self._position = next(self._rows)
            batch[i, : len(ids)] = ids
            lengths[i] = len(ids)
        return batch, lengths

    def _pad_rows(self) -> Iterator[tuple[list[int], Position]]:
        for ids, here in self._documents():
            if ids:
                yield ids, here._replace(document=here.document + 1)

    def _pack_rows(self) -> Iterator[tuple[list[int], Position]]:
        length = self._format.max_length
        used = self._position.token
        row: list[int] = []
        for ids, here in self._documents():
            while used < len(ids):
                piece = ids[used : used + length - len(row)]
                row.extend(piece)
                used += len(piece)
                if len(row) == length:
                    finished = used == len(ids)
                    yield row, here._replace(document=here.document + 1) if finished else here._replace(token=used)
                    row = []
            used = 0

    def _documents(self) -> Iterator[tuple[list[int], Position]]:
        """(ids of a document, its position), from the lane's position on, for ever."""
        first = self._position.document
        for block, texts in self._blocks(self._position):
            for start in range(first, len(texts), _DOCUMENTS_PER_ENCODING):
                encoded = self._format.documents(texts[start : start + _DOCUMENTS_PER_ENCODING])
                for document, ids in enumerate(encoded, start):
                    yield ids, block._replace(document=document)
            first = 0

    def _blocks(self, begin: Position) -> Iterator[tuple[Position, list[str]]]:
        """(position of a block, its documents in the order of handing out), from the block of `begin` on, for ever."""
        epoch, first_unit, block = begin.epoch, begin.unit, begin.block
        whole_epoch = first_unit == 0 and block == 0
        while True:
            found = False
            order = permutation(len(self._units), hash64(_UNIT_ORDER, self._seed, self._lane, epoch))
            for index in range(first_unit, len(order)):
                for position, texts in self._unit_blocks(Position(epoch, index, block), self._units[order[index]]):
                    found = found or bool(texts)
                    yield position, texts
                block = 0
            if whole_epoch and not found:
                raise UserError(
                    f"--dataset {self._source.name}: there is no document for lane {self._lane}. The data set is "
                    "empty, damaged, "
                    "or has fewer documents than --data_lanes; lower --data_lanes or give more data."
                )
            epoch, first_unit, whole_epoch = epoch + 1, 0, True

    def _unit_blocks(self, begin: Position, unit: Unit) -> Iterator[tuple[Position, list[str]]]:
        """The blocks of one unit from that of `begin` on."""
        size = self._shuffle_buffer
        stream = self._source.read(unit.shard, unit.slices, unit.part, begin.block * size)
        block = begin.block
        damaged = self._damage.of(self._lane)
        while items := list(islice(stream, size)):
            texts = []
            for item in items:
                if not isinstance(item, Damage):
                    # A document without text has no token to predict.
                    texts.extend([item] if item and not item.isspace() else [])
                elif begin.epoch == 0:
                    self._damage.add(self._lane, item)
            key = hash64(_BLOCK_ORDER, self._seed, self._lane, begin.epoch, begin.unit, block)
            yield begin._replace(block=block, damaged=damaged), [texts[i] for i in permutation(len(texts), key)]
            block += 1
            damaged = self._damage.of(self._lane)
