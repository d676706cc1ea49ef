"""The order of documents, which does not depend on the number of ranks, on workers or on library versions.

The data is divided into `--data_lanes` logical shards. A logical shard is a sequence of rows of token ids, endless
where the data is repeated; one that has ended gives rows of length 0. Sequence i of all global batches is the next row
of logical shard i mod L (L: their number), and rank r of W reads the logical shards l with l mod W = r. So every W that
divides L sees the same global batches.

The source has shards of its own, as a rule its files. A unit is such a shard, or a part of one; the units are dealt to
the logical shards once, by the seed (`dealing`). A logical shard reads its units in an order that is new each epoch, so
that each document is read once in an epoch of its logical shard. It shuffles in blocks: `shuffle_buffer` consecutive
documents are read, and handed out in an order given by (seed, logical shard, epoch, unit, block). Unlike the content of
a reservoir, which can be arbitrarily old, a block is found again by its index. So the state of a logical shard is six
integers, and a checkpoint needs no text and no random state; resuming reads each unit up to the block (decompressing
only) and tokenizes at most one batch twice.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.dealing import DealtSource, Unit
from peft_pretraining.data.permutation import hash64, permutation
from peft_pretraining.data.sources.documents import Damage, is_text
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError

# Domains of the hash, so that no two orders are derived from the same integers.
_UNIT_ORDER, _BLOCK_ORDER = 2, 3
_DOCUMENTS_PER_ENCODING = 32

_logger = logging.getLogger(__name__)


LogicalShardState = dict[str, Any]
"""JSON-able; `epoch` counts how often the logical shard has been read to its end."""


class LogicalShard(Protocol):
    """A sequence of rows."""

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The next rows (rows, max_length) and the number of ids in each (rows,), 0 beyond the end."""

    def state(self) -> LogicalShardState:
        """The position of the next row."""

    @property
    def ended(self) -> bool:
        """Whether there is no further row; always False where the data is repeated. May read ahead."""


@dataclass(frozen=True)
class LogicalShardOrder:
    """The values that decide the order of one logical shard, beside its units."""

    index: int
    """Of the logical shard."""
    seed: int
    shuffle_buffer: int
    repeat: bool = True
    """Whether the logical shard begins again where it ends."""
    source: int = 0
    """Index of the source of a mixture that it reads; damages are counted for each source."""


class Position(NamedTuple):
    """The position of a logical shard: what it hands out next."""

    epoch: int = 0
    unit: int = 0
    """Index in the epoch's order of the logical shard's units."""
    block: int = 0
    document: int = 0
    """Index in the shuffled block."""
    token: int = 0
    """Ids of that document that were handed out already (--packing pack)."""
    damaged: int = 0
    """Damaged documents before this block; each is counted in the first epoch only."""


class DamageCount:
    """Counts what the logical shards of a rank could not read; raises UserError past --damaged_limit."""

    def __init__(self, limit: int, advice: str = "go on with --continue_from auto") -> None:
        """advice: the advice of the error, for when the files are repaired."""
        self.limit, self._advice = limit, advice
        self._counts: dict[tuple[int, int], int] = {}  # by (source, index of the logical shard)
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """The count over all logical shards of this rank."""
        with self._lock:
            return sum(self._counts.values())

    def of(self, index: int, source: int = 0) -> int:
        """The count of logical shard `index`."""
        with self._lock:
            return self._counts.get((source, index), 0)

    def restore(self, index: int, count: int, source: int = 0) -> None:
        """Set the count of logical shard `index`, on resume."""
        with self._lock:
            self._counts[source, index] = count

    def add(self, damage: Damage, index: int = 0, source: int = 0) -> None:
        """Count one damaged document of logical shard `index`; raises UserError past the limit."""
        with self._lock:
            self._counts[source, index] = self._counts.get((source, index), 0) + 1
        _logger.warning("skipped %s: %s", damage.where, damage.reason)
        if self.total > self.limit:
            raise UserError(
                f"--dataset: more than {self.limit} damaged places (--damaged_limit {self.limit}), the last in "
                f"{damage.where} ({damage.reason}). Replace the damaged files and {self._advice}, or "
                "give a higher --damaged_limit."
            )


