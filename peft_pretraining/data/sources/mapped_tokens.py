"""Token ids that are mapped into memory: what a kind of `--dataset` gives that needs no tokenizer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


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


def _largest(file: TokenFile) -> int:
    step = 1 << 24
    return max(int(file.ids[start : start + step].max()) for start in range(0, len(file.ids), step))
