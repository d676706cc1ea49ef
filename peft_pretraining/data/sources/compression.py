"""Decompress gzip, zstd, xz and bz2 piece by piece, up to the point where they are damaged.

The content before damage is returned. A file that ends inside a member is damaged, too; the stream reader of the zstd
library does not detect that.
"""

import bz2
import lzma
import re
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00", "bz2": b"BZh"}
_HEADER = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08[\x00-\x1f])|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<xz>\xfd7zXZ\x00\x00)"
    rb"|(?P<bz2>BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90))"
)
"""The header of each: its magic, and method and flags of gzip, flags of xz, the first block or the end of bz2."""

_PIECE_BYTES = 1 << 13
"""Compressed bytes that are decompressed at a time, which is what damage costs."""
_ZSTD_WINDOW = 1 << 31
"""The largest window that `zstd --long` writes; the library's default limit is 128 MB."""


class DamagedError(Exception):
    """Compressed bytes that are damaged or cut off."""


def compression_of(path: str) -> str:
    """The compression by a file's suffix: gzip, zstd, xz or bz2; "" for none."""
    return next((kind for suffix, kind in SUFFIXES.items() if path.lower().endswith(suffix)), "")


def compression_seen(head: bytes) -> str:
    """The compression by a file's first bytes: gzip, zstd, xz or bz2; "" for none."""
    found = _HEADER.match(head)
    return str(found.lastgroup) if found else ""


class UnpackedCopy:
    """A temporary file with the decompressed content of a file, up to its damage; deleted with its last user."""

    def __init__(self) -> None:
        self.damage = ""
        """Why the content ends early; "" if it does not."""
        self._name = ""
        self._lock = threading.Lock()

    def name(self, pieces: Callable[[], Iterator[bytes]], folder: str) -> str:
        """The path of the file, which the first call writes in `folder`. Raises what opening and writing raise."""
        with self._lock:
            if not self._name:
                self._name = self._written(pieces, folder)
            return self._name

    def _written(self, pieces: Callable[[], Iterator[bytes]], folder: str) -> str:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            remove = weakref.finalize(self, Path(file.name).unlink, missing_ok=True)
            try:
                file.writelines(pieces())
            except DamagedError as error:
                self.damage = str(error)
            except BaseException:
                remove()
                raise
        return file.name


_copies: "weakref.WeakValueDictionary[object, UnpackedCopy]" = weakref.WeakValueDictionary()
_copies_lock = threading.Lock()


def unpacked_copy(path: str) -> UnpackedCopy:
    """The copy of a file, shared in this process until the file changes."""
    key: object = path
    if "://" not in path:
        found = Path(path).stat()
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    with _copies_lock:
        return _copies.setdefault(key, UnpackedCopy())


def decompressed(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Decompress one or more consecutive members (frames). Raises DamagedError after the last good piece."""
    begin, errors = _decompressor(compression)
    member, inside = begin(), False
    for piece in (chunk[i : i + _PIECE_BYTES] for chunk in chunks for i in range(0, len(chunk), _PIECE_BYTES)):
        while piece:
            # Some writers pad the end of a file with zeros.
            if not inside and not (piece := piece.lstrip(b"\0")):
                break
            try:
                block = member.decompress(piece)
            except errors as error:
                raise DamagedError(f"damaged {compression} ({error})") from error
            if block:
                yield block
            inside = not member.eof
            piece = member.unused_data if member.eof else b""
            if member.eof:
                member = begin()
    if inside:
        raise DamagedError(f"damaged {compression} (it ends too early)")


def _decompressor(compression: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """(factory of the decompressor of a member, exceptions that mean damage)."""
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31), (zlib.error,)
    if compression == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    if compression == "bz2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    try:
        import zstandard
    except ImportError as error:
        raise UserError("--dataset: to read .zst files, install zstandard: pip install zstandard") from error
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj, (zstandard.ZstdError,)
