"""The training loader: rows of the lanes in turn, cut into micro-batches, prepared ahead by threads.

Global sequence i comes from lane i mod `lanes`. Update u holds the sequences [u * G, (u + 1) * G) of the global batch
size G; rank r of W takes those with i mod W = r, which are the rows of its own lanes, in order, cut into
`grad_accum_steps` micro-batches of `batch_size`.

Worker thread w prepares the rows of every workers-th lane of the rank, update by update, up to `PREFETCHED_UPDATES`
ahead; what each lane has to give for an update is known beforehand, so neither the number of workers nor their speed
can change the order. The tokenizer releases the GIL. A lane's state after each update travels with its rows: a
checkpoint never sees what is only prefetched. Where the data is not repeated, lanes that have ended give empty rows
until all lanes of all ranks have ended.
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
from peft_pretraining.data.lanes import Lanes, TextLanes, TokenLanes
from peft_pretraining.data.order import DamageCount, LaneState, RowFormat
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
    """How the global order is cut up."""

    max_length: int
    batch_size: int
    """Sequences of a micro-batch."""
    grad_accum_steps: int
    rank: int
    world_size: int
    lanes: int

    def __post_init__(self) -> None:
        if self.lanes % self.world_size:
            raise UserError(
                f"--data_lanes {self.lanes} cannot be shared by {self.world_size} processes: give a number of "
                "processes that divides it, "
                "or another --data_lanes (which is another order of the data)."
            )

    @property
    def global_batch_size(self) -> int:
        """Sequences an update, over all ranks."""
        return self.batch_size * self.grad_accum_steps * self.world_size

    @property
    def own_lanes(self) -> range:
        """The lanes of this rank."""
        return range(self.rank, self.lanes, self.world_size)

    def rows_of(self, index: int, sequence: int) -> range:
        """The rows, of this rank's update that begins at global `sequence`, which `own_lanes[index]` has to give."""
        lanes = len(self.own_lanes)
        first = sequence // self.world_size % lanes  # index of the lane that gives row 0
        return range((index - first) % lanes, self.batch_size * self.grad_accum_steps, lanes)


class _Prepared:
    """Rows of one update while its lanes come in."""

    def __init__(self, layout: Layout, workers: int) -> None:
        rows = layout.batch_size * layout.grad_accum_steps
        self.rows = np.empty((rows, layout.max_length), np.int32)
        self.lengths = np.empty(rows, np.int64)
        self.states: dict[int, LaneState] = {}
        self.ended: dict[int, bool] = {}
        self.pending = workers


