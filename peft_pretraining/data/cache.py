"""A cache of derived files that all runs and ranks of a user share: held-out texts, trained tokenizers."""

import os
import tempfile
from pathlib import Path

from peft_pretraining.errors import UserError


def cache_dir() -> Path:
    """The directory of the cache: $QGALORE_CACHE, else the user's cache directory. Raises UserError."""
    if path := os.environ.get("QGALORE_CACHE"):
        try:
            return Path(path).expanduser()
        except RuntimeError as error:
            raise UserError(f"QGALORE_CACHE is {path}: there is no such user; set it to a directory.") from error
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qgalore"


def publish(path: Path, content: bytes) -> bytes:
    """Write `content` to `path` unless another process did so first; returns the content of the file.

    Atomic: a reader sees the whole file or none. Raises UserError if the directory cannot be written.
    """
    try:
        temporary = _write_beside(path, content)
        try:
            # The first of several ranks wins, and all of them use its file.
            os.link(temporary, path)
        except FileExistsError:
            return path.read_bytes()
        except OSError:
            # Some file systems have no hard links.
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the cache file {path} ({error}): set QGALORE_CACHE to a directory with space."
        ) from error
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Write or overwrite `path` atomically: a reader sees the whole file, old or new. Raises OSError."""
    temporary = _write_beside(path, content)
    temporary.chmod(0o644)
    temporary.replace(path)


def _write_beside(path: Path, content: bytes) -> Path:
    """Write a hidden temporary file in the folder of `path`, which is created; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
        return Path(file.name)
