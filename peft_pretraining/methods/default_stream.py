"""CUDA's default stream, for kernels of other libraries that know no other.

bitsandbytes 0.50 launches its optimizers and what quantizes blocks there, whatever PyTorch's current stream is. A run
trains in a stream of its own, which does not wait for the default one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def in_default_stream(device: torch.device) -> Iterator[None]:
    """Let the body run in the default stream of a GPU, after all that was launched before and before all that comes."""
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        yield
        return
    ours, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(ours)
    with torch.cuda.stream(default):
        yield
    ours.wait_stream(default)
