"""The training loader: one row of each logical shard in turn, cut into micro-batches and prefetched by threads.

Sequence i of a run comes from logical shard i mod L, where L is `--data_lanes` (`order` says what a logical shard is).
With global batches of G sequences, update u has the sequences u G to (u + 1) G - 1. Rank r of W takes those with
i mod W = r: the rows of its own logical shards, in order, cut into `grad_accum_steps` micro-batches of `batch_size`.

Worker thread w prepares the rows of every workers-th logical shard of the rank, update by update, up to
`PREFETCHED_UPDATES` ahead. Which rows a logical shard gives to an update is known beforehand, so neither the number of
workers nor their speed can change the order. The tokenizer releases the GIL. The state of a logical shard after each
update is kept with its rows, so that a checkpoint never counts what was only prefetched. Where the data is not
repeated, logical shards that have ended give empty rows until those of all ranks have ended.
"""

import atexit
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peft_pretraining.data.batch import Update, make_micro_batch
from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.logical_shards import LogicalShards, TextLogicalShards, TokenLogicalShards
from peft_pretraining.data.order import DamageCount, LogicalShardState, RowFormat
from peft_pretraining.data.sources.documents import Share, Source, revision_of
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, SourceOptions
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError

PREFETCHED_UPDATES = 3
DATA_LANES = 64
SHUFFLE_BUFFER = 64
DAMAGED_LIMIT = 100
_STATE_FORMAT = 1
_JOIN_SECONDS = 5.0
_LOOK_UP_SECONDS = 0.5


@dataclass(frozen=True)
class Layout:
    """The division of the global order into ranks and micro-batches."""

    max_length: int
    batch_size: int
    """Sequences of a micro-batch."""
    grad_accum_steps: int
    rank: int
    world_size: int
    logical_shards: int
    """Their number, over all ranks."""

    def __post_init__(self) -> None:
        if self.logical_shards % self.world_size:
            raise UserError(
                f"--data_lanes {self.logical_shards} cannot be shared by {self.world_size} processes: give a number of "
                "processes that divides it, or another --data_lanes (which is another order of the data)."
            )

    @property
    def global_batch_size(self) -> int:
        """Sequences an update, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    @property
    def own_logical_shards(self) -> range:
        """The logical shards of this rank."""
        return range(self.rank, self.logical_shards, self.world_size)

    def rows_of(self, index: int, sequence: int) -> range:
        """The rows of `own_logical_shards[index]` in this rank's part of the update that begins at `sequence`."""
        own = len(self.own_logical_shards)
        first = sequence // self.world_size % own  # index of the logical shard that gives row 0
        return range((index - first) % own, self.batch_size * self.grad_accum_steps, own)


class _Prepared:
    """Rows of one update, which the workers fill in."""

    def __init__(self, layout: Layout, workers: int) -> None:
        rows = layout.batch_size * layout.grad_accum_steps
        self.rows = np.empty((rows, layout.max_length), np.int32)
        self.lengths = np.empty(rows, np.int64)
        self.states: dict[int, LogicalShardState] = {}
        self.ended: dict[int, bool] = {}
        self.pending = workers
        """Workers that have not filled in their rows yet."""


