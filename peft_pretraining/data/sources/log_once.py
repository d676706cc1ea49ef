"""What is said of a data set while it is opened."""

import functools
import logging

_logger = logging.getLogger(__name__)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning, but not the same again: both splits are opened, and more than once."""
    _logger.warning("%s", message)
