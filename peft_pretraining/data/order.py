"""The order of documents: virtual lanes that exist whatever the number of ranks, workers or library versions.

A lane is a sequence of rows of token ids, endless where the data is repeated. The global sequence i is the next row of
lane i mod `lanes`; rank r of W owns the lanes l with l mod W = r, so every W that divides `lanes` sees the same global
batches. A lane that has ended gives rows of length 0.

A unit is a shard, or a part of one; the units are dealt to the lanes once, by the seed (`dealing`). A lane reads its
units in an order of its own that is new each epoch, so each document is read once in a lane's epoch. The shuffle buffer
is a block: `shuffle_buffer` documents in a row are read and handed out in an order given by (seed, lane, epoch, unit,
block). Unlike a reservoir, whose content can be arbitrarily old, a block is found again from its number. So the state
of a lane is six integers, and no text or random state goes into a checkpoint; resuming reads each lane's shard up to
the block (decompressing only) and tokenises at most one batch twice.
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

# Purposes of the hash, so that no two orders are derived from the same numbers.
_UNIT_ORDER, _BLOCK_ORDER = 2, 3
_DOCUMENTS_PER_ENCODING = 32

_logger = logging.getLogger(__name__)


LaneState = dict[str, Any]
"""JSON-able; `epoch` counts how often the data has been begun anew."""


class Lane(Protocol):
    """A sequence of rows."""

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The next `rows` rows (rows, max_length) and the number of ids in each (rows,), 0 beyond the lane's end."""

    def state(self) -> LaneState:
        """Where the next row begins."""

    @property
    def ended(self) -> bool:
        """Whether there is no further row; never where the data is repeated. May read ahead."""


@dataclass(frozen=True)
class LaneOrder:
    """What decides the order of one lane, beside its units."""

    lane: int
    seed: int
    shuffle_buffer: int
    repeat: bool = True
    """Whether the lane begins again where it ends."""
    source: int = 0
    """Which of the sources of a mixture it reads; their damages are counted apart."""


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

    def __init__(self, limit: int, what_then: str = "go on with --continue_from auto") -> None:
        """what_then: what a person does once the files are mended."""
        self.limit, self._what_then = limit, what_then
        self._counts: dict[tuple[int, int], int] = {}  # by (source, lane)
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Over the lanes of this rank."""
        with self._lock:
            return sum(self._counts.values())

    def of(self, lane: int, source: int = 0) -> int:
        """Of one lane."""
        with self._lock:
            return self._counts.get((source, lane), 0)

    def restore(self, lane: int, count: int, source: int = 0) -> None:
        """Set a lane's count, on resume."""
        with self._lock:
            self._counts[source, lane] = count

    def add(self, damage: Damage, lane: int = 0, source: int = 0) -> None:
        """Count one; past the limit raise UserError."""
        with self._lock:
            self._counts[source, lane] = self._counts.get((source, lane), 0) + 1
        _logger.warning("skipped %s: %s", damage.where, damage.reason)
        if self.total > self.limit:
            raise UserError(
                f"--dataset: more than {self.limit} damaged places (--damaged_limit {self.limit}), the last in "
                f"{damage.where} ({damage.reason}). Replace the damaged files and {self._what_then}, or "
                "give a higher --damaged_limit."
            )


@dataclass(frozen=True)
class RowFormat:
    """How documents become rows."""

    max_length: int
    packing: str
    """pad: a document a row, cut to max_length with eos last; pack: documents joined, each followed by eos."""
    tokenizer: Tokenizer

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The ids of each document as it goes into rows, with what begins and ends it; none for one that has no target.

        That is one without a token of its own (zero-width characters, the text of a special piece), and with padding a
        row of one id.
        """
        # pad is the official format: T5's tokenizer cuts to max_length with the end-of-sequence token inside it.
        whole = self.tokenizer.encode_documents(texts, self.max_length if self.packing == "pad" else None)
        return [ids if len(ids) > 1 or self.packing == "pack" else [] for ids in whole]


Row = tuple[list[int], Position]
"""Ids, and where the lane stands after them."""


class TextLane:
    """A lane over a source of documents."""

    def __init__(
        self,
        source: DealtSource,
        units: Sequence[Unit],
        row_format: RowFormat,
        order: LaneOrder,
        damage: DamageCount,
        state: LaneState | None = None,
    ) -> None:
        self._source, self._units, self._format = source, units, row_format
        self._order, self._damage = order, damage
        self._position = Position(**state) if state else Position()
        damage.restore(order.lane, self._position.damaged, order.source)
        self._found = False  # a document, since the lane or an epoch began
        self._rows = self._pad_rows() if row_format.packing == "pad" else self._pack_rows()
        self._ahead: Row | None = None

    def state(self) -> LaneState:
        """See `Lane.state`."""
        return self._position._asdict()

    @property
    def ended(self) -> bool:
        """See `Lane.ended`."""
        if self._order.repeat:
            return False
        self._ahead = self._ahead or next(self._rows, None)
        return self._ahead is None

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `Lane.take`. Raises UserError if the source cannot be read or has no documents for this lane."""
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
        """(ids of a document, its position), from the lane's position on."""
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
        """(position of a block, its documents in the order of handing out), from the block of `begin` on."""
        epoch, first_unit, block = begin.epoch, begin.unit, begin.block
        whole_epoch = not any(begin[1:5])
        while True:
            self._found = False
            order = permutation(len(self._units), hash64(_UNIT_ORDER, self._order.seed, self._order.lane, epoch))
            for index in range(first_unit, len(order)):
                yield from self._unit_blocks(Position(epoch, index, block), self._units[order[index]])
                block = 0
            if not self._order.repeat:
                return
            if whole_epoch and not self._found:
                raise UserError(self._source.why_nothing(self._units, self._order.lane))
            epoch, first_unit, whole_epoch = epoch + 1, 0, True

    def _unit_blocks(self, begin: Position, unit: Unit) -> Iterator[tuple[Position, list[str]]]:
        """The blocks of one unit from that of `begin` on."""
        size, order = self._order.shuffle_buffer, self._order
        stream = self._source.read(unit.shard, unit.slices, unit.part, begin.block * size)
        block = begin.block
        damaged = self._damage.of(order.lane, order.source)
        while items := list(islice(stream, size)):
            if begin.epoch == 0:
                for item in items:
                    if isinstance(item, Damage):
                        self._damage.add(item, order.lane, order.source)
            texts = [item for item in items if is_text(item)]
            key = hash64(_BLOCK_ORDER, order.seed, order.lane, begin.epoch, begin.unit, block)
            yield begin._replace(block=block, damaged=damaged), [texts[i] for i in permutation(len(texts), key)]
            block += 1
            damaged = self._damage.of(order.lane, order.source)
