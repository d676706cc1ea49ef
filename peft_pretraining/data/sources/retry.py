"""Retry requests after network faults, with growing pauses, up to an error for the user."""

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from peft_pretraining.errors import UserError

T = TypeVar("T")

# A generator of its own: a network fault must not change the random state of the run.
_jitter = random.SystemRandom()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and with which pauses to retry after a network fault."""

    attempts: int = 20
    """Tries of one request before the run stops; with the pauses below about a quarter of an hour."""
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 60.0
    """Pauses double from the first to this; each is drawn between half and all of it, so that ranks do not retry
    together."""
    timeout_seconds: float = 30.0
    """A request that gets no byte for this long has failed."""

    def pause_seconds(self, attempt: int, retry_after: str | None) -> float:
        """The pause after failed try `attempt` (from 0), at least a server's Retry-After (in seconds)."""
        pause = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0**attempt) * _jitter.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.isdigit():
            return max(pause, min(float(retry_after), 2 * self.longest_pause_seconds))
        return pause


class TransientError(Exception):
    """A fault after which the same request may succeed."""

    def __init__(self, reason: str, retry_after: str | None = None, unreachable: bool = False) -> None:
        """`retry_after`: the server's header. `unreachable`: there was no connection at all."""
        super().__init__(reason)
        self.retry_after, self.unreachable = retry_after, unreachable


class UnreachableError(UserError):
    """The server has never answered."""


@dataclass
class Reading:
    """A data set that is being read from the hub: its name for error texts, and how its requests are retried."""

    dataset: str
    """The value of `--dataset`."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end a pause between two tries at once."""
    endpoint: str | None = None
    """Address of the hub; None: that of HF_ENDPOINT."""
    answered: bool = False
    """Whether the server has answered yet: before that fewer tries are made."""
    failure: UserError | None = None
    """The error that ended reading a file, in case a library between here and the reader hides it."""

    def retrying(self, what: str, attempt: Callable[[], T], unreachable_attempts: int | None = None) -> T:
        """Call `attempt` again after each TransientError and return its result. Raises UserError after the last try.

        Raises UnreachableError after `unreachable_attempts` tries without a connection.
        """
        reason, attempts = "", self.retry.attempts
        for number in range(attempts):
            try:
                return attempt()
            except TransientError as error:
                reason, retry_after = str(error), error.retry_after
                if error.unreachable and unreachable_attempts is not None and number + 1 >= unreachable_attempts:
                    raise UnreachableError(reason) from error
            if number + 1 < attempts:
                pause = self.retry.pause_seconds(number, retry_after)
                _logger.warning("%s: %s; trying again in %.1f s", what, reason, pause)
                if self.stop.wait(pause):
                    break
        raise self.error(
            f"{what} could not be read after {attempts} tries ({reason}). Check the network and resume with "
            "--continue_from auto, or give a downloaded folder as --dataset."
        )

    def unreachable(self, endpoint: str, error: Exception) -> UserError:
        """The error for a hub that does not answer at the start."""
        return self.error(
            f"the hub ({endpoint}) cannot be reached ({error}). Check the network and HF_ENDPOINT. Without a network, "
            "--dataset pydocs needs no download, and a folder of files that were downloaded before can be given as "
            "--dataset."
        )

    def error(self, what: str) -> UserError:
        """A UserError that begins with the flag."""
        return UserError(f"--dataset {self.dataset}: {what}")
