"""Warnings about a data set while it is opened."""

import functools
import logging

_logger = logging.getLogger(__name__)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning unless it was logged before: a data set is opened several times."""
    _logger.warning("%s", message)
