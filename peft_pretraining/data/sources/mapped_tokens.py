"""Memory-mapped files of token ids, as `TokenKind` opens them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.errors import UserError

_STEP = 1 << 24  # ids that are checked at a time
_CHECKED_IDS = 1 << 26


@dataclass(frozen=True)
class TokenFile:
    """A range of ids of one file."""

    path: Path
    ids: NDArray[Any]  # (tokens,) memory-mapped uint16 or uint32
    settings: dict[str, Any]
    """The contents of the sidecar; empty without one."""
    start: int = 0
    """Index in the file of the first id."""

    def check_ids(self, vocab_size: int, limit: int | None = None) -> None:
        """Raise UserError with the index of the first id (of the first `limit` ids) that is beyond a vocabulary."""
        ids = self.ids[:limit]
        for begin in range(0, len(ids), _STEP):
            beyond = np.flatnonzero(ids[begin : begin + _STEP] >= vocab_size)
            if len(beyond):
                index = begin + int(beyond[0])
                raise UserError(
                    f"--dataset {self.path}: the id {int(ids[index])} at index {self.start + index} is beyond the "
                    f"vocabulary of {vocab_size} ids that its sidecar names: the file is damaged, or of another "
                    "tokenizer or type of ids. Tokenize the text again, or correct the sidecar."
                )


@dataclass(frozen=True)
class TokenFiles:
    """The files of one split."""

    name: str
    files: tuple[TokenFile, ...]

    @property
    def tokens(self) -> int:
        """The number of ids in all files."""
        return sum(len(file.ids) for file in self.files)

    def describe(self) -> str:
        """A phrase for the log."""
        return f"{self.name}: {len(self.files)} file{'s' * (len(self.files) > 1)} of {self.tokens:,} token ids"

    def fingerprint(self) -> str:
        """A hash of names, lengths and the first ids of each file."""
        parts = [(file.path.name, len(file.ids), file.ids[:1024].tobytes()) for file in self.files]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def vocab_size(self) -> int:
        """One more than the largest id: from the sidecar, else found in all ids (about 1 s per billion)."""
        return self._vocab_size

    @cached_property
    def _vocab_size(self) -> int:
        return max(
            int(file.settings["vocab_size"]) if "vocab_size" in file.settings else _largest(file) + 1
            for file in self.files
        )

    def check_beginnings(self) -> None:
        """Check the first ids of each file against the vocabulary of its sidecar; raises UserError."""
        for file in self.files:
            if "vocab_size" in file.settings:
                file.check_ids(int(file.settings["vocab_size"]), _CHECKED_IDS)


@dataclass(frozen=True)
class TokenMixture:
    """The files of several sources, each with its weight."""

    name: str
    shares: tuple[tuple[TokenFiles, float], ...]

    def fingerprint(self) -> str:
        """The fingerprint of each source with its share."""
        return fingerprint_of_shares([(files.fingerprint(), weight) for files, weight in self.shares])

    def vocab_size(self) -> int:
        """See `TokenFiles.vocab_size`."""
        return max(files.vocab_size() for files, _ in self.shares)


def fingerprint_of_shares(shares: Sequence[tuple[str, float]]) -> str:
    """Join the fingerprints of the sources of a mixture, each with its share of the whole."""
    total = sum(weight for _, weight in shares)
    return ",".join(f"{fingerprint}:{weight / total:.6g}" for fingerprint, weight in shares)


def _largest(file: TokenFile) -> int:
    return max(int(file.ids[start : start + _STEP].max()) for start in range(0, len(file.ids), _STEP))