class TrainLoader:
    """Loads this rank's part of the global order. Threads start with the first `next_update`; `close` ends them."""

    def __init__(
        self,
        layout: Layout,
        logical_shards: LogicalShards,
        order: dict[str, int | str],
        *,
        workers: int,
        vocab_size: int = 0,
        tokenizer: Tokenizer | None = None,
        damage: DamageCount | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`order`: all values that decide the order, by flag; `stop`: when set, a source does not wait to try again."""
        self.layout, self.tokenizer, self._ids = layout, tokenizer, vocab_size
        self.wait_seconds = 0.0
        """Total time that `next_update` waited for rows."""
        self.notices: list[str] = []
        """Sentences about the data for the run's log; whoever logs them empties the list."""
        self.about: Callable[[], list[str]] = list
        """Returns lines that describe what the run reads (`summary`), for `describe`."""
        self._shard_factory, self._order, self._damage = logical_shards, order, damage or DamageCount(0)
        self._stop = stop or threading.Event()
        self._sequence = 0  # index of the next sequence over all ranks
        self._ended: dict[int, bool] | None = None
        self._begin({})
        self._workers = min(max(0, workers), len(self._own_shards))
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._prepared: dict[int, _Prepared] = {}  # by the update's first global sequence
        self._error: BaseException | None = None
        # A thread that is inside the tokenizer while the interpreter shuts down can abort the process.
        atexit.register(_close_if_alive, weakref.ref(self))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; after `load_state_dict` that of the tokenizer that the run started with."""
        return self._ids if self.tokenizer is None else self.tokenizer.vocab_size

    def describe(self) -> list[str]:
        """Lines for the run's log: what is read, at which commit of a data set on the hub, and the tokenizer."""
        commit = self._order.get("dataset_revision")
        of_hub = [f"data set at commit {commit} (--dataset_revision)"] if commit else []
        return [*self.about(), *of_hub, *([f"tokenizer {self.tokenizer.describe()}"] if self.tokenizer else [])]

    @property
    def damaged(self) -> int:
        """Damaged documents that the logical shards of this rank met so far."""
        return self._damage.total

    @property
    def ended(self) -> bool:
        """Whether no logical shard of this rank has a further row; always False where the data is repeated."""
        if self._ended is None:
            if self._threads:
                return False  # the threads are reading the logical shards; the first update tells
            self._ended = {index: shard.ended for index, shard in self._own_shards.items()}
        return all(self._ended.values())

    def start(self) -> None:
        """Start to prefetch now, rather than at the first `next_update`; only after `load_state_dict`."""
        if self._threads:
            return
        for worker in range(self._workers):
            name = f"data-{worker}"
            thread = threading.Thread(target=self._work, args=(worker, self._sequence), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def next_update(self, give_up: Callable[[], bool] = lambda: False) -> Update | None:
        """This rank's micro-batches of the next update; None if `give_up` becomes true while waiting for them.

        Where the data is not repeated an update may have no target, when its logical shards have ended before others.
        Raises what went wrong in a worker, as a rule UserError.
        """
        wait_start = time.perf_counter()
        prepared = self._receive(give_up) if self._workers else self._prepare_here()
        self.wait_seconds += time.perf_counter() - wait_start
        if prepared is None:
            return None
        self._states.update(prepared.states)
        self._ended = (self._ended or dict.fromkeys(self.layout.own_logical_shards, False)) | prepared.ended
        self._report_epochs()
        size = self.layout.batch_size
        micro_batches = [
            make_micro_batch(prepared.rows[i : i + size], prepared.lengths[i : i + size])
            for i in range(0, len(prepared.rows), size)
        ]
        return Update(micro_batches, sum(m.target_tokens for m in micro_batches), sum(m.tokens for m in micro_batches))

    def state_dict(self) -> dict[str, Any]:
        """The state after the last update that was handed out, JSON-able; `merge_states` joins those of all ranks."""
        return {
            "format": _STATE_FORMAT,
            "sequence": self._sequence,
            "order": dict(self._order),
            "sources": self._shard_factory.state(),
            "lanes": {str(index): dict(state) for index, state in self._states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a merged state, saved by any number of ranks; only before the first update. Raises UserError."""
        if self._threads or self._sequence:
            raise RuntimeError("load_state_dict() has to come before the first next_update()")
        self._check(state)
        self._sequence = int(state["sequence"])
        self._begin({index: state["lanes"][str(index)] for index in self.layout.own_logical_shards})
        # Of all ranks: a second reading that began on another one has been reported, whichever has its shards now.
        self._epochs = _epochs(state["lanes"].values())

    def close(self) -> None:
        """End the threads; a read that hangs is left behind in a daemon thread after some seconds."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._prepared.clear()

    def _begin(self, states: dict[int, LogicalShardState]) -> None:
        """Build this rank's logical shards, from their states or at the beginning."""
        self._own_shards = {
            index: self._shard_factory.make(index, states.get(index)) for index in self.layout.own_logical_shards
        }
        self._states = {index: shard.state() for index, shard in self._own_shards.items()}
        self._ended = None
        self._epochs = _epochs(self._states.values())

    def _report_epochs(self) -> None:
        epochs = _epochs(self._states.values())
        for name, before, now in zip(self._shard_factory.names, self._epochs, epochs, strict=True):
            if before == 0 < now:
                self.notices.append(
                    f"--dataset {name}: the first of its logical shards has ended and begins again, in another order: "
                    "from here on documents are read a second time (--repeat each)"
                )
        self._epochs = [max(pair) for pair in zip(self._epochs, epochs, strict=True)]

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("format") != _STATE_FORMAT:
            raise UserError(
                f"the checkpoint's data state has format {state.get('format')}; this version reads {_STATE_FORMAT}."
            )
        saved_tokenizer = state["order"].get("tokenizer", "")
        if self.tokenizer is not None and self.tokenizer.resume_as(saved_tokenizer):
            self._order["tokenizer"] = saved_tokenizer  # the same ids, by the encoder that the run started with
        replaced = self._shard_factory.load_state(state.get("sources"))
        self._order["dataset"] = self._shard_factory.fingerprint()
        differences = [
            f"--{flag} is {self._order.get(flag)!r} but was {saved!r}"
            for flag, saved in state["order"].items()
            if self._order.get(flag) != saved and not (flag == "dataset" and replaced)
        ]
        self.notices += replaced or []
        if differences:
            raise UserError(
                f"the run cannot go on in the order of its checkpoint: {'; '.join(differences)} (for --dataset and "
                "--tokenizer these are fingerprints of the content). Resume with the same data and flags."
            )
        if state["sequence"] % self.layout.world_size:
            raise UserError(
                f"the checkpoint was made after {state['sequence']} sequences, which {self.layout.world_size} "
                "processes cannot share; resume with a number of processes that divides it."
            )
        if missing := [index for index in self.layout.own_logical_shards if str(index) not in state["lanes"]]:
            raise UserError(
                f"the checkpoint's data state lacks the logical shards {missing}: it does not hold the states of all "
                "ranks."
            )

    def _fill(self, prepared: _Prepared, sequence: int, own: range) -> None:
        """Put the rows of `own_logical_shards[i]` for i in `own` into the update that begins at `sequence`."""
        for i in own:
            rows = self.layout.rows_of(i, sequence)
            if self._stop.is_set():
                raise RuntimeError("the loader is closed")
            if rows:
                index = self.layout.own_logical_shards[i]
                shard, out = self._own_shards[index], slice(rows.start, rows.stop, rows.step)
                prepared.rows[out], prepared.lengths[out] = shard.take(len(rows))
                prepared.states[index], prepared.ended[index] = shard.state(), shard.ended

    def _prepare_here(self) -> _Prepared:
        prepared = _Prepared(self.layout, 0)
        self._fill(prepared, self._sequence, range(len(self._own_shards)))
        self._sequence += self.layout.global_batch_size
        return prepared

    def _receive(self, give_up: Callable[[], bool]) -> _Prepared | None:
        self.start()
        with self._changed:
            while not ((ready := self._prepared.get(self._sequence)) and not ready.pending):
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise RuntimeError("the loader is closed")
                if give_up():
                    return None
                self._changed.wait(_LOOK_UP_SECONDS)
            del self._prepared[self._sequence]
            self._sequence += self.layout.global_batch_size
            self._changed.notify_all()
            return ready

    def _work(self, worker: int, begin: int) -> None:
        """Prepare the rows of every workers-th logical shard, update by update from the sequence `begin` on."""
        own = range(worker, len(self._own_shards), self._workers)
        step = self.layout.global_batch_size
        try:
            for sequence in itertools.count(begin, step):
                with self._changed:
                    while not self._stop.is_set() and sequence >= self._sequence + PREFETCHED_UPDATES * step:
                        self._changed.wait()
                    if self._stop.is_set():
                        return
                    if sequence not in self._prepared:
                        self._prepared[sequence] = _Prepared(self.layout, self._workers)
                    prepared = self._prepared[sequence]
                self._fill(prepared, sequence, own)
                with self._changed:
                    prepared.pending -= 1
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, next_update() has to raise it
            with self._changed:
                self._error = error
                self._changed.notify_all()


def _close_if_alive(reference: "weakref.ref[TrainLoader]") -> None:
    if (loader := reference()) is not None:
        loader.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the `state_dict()` of all ranks, taken after the same update, into one that any number of ranks can load."""
    first = states[0]
    for state in states[1:]:
        if any(state[key] != first[key] for key in ("format", "sequence", "order")):
            raise ValueError("the ranks' data states are of different updates or orders")
    positions = {index: position for state in states for index, position in state["lanes"].items()}
    return {**first, "lanes": dict(sorted(positions.items(), key=lambda item: int(item[0])))}


def _epochs(states: Iterable[LogicalShardState]) -> list[int]:
    """For each source the largest number of epochs that a logical shard has finished."""
    each = [[own["epoch"] for own in state.get("sources", [state])] for state in states]
    return [max(epochs) for epochs in zip(*each, strict=True)]


def build_train_loader(
    *,
    dataset: str,
    tokenizer: Tokenizer | None,
    packing: str,
    max_length: int,
    batch_size: int,
    grad_accum_steps: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    data_lanes: int = DATA_LANES,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    workers: int = 8,
    damaged_limit: int = DAMAGED_LIMIT,
    repeat: str = "each",
    options: SourceOptions = DEFAULT_OPTIONS,
    source: Source | TokenFiles | TokenMixture | None = None,
) -> TrainLoader:
    """Build one rank's loader of --dataset; `tokenizer` may be None for token ids. Raises UserError.

    `repeat` as in --repeat. `source`: an open training split to read instead of --dataset; `options.stop`: an event to
    use instead of the loader's own.
    """
    layout = Layout(max_length, batch_size, grad_accum_steps, rank, world_size, data_lanes)
    order: dict[str, int | str] = {"seed": seed, "data_lanes": data_lanes, "max_length": max_length}
    stop, damage = options.stop or threading.Event(), DamageCount(damaged_limit)
    opened = source or open_split(dataset, "train", replace(options, stop=stop))
    if isinstance(opened, TokenFiles | TokenMixture):
        return _token_loader(opened, layout, order, workers, repeat)
    if tokenizer is None:
        raise ValueError(f"--dataset {dataset} holds text and needs a tokenizer")
    shares = opened.shares if isinstance(opened, Mixture) else [Share(opened)]
    logical_shards = TextLogicalShards(
        shares, RowFormat(max_length, packing, tokenizer), seed=seed, logical_shards=data_lanes,
        shuffle_buffer=shuffle_buffer, repeat=repeats(repeat), damage=damage,
    )  # fmt: skip
    order |= {"dataset": logical_shards.fingerprint(), "tokenizer": tokenizer.fingerprint()}
    order |= {"packing": packing, "shuffle_buffer": shuffle_buffer}
    if revision := revision_of(opened):
        order["dataset_revision"] = revision
    if source is None and find_kind(dataset).needs_network:
        workers = max(1, workers)  # a pause between two tries must not block the thread that gets the signals
    return TrainLoader(layout, logical_shards, order, workers=workers, tokenizer=tokenizer, damage=damage, stop=stop)


def repeats(repeat: str) -> bool:
    """Whether a value of --repeat means that data begins again where it ends."""
    return repeat == "each"


def _token_loader(
    opened: TokenFiles | TokenMixture, layout: Layout, order: dict[str, int | str], workers: int, repeat: str
) -> TrainLoader:
    shares = opened.shares if isinstance(opened, TokenMixture) else [(opened, 1.0)]
    for files, _ in shares:
        files.check_beginnings()
    logical_shards = TokenLogicalShards(
        shares, layout.max_length, int(order["seed"]), layout.logical_shards, repeats(repeat)
    )
    order = order | {"dataset": logical_shards.fingerprint()}
    # Rows are copied from memory: one thread is the fastest.
    return TrainLoader(layout, logical_shards, order, workers=min(workers, 1), vocab_size=opened.vocab_size())