@dataclass(frozen=True)
class RowFormat:
    """The conversion of documents to rows."""

    max_length: int
    packing: str
    """pad: a document a row, cut to max_length with eos last; pack: documents concatenated, each followed by eos."""
    tokenizer: Tokenizer

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The ids of each document with its bos and eos; an empty list for a document without a target.

        That is a document without a token of its own (zero-width characters, the text of a special piece), and with
        padding also a row of one id.
        """
        # pad is the official format: T5's tokenizer cuts to max_length with the end-of-sequence token inside it.
        whole = self.tokenizer.encode_documents(texts, self.max_length if self.packing == "pad" else None)
        return [ids if len(ids) > 1 or self.packing == "pack" else [] for ids in whole]


Row = tuple[list[int], Position]
"""Ids, and the position behind them."""


class TextLogicalShard:
    """A logical shard over a source of documents."""

    def __init__(
        self,
        source: DealtSource,
        units: Sequence[Unit],
        row_format: RowFormat,
        order: LogicalShardOrder,
        damage: DamageCount,
        state: LogicalShardState | None = None,
    ) -> None:
        self._source, self._units, self._format = source, units, row_format
        self._order, self._damage = order, damage
        self._position = Position(**state) if state else Position()
        damage.restore(order.index, self._position.damaged, order.source)
        self._found = False  # whether the epoch had a document so far
        self._rows = self._pad_rows() if row_format.packing == "pad" else self._pack_rows()
        self._ahead: Row | None = None

    def state(self) -> LogicalShardState:
        """See `LogicalShard.state`."""
        return self._position._asdict()

    @property
    def ended(self) -> bool:
        """See `LogicalShard.ended`."""
        if self._order.repeat:
            return False
        self._ahead = self._ahead or next(self._rows, None)
        return self._ahead is None

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `LogicalShard.take`. Raises UserError if the source cannot be read or has no documents for it."""
        batch = np.full((rows, self._format.max_length), self._format.tokenizer.pad_token_id, np.int32)
        lengths = np.zeros(rows, np.int64)
        for i in range(rows):
            row, self._ahead = self._ahead or next(self._rows, None), None
            if row is not None:
                ids, self._position = row
                batch[i, : len(ids)] = ids
                lengths[i] = len(ids)
        return batch, lengths

    def _pad_rows(self) -> Iterator[Row]:
        for ids, here in self._documents():
            if ids:
                yield ids, here._replace(document=here.document + 1)

    def _pack_rows(self) -> Iterator[Row]:
        length = self._format.max_length
        used = self._position.token
        row: list[int] = []
        after = self._position
        for ids, here in self._documents():
            after = here._replace(document=here.document + 1)
            while used < len(ids):
                piece = ids[used : used + length - len(row)]
                row.extend(piece)
                used += len(piece)
                if len(row) == length:
                    yield row, after if used == len(ids) else here._replace(token=used)
                    row = []
            used = 0
        if len(row) > 1:  # the end of the data; one id alone predicts nothing
            yield row, after

    def _documents(self) -> Iterator[Row]:
        """(ids of a document, its position), from the current position on."""
        first = self._position.document
        for block, texts in self._blocks(self._position):
            for start in range(first, len(texts), _DOCUMENTS_PER_ENCODING):
                encoded = self._format.documents(texts[start : start + _DOCUMENTS_PER_ENCODING])
                for document, ids in enumerate(encoded, start):
                    if ids:
                        self._found = True
                        yield ids, block._replace(document=document)
            first = 0

    def _blocks(self, begin: Position) -> Iterator[tuple[Position, list[str]]]:
        """(position of a block, its documents in shuffled order), from the block of `begin` on."""
        epoch, first_unit, block = begin.epoch, begin.unit, begin.block
        whole_epoch = not any(begin[1:5])
        while True:
            self._found = False
            order = permutation(len(self._units), hash64(_UNIT_ORDER, self._order.seed, self._order.index, epoch))
            for index in range(first_unit, len(order)):
                yield from self._unit_blocks(Position(epoch, index, block), self._units[order[index]])
                block = 0
            if not self._order.repeat:
                return
            if whole_epoch and not self._found:
                raise UserError(self._source.why_nothing(self._units, self._order.index))
            epoch, first_unit, whole_epoch = epoch + 1, 0, True

    def _unit_blocks(self, begin: Position, unit: Unit) -> Iterator[tuple[Position, list[str]]]:
        """The blocks of one unit from that of `begin` on."""
        size, order = self._order.shuffle_buffer, self._order
        stream = self._source.read(unit.shard, unit.slices, unit.part, begin.block * size)
        block = begin.block
        damaged = self._damage.of(order.index, order.source)
        while items := list(islice(stream, size)):
            if begin.epoch == 0:
                for item in items:
                    if isinstance(item, Damage):
                        self._damage.add(item, order.index, order.source)
            texts = [item for item in items if is_text(item)]
            key = hash64(_BLOCK_ORDER, order.seed, order.index, begin.epoch, begin.unit, block)
            yield begin._replace(block=block, damaged=damaged), [texts[i] for i in permutation(len(texts), key)]
            block += 1
            damaged = self._damage.of(order.index, order.source)
