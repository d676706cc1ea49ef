"""An fsspec file system for files on the Hugging Face hub that checks every byte range and retries after any fault.

`datasets` opens hf://datasets/NAME@COMMIT/FILE through fsspec's registry, where `serve_pinned_files` replaces
huggingface_hub's own file system by this one. The original returns the body of a range request unchecked, retries some
faults five times, sleeps as long as a server's Retry-After says, and first requests a listing of the folder. Here a
file at a commit needs range requests only. These are independent of each other, so that after a fault the same range is
requested again and the stream continues at the same byte; and 64 readers need no 64 open connections that a server
would close for idling. huggingface_hub still builds addresses, adds the user's token and keeps the connections.

`patient_requests` gives the same retries to its other requests, which list what a repository holds.
"""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]
from huggingface_hub import HfFileSystem, get_session, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from peft_pretraining.data.sources.retry import Reading, TransientError, UnreachableError
from peft_pretraining.errors import UserError

BLOCK_BYTES = 1 << 20
"""The size of the buffer of each open file, which is filled by one request."""
LONGEST_RANGE_BYTES = 1 << 23
"""Longer reads are split into several requests, so that a fault costs no more than this."""
ATTEMPTS_TO_REACH = 5
"""Tries of the first request to a hub that does not answer: about ten seconds."""

_FINAL_STATUS = {
    401: "needs a login",
    403: "is not allowed",
    404: "does not exist",
    410: "is gone",
    451: "is not allowed",
}
_TRY_AGAIN = {408, 425, 429, *range(500, 600)}
_PINNED = re.compile(r"datasets/(?P<repository>[^@]+)@(?P<revision>[0-9a-f]{40})/(?P<file>.+)")

_reader = threading.local()
_one_at_a_time = threading.Lock()


@contextmanager
def reading_for(reading: Reading) -> Iterator[None]:
    """Assign the files that this thread opens in the context to `reading`."""
    before = getattr(_reader, "reading", None)
    _reader.reading = reading
    try:
        yield
    finally:
        _reader.reading = before


def serve_pinned_files() -> None:
    """Make fsspec, and so `datasets`, open hf:// addresses with `CheckedFileSystem` in this process."""
    fsspec.register_implementation("hf", CheckedFileSystem, clobber=True)


