"""Compressed bytes, decompressed piece by piece up to the place where they are damaged.

The four decompressors have one interface. A piece that is handed out is never taken back, so what lies before damage is
read; a file that ends inside a member is damaged, too, which a reader of streams does not see for zstd.
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
"""What each begins with, beyond its magic: method and flags of gzip, flags of xz, the first block of bz2 or its end."""

_PIECE_BYTES = 1 << 13
"""Decompressed at a time: what is lost with a damaged piece."""
_ZSTD_WINDOW = 1 << 31
"""The largest that `zstd --long` writes; the library refuses more than 128 MB on its own."""


class DamagedError(Exception):
    """Compressed bytes that are damaged or cut off."""


def compression_of(place: str) -> str:
    """gzip, zstd, xz or bz2 by the end of a name; "" for none."""
    return next((kind for suffix, kind in SUFFIXES.items() if place.lower().endswith(suffix)), "")


def compression_seen(head: bytes) -> str:
    """gzip, zstd, xz or bz2 by the first bytes of a file; "" for none, and for text whose first letters are theirs."""
    found = _HEADER.match(head)
    return str(found.lastgroup) if found else ""


class UnpackedCopy:
    """A temporary file with the content of a compressed one, up to its damage. It goes away with its last user."""

    def __init__(self) -> None:
        self.damage = ""
        """Why the content ends before its end."""
        self._name = ""
        self._lock = threading.Lock()

    def name(self, pieces: Callable[[], Iterator[bytes]], folder: str) -> str:
        """Path of the file, made in `folder` by whoever asks first. Raises what opening and writing raise."""
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


def unpacked_copy(place: str) -> UnpackedCopy:
    """The one copy of a file in this process; another once the file is written anew."""
    key: object = place
    if "://" not in place:
        found = Path(place).stat()
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    with _copies_lock:
        return _copies.setdefault(key, UnpackedCopy())


def decompressed(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """The content of one or more members (frames) in a row. Raises DamagedError after the last good piece."""
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
    """(how a member is begun, what damage raises)."""
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
