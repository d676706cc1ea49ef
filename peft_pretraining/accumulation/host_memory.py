"""Page-locked host memory of exactly the size that is asked for.

PyTorch's allocator of page-locked memory rounds up to a power of two, which of tens of gigabytes may be as much again.
Here ordinary memory is registered with CUDA, and stays so until its owner is gone.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor

from peft_pretraining.errors import UserError


def free_host_bytes() -> int | None:
    """Bytes of host memory that processes can still take without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def page_locked(owner: object, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors on the host that a CUDA device reads and writes without the host's help.

    They are registered as long as `owner` lives. Raises UserError where the system does not lock so much memory.
    """
    tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
    registered: list[Tensor] = []
    weakref.finalize(owner, _unregister, registered).atexit = False  # CUDA may be gone before
    for tensor in tensors:
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
            raise UserError(
                f"--accumulate_by layer: the system does not lock the {sum(x.nbytes for x in tensors) / 1e9:.1f} GB of "
                "host memory that hold hidden states: give a smaller --total_batch_size, or --accumulate_by micro_batch"
            )
        registered.append(tensor)
    return tensors


def _unregister(tensors: list[Tensor]) -> None:
    if tensors:
        torch.cuda.synchronize()  # a copy may still be under way
    for tensor in tensors:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    tensors.clear()
