"""The order of token ids: a logical shard over windows of the files.

A row is a window of `max_length` consecutive ids; windows do not overlap, and the rest at the end of a file, shorter
than a row, is never trained on. Window w belongs to logical shard w mod `logical_shards`. A logical shard visits its
windows in an order that is new each epoch and computed element by element, so that its state is two integers. Every id
is checked against the vocabulary as it is handed out.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.order import LogicalShardState
from peft_pretraining.data.permutation import hash64, permute
from peft_pretraining.data.sources.mapped_tokens import TokenFiles
from peft_pretraining.errors import UserError

_WINDOW_ORDER = 4
_BLOCK = 1024


class TokenLogicalShard:
    """A logical shard over windows of token files; see `order.LogicalShard`."""

    def __init__(
        self,
        source: TokenFiles,
        max_length: int,
        index: int,
        logical_shards: int,
        seed: int,
        state: LogicalShardState | None = None,
        repeat: bool = True,
    ) -> None:
        """Logical shard `index` of `logical_shards`; without `repeat` it ends after one epoch."""
        # Plain views (windows, max_length): slicing an np.memmap costs as much as copying a row.
        self._files = [_windows(np.asarray(file.ids), max_length) for file in source.files]
        self._source, self._vocab_size = source, source.vocab_size()
        self._max_length, self._seed, self._repeat = max_length, seed, repeat
        self._index, self._logical_shards = index, logical_shards
        # (files + 1,): number of the first window of each file
        self._first_windows = np.cumsum([0, *(len(windows) for windows in self._files)])
        windows = int(self._first_windows[-1])
        self._count = len(range(index, windows, logical_shards))
        if not self._count and (repeat or not windows):
            raise UserError(
                f"--dataset {source.name}: {source.tokens} ids make {windows} rows of --max_length {max_length}, which "
                f"are too few for --data_lanes {logical_shards}; lower --data_lanes or give more data."
            )
        self._epoch: int = state["epoch"] if state else 0
        self._window: int = state["window"] if state else 0
        self._ahead = np.empty(0, np.int64)  # windows of a block of positions
        self._ahead_of: tuple[int, int] | None = None  # epoch, block

    def state(self) -> LogicalShardState:
        """See `order.LogicalShard.state`."""
        return {"epoch": self._epoch, "window": self._window}

    @property
    def ended(self) -> bool:
        """See `order.LogicalShard.ended`."""
        return not self._repeat and self._window == self._count

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `order.LogicalShard.take`. Raises UserError for an id beyond the vocabulary."""
        batch = np.zeros((rows, self._max_length), np.int32)
        lengths = np.zeros(rows, np.int64)
        done = 0
        while done < rows and not self.ended:
            windows = self._next_windows(rows - done)
            files = np.searchsorted(self._first_windows, windows, side="right") - 1
            for file in np.unique(files):
                chosen = np.flatnonzero(files == file)
                ids = self._files[file][windows[chosen] - self._first_windows[file]]
                if ids.size and int(ids.max()) >= self._vocab_size:
                    # Raises; only finding where the id is looks at the whole file.
                    self._source.files[file].check_ids(self._vocab_size)
                batch[done + chosen] = ids
            done += len(windows)
        lengths[:done] = self._max_length
        return batch, lengths

    def _next_windows(self, limit: int) -> NDArray[np.int64]:
        """The indices of the next windows, at least 1 and at most `limit`; moves on behind them."""
        if self._window == self._count:
            self._epoch, self._window = self._epoch + 1, 0
        block = self._window // _BLOCK
        if self._ahead_of != (self._epoch, block):
            # A permutation costs as much for many elements as for one.
            positions = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self._count), dtype=np.uint64)
            elements = permute(positions, self._count, hash64(_WINDOW_ORDER, self._seed, self._index, self._epoch))
            self._ahead = elements.astype(np.int64) * self._logical_shards + self._index
            self._ahead_of = (self._epoch, block)
        start = self._window - block * _BLOCK
        windows = self._ahead[start : start + limit]
        self._window += len(windows)
        return windows


def _windows(ids: NDArray[Any], max_length: int) -> NDArray[Any]:
    count = len(ids) // max_length
    return ids[: count * max_length].reshape(count, max_length)
