"""`--dataset` of token ids: files of little-endian uint16 or uint32 that are mapped into memory, not read.

A row is a window of `max_length` consecutive ids; windows do not overlap, and what is left at the end of a file is
shorter than a row and never trained on. Window w belongs to lane w mod `lanes`; a lane visits its windows in an order
that is new each epoch, computed element by element, so that its state is two integers.

The type of the ids comes from a sidecar `<file>.json` with a field dtype (scripts/tokenize_dataset.py writes one), else
from a suffix .uint16 or .uint32. A folder has files train* and validation*. Of a single file the validation set is the
file beside it with "validation" for "train" in its name; without one, the last hundredth of the file (at most 10 M ids)
is held out.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.permutation import hash64, permute
from peft_pretraining.errors import UserError

SUFFIXES = (".bin", ".uint16", ".uint32")
_HELD_OUT_FRACTION = 100
_HELD_OUT_LIMIT = 10_000_000
_WINDOW_ORDER = 4
_BLOCK = 1024


@dataclass(frozen=True)
class TokenFile:
    """A stretch of one file."""

    path: Path
    ids: NDArray[Any]  # (tokens,) memory-mapped uint16 or uint32
    settings: dict[str, Any]
    """The sidecar, or empty."""


@dataclass(frozen=True)
class TokenFiles:
    """The files of one split."""

    name: str
    files: tuple[TokenFile, ...]

    @property
    def tokens(self) -> int:
        """Over all files."""
        return sum(len(file.ids) for file in self.files)

    def fingerprint(self) -> str:
        """Hash of names, lengths and the first ids of each file."""
        parts = [(file.path.name, len(file.ids), file.ids[:1024].tobytes()) for file in self.files]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def vocab_size(self) -> int:
        """One more than the largest id that can occur: of the sidecar, else read from all ids (about 1 s a billion)."""
        return max(
            int(file.settings["vocab_size"]) if "vocab_size" in file.settings else _largest(file) + 1
            for file in self.files
        )


def is_token_dataset(dataset: str) -> bool:
    """Whether --dataset names a file, or a folder with train* token files."""
    if dataset in ("c4", "pydocs"):
        return False
    path = Path(dataset).expanduser()
    return path.is_file() or (path.is_dir() and bool(_split_files(path, "train") or _split_files(path, "validation")))


def open_token_files(dataset: str, split: str) -> TokenFiles:
    """The token files of split "train" or "validation". Raises UserError."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        paths = _split_files(path, split)
        if not paths:
            raise UserError(
                f"--dataset {dataset}: it has no file {split}* with one of the suffixes {' '.join(SUFFIXES)}."
            )
        return TokenFiles(dataset, tuple(_open(file) for file in paths))
    validation = path.with_name(path.name.replace("train", "validation"))
    beside = validation != path and validation.is_file()
    if split == "validation" and beside:
        return TokenFiles(dataset, (_open(validation),))
    whole = _open(path)
    held_out = 0 if beside else min(len(whole.ids) // _HELD_OUT_FRACTION, _HELD_OUT_LIMIT)
    cut = len(whole.ids) - held_out
    part = whole.ids[:cut] if split == "train" else whole.ids[cut:]
    if not len(part):
        raise UserError(
            f"--dataset {dataset}: {len(whole.ids)} ids are too few to hold out a validation set; put a validation "
            "file beside it."
        )
    return TokenFiles(dataset, (TokenFile(path, part, whole.settings),))


class TokenLane:
    """A lane over windows of token files; see `lanes.Lane`."""

    def __init__(
        self, source: TokenFiles, max_length: int, lane: int, lanes: int, seed: int, state: dict[str, int] | None = None
    ) -> None:
        # Plain views (windows, max_length): slicing an np.memmap costs as much as copying a row.
        self._files = [_windows(np.asarray(file.ids), max_length) for file in source.files]
        self._max_length, self._lane, self._lanes, self._seed = max_length, lane, lanes, seed
        # (files + 1,): number of the first window of each file
        self._first_windows = np.cumsum([0, *(len(windows) for windows in self._files)])
        windows = int(self._first_windows[-1])
        self._count = len(range(lane, windows, lanes))
        if not self._count:
            raise UserError(
                f"--dataset {source.name}: {source.tokens} ids make {windows} rows of --max_length {max_length}, which "
                "are too few "
                f"for --data_lanes {lanes}; lower --data_lanes or give more data."
            )
        self._epoch, self._window = (state["epoch"], state["window"]) if state else (0, 0)
        self._ahead = np.empty(0, np.int64)  # windows of a block of positions
        self._ahead_of: tuple[int, int] | None = None  # epoch, block

    def state(self) -> dict[str, int]:
        """See `lanes.Lane.state`."""
        return {"epoch": self._epoch, "window": self._window}

    def take(self, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """See `lanes.Lane.take`."""
        batch = np.empty((rows, self._max_length), np.int32)
        done = 0
        while done < rows:
            windows = self._next_windows(rows - done)
            files = np.searchsorted(self._first_windows, windows, side="right") - 1
            for file in np.unique(files):
                chosen = np.flatnonzero(files == file)
                batch[done + chosen] = self._files[file][windows[chosen] - self._first_windows[file]]
            done += len(windows)
        return batch, np.full(rows, self._max_length, np.int64)

    def _next_windows(self, limit: int) -> NDArray[np.int64]:
        """Numbers of the next windows, from 1 up to `limit`; advances."""
        if self._window == self._count:
            self._epoch, self._window = self._epoch + 1, 0
        block = self._window // _BLOCK
        if self._ahead_of != (self._epoch, block):
            # A permutation costs as much for many elements as for one.
            positions = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self._count), dtype=np.uint64)
            elements = permute(positions, self._count, hash64(_WINDOW_ORDER, self._seed, self._lane, self._epoch))
            self._ahead = elements.astype(np.int64) * self._lanes + self._lane
            self._ahead_of = (self._epoch, block)
        start = self._window - block * _BLOCK
        windows = self._ahead[start : start + limit]
        self._window += len(windows)
        return windows


def _windows(ids: NDArray[Any], max_length: int) -> NDArray[Any]:
    count = len(ids) // max_length
    return ids[: count * max_length].reshape(count, max_length)


def _split_files(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*") if path.suffix in SUFFIXES)


def _open(path: Path) -> TokenFile:
    sidecar = path.with_name(path.name + ".json")
    settings: dict[str, Any] = {}
    if sidecar.is_file():
        try:
            settings = dict(json.loads(sidecar.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"--dataset: {sidecar} is not a JSON object ({error}).") from error
    name = settings.get("dtype", path.suffix.removeprefix("."))
    if name not in ("uint16", "uint32"):
        raise UserError(
            f"--dataset {path}: the type of its ids is unknown. Name it .uint16 or .uint32, or put a {sidecar.name} "
            "beside it "
            'that says {"dtype": "uint16"}.'
        )
    dtype = np.dtype(name).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(
                f"--dataset {path}: its {size} bytes are no whole number of {name} ids: it is empty, cut off or of "
                "another type."
            )
        return TokenFile(path, np.memmap(path, dtype, mode="r"), settings)
    except OSError as error:
        raise UserError(f"--dataset: {path} cannot be read ({error.strerror}).") from error


def _largest(file: TokenFile) -> int:
    step = 1 << 24
    return max(int(file.ids[start : start + step].max()) for start in range(0, len(file.ids), step))
