"""Warnings about a data set while it is opened."""

import functools
import logging
import os

_logger = logging.getLogger(__name__)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning unless it was logged before: a data set is opened several times, and by all ranks of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _logger.warning("%s", message)
