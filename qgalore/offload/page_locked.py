"""Page-locked host memory of exactly the size that is asked for, up to a page.

PyTorch's allocator of page-locked memory rounds up to a power of two, which of tens of gigabytes may be as much again.
Here pages of the system are registered with CUDA, and stay so until their owner is gone.
"""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor


class PageLockError(RuntimeError):
    """The system does not lock so much memory."""


def page_locked(owner: object, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors on the host that a CUDA device reads and writes without the host's help.

    They are registered as long as `owner` lives. Raises PageLockError.
    """
    tensors = [pages(shape, dtype) for shape in shapes]
    registered: list[Tensor] = []
    weakref.finalize(owner, _unregister, registered).atexit = False  # CUDA may be gone before
    for tensor in tensors:
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
            raise PageLockError(
                f"the system does not lock {sum(x.nbytes for x in tensors) / 1e9:.1f} GB of host memory"
            )
        registered.append(tensor)
    return tensors


def pages(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor in pages of its own: two that are registered have none in common."""
    memory = mmap.mmap(-1, max(1, shape.numel() * dtype.itemsize))
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape)


def _unregister(tensors: list[Tensor]) -> None:
    if tensors:
        torch.cuda.synchronize()  # a copy may still be under way
    for tensor in tensors:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    tensors.clear()
