"""The arithmetic of the library: `api` is the one door, `reference` and `triton` are behind it."""

from qgalore.kernels.api import *  # noqa: F403 - so that a new operation has its name in `api` alone
from qgalore.kernels.api import __all__ as __all__