class CheckedFileSystem(HfFileSystem):
    """huggingface_hub's file system, in which files of a data set at a commit are opened as `RangedFile`."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        pinned = _PINNED.fullmatch(self._strip_protocol(path))
        if pinned is None or mode != "rb":
            return super()._open(path, mode, block_size, *args, **kwargs)
        reading = getattr(_reader, "reading", None) or Reading(pinned["repository"])
        endpoint = reading.endpoint or self.endpoint
        url = hf_hub_url(
            pinned["repository"], pinned["file"], repo_type="dataset", revision=pinned["revision"], endpoint=endpoint
        )
        what = f"{pinned['file']} of {pinned['repository']}"
        return RangedFile(_Ranges(reading, url, what, self.token), block_size or BLOCK_BYTES)


class RangedFile(io.BufferedReader):
    """A seekable file of the hub that keeps one block in memory."""


class _Ranges(io.RawIOBase):
    """The bytes at an address, read by range requests."""

    def __init__(self, reading: Reading, url: str, what: str, token: bool | str | None) -> None:
        super().__init__()
        self._reading, self._url, self._what, self._token = reading, url, what, token
        self._at, self._size = 0, -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}
        self._at = (origin[whence] if whence in origin else self._known_size()) + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` or a part of it; 0 at the end."""
        count = min(len(buffer), LONGEST_RANGE_BYTES)
        if self._size >= 0:
            count = min(count, self._size - self._at)
        if count <= 0:
            return 0
        content = self._fetch(self._at, self._at + count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _known_size(self) -> int:
        if self._size < 0:
            self._fetch(0, 1)
        return self._size

    def _fetch(self, start: int, stop: int) -> bytes:
        reading = self._reading
        try:
            content = reading.retrying(
                self._what, lambda: self._get(start, stop), None if reading.answered else ATTEMPTS_TO_REACH
            )
        except UnreachableError as error:
            reading.failure = reading.unreachable(urlsplit(self._url).netloc, error)
            raise reading.failure from error
        except UserError as error:
            reading.failure = error
            raise
        return content

    def _get(self, start: int, stop: int) -> bytes:
        """Bytes from `start`, at most to `stop`, empty only at the end of the file; learns the file's size."""
        # Identity: the offsets are those of the file itself, which a compressed response would change.
        headers = {
            **build_hf_headers(token=self._token),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        timeout = self._reading.retry.timeout_seconds
        try:
            with get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
                self._reading.answered = True
                announced = self._announced(response, start, stop)
                content: bytes = response.read() if announced[0] else b""
        except (TransientError, UserError):
            raise
        except OfflineModeIsEnabled as error:
            raise self._reading.error(f"{self._what} is not here: HF_HUB_OFFLINE is set. Unset it.") from error
        except Exception as error:
            # huggingface_hub has changed its HTTP library twice, and with it the classes of errors. Only the network
            # can fail in these lines.
            kind = type(error).__name__
            raise TransientError(
                f"{kind}: {error}", unreachable=kind.startswith("Connect") and not self._reading.answered
            ) from error
        if len(content) != announced[0]:
            raise TransientError(f"cut off after {len(content)} of {announced[0]} bytes")
        self._size = announced[1]
        return content

    def _announced(self, response: Any, start: int, stop: int) -> tuple[int, int]:
        """(length of the body, size of the file) from the response's headers. Raises TransientError or UserError."""
        status, headers = int(response.status_code), response.headers
        if status in _FINAL_STATUS:
            terms = self._url.partition("/resolve/")[0]
            raise self._reading.error(
                f"{self._url} {_FINAL_STATUS[status]} (HTTP status {status}). Check HF_ENDPOINT and `hf auth login`, "
                f"and whether its terms must be accepted at {terms}."
            )
        length = headers.get("Content-Length", "")
        if status == 200 and start == 0 and length.isdigit() and int(length) <= stop:
            return int(length), int(length)  # the whole of a short file
        content_range = headers.get("Content-Range", "")
        if status == 416 and start == 0 and content_range == "bytes */0":
            return 0, 0
        if status == 200:
            raise TransientError("answered with the whole file instead of a range")
        if status != 206:
            raise TransientError(f"HTTP status {status}", headers.get("Retry-After"))
        bounds, _, size = content_range.removeprefix("bytes ").partition("/")
        first, _, last = bounds.partition("-")
        right = first.isdigit() and last.isdigit() and size.isdigit()
        if not right or not start == int(first) <= int(last) < min(stop, int(size)):
            raise TransientError(f"answered with the range {content_range!r} instead of one from {start}")
        if self._size not in (-1, int(size)):
            raise TransientError(f"gave the file {size} bytes, and {self._size} before")
        return int(last) - start + 1, int(size)


@contextmanager
def patient_requests(reading: Reading, endpoint: str) -> Iterator[None]:
    """Retry every request of huggingface_hub to `endpoint` by the policy of `reading`; one thread at a time.

    The library's own retries cover only some of its requests. Worse, `datasets` treats a network fault at a
    repository's .huggingface.yaml or dataset_infos.json like a missing file, and goes on with other configurations.
    """
    with _one_at_a_time:
        client: Any = get_session()
        send, answered = client.send, False
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), reading.retry.timeout_seconds)

        def once(request: Any, options: dict[str, Any]) -> Any:
            nonlocal answered
            # Some of its requests have no timeout.
            request.extensions = {**request.extensions, "timeout": timeouts}
            try:
                response = send(request, **options)
                response.read()
            except OfflineModeIsEnabled:
                raise
            except Exception as error:
                kind = type(error).__name__
                raise TransientError(
                    f"{kind}: {error}", unreachable=kind.startswith("Connect") and not answered
                ) from error
            answered = True
            if response.status_code in _TRY_AGAIN:
                raise TransientError(f"HTTP status {response.status_code}", response.headers.get("Retry-After"))
            return response

        def patient_send(request: Any, **options: Any) -> Any:
            # Usage statistics go to other addresses; a range request belongs to a `RangedFile`, which retries itself.
            if not str(request.url).startswith(endpoint) or "range" in request.headers:
                return send(request, **options)
            return reading.retrying(str(request.url), lambda: once(request, options), ATTEMPTS_TO_REACH)

        client.send = patient_send
        try:
            yield
        finally:
            del client.send