class TrainLoader:
    """This rank's part of the global order. Threads start with the first `next_update`; `close` ends them."""

    def __init__(
        self,
        layout: Layout,
        lanes: Lanes,
        order: dict[str, int | str],
        *,
        workers: int,
        vocab_size: int = 0,
        tokenizer: Tokenizer | None = None,
        damage: DamageCount | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`order` is everything that decides the order, by flag; `stop` ends the pauses of a source when set."""
        self.layout, self.tokenizer, self._ids = layout, tokenizer, vocab_size
        self.wait_seconds = 0.0
        """Time that `next_update` waited for rows, in total."""
        self.news: list[str] = []
        """What a person should hear of the data, in sentences; whoever says them empties the list."""
        self.about: Callable[[], list[str]] = list
        """Makes lines for people of what the run reads (`summary`), for `describe`."""
        self._makes_lanes, self._order, self._damage = lanes, order, damage or DamageCount(0)
        self._stop = stop or threading.Event()
        self._sequence = 0  # global sequences handed out
        self._ended: dict[int, bool] | None = None
        self._begin({})
        self._workers = min(max(0, workers), len(self._lanes))
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._prepared: dict[int, _Prepared] = {}  # by the update's first global sequence
        self._error: BaseException | None = None
        # A thread that is inside the tokenizer while the interpreter shuts down can abort the process.
        atexit.register(_close_if_alive, weakref.ref(self))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; after `load_state_dict` that of the tokenizer that the run began with."""
        return self._ids if self.tokenizer is None else self.tokenizer.vocab_size

    def describe(self) -> list[str]:
        """Lines for people: what is read, at which commit of a data set on the hub, and how text becomes ids."""
        commit = self._order.get("dataset_revision")
        of_hub = [f"data set at commit {commit} (--dataset_revision)"] if commit else []
        return [*self.about(), *of_hub, *([f"tokenizer {self.tokenizer.describe()}"] if self.tokenizer else [])]

    @property
    def damaged(self) -> int:
        """Damaged places that the lanes of this rank met so far."""
        return self._damage.total

    @property
    def ended(self) -> bool:
        """Whether no lane of this rank has a further row; never where the data is repeated."""
        if self._ended is None:
            if self._threads:
                return False  # they read the lanes now; the first update tells
            self._ended = {number: lane.ended for number, lane in zip(self.layout.own_lanes, self._lanes, strict=True)}
        return all(self._ended.values())

    def start(self) -> None:
        """Begin to prefetch now, rather than at the first `next_update`; after `load_state_dict`."""
        if self._threads:
            return
        for worker in range(self._workers):
            name = f"data-{worker}"
            thread = threading.Thread(target=self._work, args=(worker, self._sequence), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def next_update(self, give_up: Callable[[], bool] = lambda: False) -> Update | None:
        """The next update's micro-batches of this rank; None if `give_up` becomes true while they are waited for.

        Where the data is not repeated an update may have no target: its lanes have ended, and others may not have.
        Raises what went wrong in a worker, UserError as a rule.
        """
        wait_start = time.perf_counter()
        prepared = self._receive(give_up) if self._workers else self._prepare_here()
        self.wait_seconds += time.perf_counter() - wait_start
        if prepared is None:
            return None
        self._states.update(prepared.states)
        self._ended = (self._ended or dict.fromkeys(self.layout.own_lanes, False)) | prepared.ended
        self._tell_of_epochs()
        size = self.layout.batch_size
        micro_batches = [
            make_micro_batch(prepared.rows[i : i + size], prepared.lengths[i : i + size])
            for i in range(0, len(prepared.rows), size)
        ]
        return Update(micro_batches, sum(m.target_tokens for m in micro_batches), sum(m.tokens for m in micro_batches))

    def state_dict(self) -> dict[str, Any]:
        """State of this rank's lanes after the last update that was handed out; JSON-able. See `merge_states`."""
        lanes = {str(lane): dict(state) for lane, state in self._states.items()}
        return {
            "format": _STATE_FORMAT,
            "sequence": self._sequence,
            "order": dict(self._order),
            "sources": self._makes_lanes.state(),
            "lanes": lanes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a merged state, saved by any number of ranks; only before the first update. Raises UserError."""
        if self._threads or self._sequence:
            raise RuntimeError("load_state_dict() has to come before the first next_update()")
        self._check(state)
        self._sequence = int(state["sequence"])
        self._begin({lane: state["lanes"][str(lane)] for lane in self.layout.own_lanes})

    def close(self) -> None:
        """End the threads; a read that hangs is left behind in a daemon thread after some seconds."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._prepared.clear()

    def _begin(self, states: dict[int, LaneState]) -> None:
        """Make the lanes, from their states or from the beginning."""
        self._lanes = [self._makes_lanes.make(lane, states.get(lane)) for lane in self.layout.own_lanes]
        self._states = {number: lane.state() for number, lane in zip(self.layout.own_lanes, self._lanes, strict=True)}
        self._ended = None
        self._epochs = _epochs(self._states.values())

    def _tell_of_epochs(self) -> None:
        epochs = _epochs(self._states.values())
        for name, before, now in zip(self._makes_lanes.names, self._epochs, epochs, strict=True):
            if before == 0 < now:
                self.news.append(
                    f"--dataset {name}: the first of its lanes has ended and begins again, in another order: from here "
                    "on documents are read a second time (--repeat each)"
                )
        self._epochs = epochs

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("format") != _STATE_FORMAT:
            raise UserError(
                f"the checkpoint's data state has format {state.get('format')}; this version reads {_STATE_FORMAT}."
            )
        saved_tokenizer = state["order"].get("tokenizer", "")
        if self.tokenizer is not None and self.tokenizer.go_on_as(saved_tokenizer):
            self._order["tokenizer"] = saved_tokenizer  # of the same ids, by the encoder that the run began with
        replaced = self._makes_lanes.load_state(state.get("sources"))
        self._order["dataset"] = self._makes_lanes.fingerprint()
        differences = [
            f"--{flag} is {self._order.get(flag)!r} but was {saved!r}"
            for flag, saved in state["order"].items()
            if self._order.get(flag) != saved and not (flag == "dataset" and replaced)
        ]
        self.news += replaced or []
        if differences:
            raise UserError(
                f"the run cannot go on in the order of its checkpoint: {'; '.join(differences)} (for --dataset and "
                "--tokenizer "
                "these are fingerprints of the content). Resume with the same data and flags."
            )
        if state["sequence"] % self.layout.world_size:
            raise UserError(
                f"the checkpoint was made after {state['sequence']} sequences, which {self.layout.world_size} "
                "processes cannot share; resume with  a number of processes that divides it."
            )
        if missing := [lane for lane in self.layout.own_lanes if str(lane) not in state["lanes"]]:
            raise UserError(
                f"the checkpoint's data state lacks the lanes {missing}: it does not hold the states of all ranks."
            )

    def _fill(self, prepared: _Prepared, sequence: int, indices: range) -> None:
        """Put the rows of the lanes `own_lanes[indices]` into the update that begins at `sequence`."""
        for index in indices:
            rows = self.layout.rows_of(index, sequence)
            if self._stop.is_set():
                raise RuntimeError("the loader is closed")
            if rows:
                place = slice(rows.start, rows.stop, rows.step)
                prepared.rows[place], prepared.lengths[place] = self._lanes[index].take(len(rows))
                number = self.layout.own_lanes[index]
                prepared.states[number] = self._lanes[index].state()
                prepared.ended[number] = self._lanes[index].ended

    def _prepare_here(self) -> _Prepared:
        prepared = _Prepared(self.layout, 0)
        self._fill(prepared, self._sequence, range(len(self._lanes)))
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
        """Prepare the rows of every workers-th lane, update by update from the global sequence `begin` on."""
        indices = range(worker, len(self._lanes), self._workers)
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
                self._fill(prepared, sequence, indices)
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
    """One state of all lanes from the `state_dict()` of each rank, taken after the same update."""
    first = states[0]
    for state in states[1:]:
        if any(state[key] != first[key] for key in ("format", "sequence", "order")):
            raise ValueError("the ranks' data states are of different updates or orders")
    lanes = {lane: position for state in states for lane, position in state["lanes"].items()}
    return {**first, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def _epochs(states: Iterable[LaneState]) -> list[int]:
    """How often the furthest lane has begun anew, of each source."""
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
    """The loader of --dataset for one rank; `tokenizer` may be None for token ids. Raises UserError.

    `repeat` as in --repeat. `source` replaces what --dataset is opened as, and `options.stop` the loader's own event.
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
    lanes = TextLanes(
        shares, RowFormat(max_length, packing, tokenizer), seed=seed, lanes=data_lanes, shuffle_buffer=shuffle_buffer,
        repeat=repeats(repeat), damage=damage,
    )  # fmt: skip
    order |= {"dataset": lanes.fingerprint(), "tokenizer": tokenizer.fingerprint()}
    order |= {"packing": packing, "shuffle_buffer": shuffle_buffer}
    if revision := revision_of(opened):
        order["dataset_revision"] = revision
    if source is None and find_kind(dataset).needs_network:
        workers = max(1, workers)  # a pause between two tries must not hold up the thread that gets the signals
    return TrainLoader(
        layout, lanes, order, workers=workers, tokenizer=tokenizer, damage=damage,
        stop=stop,
    )  # fmt: skip


def repeats(repeat: str) -> bool:
    """Whether data that ends begins again, of --repeat."""
    return repeat == "each"


def _token_loader(
    opened: TokenFiles | TokenMixture, layout: Layout, order: dict[str, int | str], workers: int, repeat: str
) -> TrainLoader:
    shares = opened.shares if isinstance(opened, TokenMixture) else [(opened, 1.0)]
    for files, _ in shares:
        files.check_beginnings()
    lanes = TokenLanes(shares, layout.max_length, int(order["seed"]), layout.lanes, repeats(repeat))
    order = order | {"dataset": lanes.fingerprint()}
    # Rows are copied from memory: one thread is the fastest.
    return TrainLoader(layout, lanes, order, workers=min(workers, 1), vocab_size=opened.vocab_size())
