"""Files of a data set on the Hugging Face hub, read in ranges that survive a bad network.

A shard is fetched a megabyte at a time with HTTP range requests. Each request stands alone, so after any fault the same
range is asked for again and the stream goes on at the byte where it was: nothing is read twice or lost, and 64 lanes
need no 64 open connections that a server would close for idling. `datasets`' streaming retries only 429 and 504 and
cannot resume inside a response. huggingface_hub resolves addresses, adds the user's token and keeps the connections.
"""

import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft_pretraining.errors import UserError

CHUNK_BYTES = 1 << 20

_FINAL_STATUS = {
    401: "needs a login",
    403: "is not allowed",
    404: "does not exist",
    410: "is gone",
    451: "is not allowed",
}

# Its own source: a fault in the network must not move the random state of the run.
_jitter = random.SystemRandom()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on after a network fault."""

    attempts: int = 20
    """Tries of one request before the run stops; with the pauses below about a quarter of an hour."""
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 60.0
    """Pauses double from the first to this; each is drawn between half and all of it, so that ranks return apart."""
    timeout_seconds: float = 30.0
    """Without a byte for so long a request has stalled."""

    def pause_seconds(self, attempt: int, retry_after: str | None) -> float:
        """Pause after the failed try number `attempt` (from 0); a server's Retry-After (in seconds) is the least."""
        pause = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0**attempt) * _jitter.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.isdigit():
            return max(pause, min(float(retry_after), 2 * self.longest_pause_seconds))
        return pause


class _TransientError(Exception):
    def __init__(self, reason: str, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class HubFiles:
    """Byte streams of a data set's files. Raises UserError when a file cannot be had."""

    def __init__(
        self,
        dataset: str,
        repository: str,
        revision: str,
        endpoint: str | None = None,
        retry: RetryPolicy | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`dataset` is what the user gave, for messages."""
        self.dataset, self.repository, self.revision, self.endpoint = dataset, repository, revision, endpoint
        self.retry = retry or RetryPolicy()
        self.stop = stop or threading.Event()
        """Set to end a pause between two tries at once."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the file `name`, in pieces of up to CHUNK_BYTES."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, name, repo_type="dataset", revision=self.revision, endpoint=self.endpoint)
        offset, size = 0, None
        while size is None or offset < size:
            content, size = self._retrying(name, url, offset)
            offset += len(content)
            yield content

    def _retrying(self, name: str, url: str, start: int) -> tuple[bytes, int]:
        reason = ""
        for attempt in range(self.retry.attempts):
            try:
                return self._get(url, start)
            except _TransientError as error:
                reason, retry_after = str(error), error.retry_after
            if attempt + 1 < self.retry.attempts:
                pause = self.retry.pause_seconds(attempt, retry_after)
                _logger.warning("%s of %s: %s; trying again in %.1f s", name, self.repository, reason, pause)
                if self.stop.wait(pause):
                    break
        raise UserError(
            f"--dataset {self.dataset}: {name} of {self.repository} could not be read after {self.retry.attempts} "
            f"tries ({reason}). "
            "Check the network and resume with --continue_from auto, or give a downloaded directory as --dataset."
        )

    def _get(self, url: str, start: int) -> tuple[bytes, int]:
        """(bytes from `start`, size of the whole file)."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        # The bytes of the file itself: a server that compresses them once more would break the offsets.
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + CHUNK_BYTES - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            response: Any = get_session().get(url, headers=headers, timeout=self.retry.timeout_seconds)
            content: bytes = response.content
        except Exception as error:
            # The HTTP library under huggingface_hub has changed twice, and with it the classes of its errors. Nothing
            # but
            # the network can fail in these two lines.
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        status = int(response.status_code)
        if status in _FINAL_STATUS:
            raise UserError(
                f"--dataset {self.dataset}: {url} {_FINAL_STATUS[status]} (HTTP status {status}). "
                "Check HF_ENDPOINT and `hf auth login`."
            )
        if status == 200 and start == 0:
            return content, _check_length(content, len(content), response.headers.get("Content-Length"))
        if status != 206:
            raise _TransientError(f"HTTP status {status}", response.headers.get("Retry-After"))
        return content, _range_size(content, start, response.headers.get("Content-Range", ""))


def _check_length(content: bytes, size: int, announced: str | None) -> int:
    if announced is not None and announced.isdigit() and int(announced) != len(content):
        raise _TransientError(f"cut off after {len(content)} of {announced} bytes")
    return size


def _range_size(content: bytes, start: int, content_range: str) -> int:
    """Size of the whole file from "bytes first-last/size", which has to describe `content`."""
    bounds, _, size = content_range.removeprefix("bytes ").partition("/")
    first, _, last = bounds.partition("-")
    if not (first.isdigit() and last.isdigit() and size.isdigit()) or int(first) != start or not content:
        raise _TransientError(f"answered with the range {content_range!r} instead of one from {start}")
    _check_length(content, len(content), str(int(last) - start + 1))
    return int(size)
