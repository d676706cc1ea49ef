"""What a GPU cannot do of a run, in a sentence before the run starts."""

from __future__ import annotations

import torch

from peft_pretraining.errors import UserError
from qgalore.kernels import use_triton

_BFLOAT16, _TRITON = (8, 0), (7, 0)
"""The compute capabilities of NVIDIA that these need: Ampere's, and Volta's."""


def check_device(device: torch.device, dtype: str) -> None:
    """Raise UserError for a GPU that cannot run in the data type of `--dtype`, or not run the kernels."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's numbers are others
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if text := problem_of_gpu(name, capability, dtype, use_triton(device)):
        raise UserError(text)


def problem_of_gpu(name: str, capability: tuple[int, int], dtype: str, in_triton: bool) -> str:
    """The sentence for a GPU of a compute capability, such as (7, 5); "" where there is no problem."""
    number = ".".join(map(str, capability))
    if dtype == "bfloat16" and capability < _BFLOAT16:
        return (
            f"--dtype bfloat16: {name} has compute capability {number}, and bfloat16 needs 8.0: give --dtype float16, "
            "which scales the loss, or --dtype float32"
        )
    if in_triton and capability < _TRITON:
        return (
            f"{name} has compute capability {number}, and Triton's kernels need 7.0: set QGALORE_KERNELS=reference in "
            "the environment"
        )
    return ""
