"""What a GPU cannot do of a run, in a sentence before the run starts."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from peft_pretraining.config.flag_groups import QuantizationArgs
from peft_pretraining.errors import UserError
from qgalore.kernels import use_triton
from qgalore.update.newton_schulz import asks_for_fp8

_ADA, _AMPERE, _VOLTA = (8, 9), (8, 0), (7, 0)
"""Compute capabilities of NVIDIA: the first with FP8, the first with bfloat16, and the first that Triton compiles
for."""


def check_device(device: torch.device, dtype: str, quantization: QuantizationArgs, newton_schulz: str) -> None:
    """Raise UserError for a GPU that cannot run in the data type of `--dtype`, or not run the kernels or products."""
    check_kernels(device)
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's numbers are others
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    in_triton = use_triton(device)
    problem = problem_of_gpu(name, capability, dtype, in_triton)
    problem = problem or problem_of_products(name, capability, in_triton, quantization)
    if text := problem or problem_of_steps(name, capability, newton_schulz):
        raise UserError(text)


def check_kernels(device: torch.device) -> None:
    """Raise UserError for a `QGALORE_KERNELS` that there is not, or not for a device."""
    try:
        in_triton = use_triton(device)
    except ValueError as error:
        raise UserError(f"{error}; set it anew in the environment, or remove it") from None
    where = "" if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1" else "on a CPU"
    where = where or ("" if find_spec("triton") else "without triton, which is not installed")
    if in_triton and where:
        raise UserError(
            f"QGALORE_KERNELS=triton {where}: Triton's kernels run on a GPU (in tests by TRITON_INTERPRET=1, too): "
            "remove it from the environment, or set it to reference"
        )


def slow_dtype(device: torch.device, dtype: str) -> str | None:
    """A sentence for a CPU that is asked for a data type that it computes slowly; None for any other."""
    if device.type != "cpu" or dtype == "float32":
        return None
    return (
        f"--dtype {dtype} on a CPU: float32 is usually several times as fast there, for more memory; a run keeps the "
        "type that it began with, so begin with --dtype float32"
    )


def emulated_products(device: torch.device, quantization: QuantizationArgs, newton_schulz: str) -> str | None:
    """A sentence for a device that computes what FP8 gives without its speed; None for any other."""
    in_fp8 = ["--fp8_products"] if quantization.fp8_products else []
    in_fp8 += [f"--newton_schulz {newton_schulz}"] if asks_for_fp8(newton_schulz) else []
    if not in_fp8 or (device.type != "cpu" and use_triton(device)):
        return None
    where, instead = "on a CPU", "leaving it out is faster"
    if device.type != "cpu":
        chosen = os.environ.get("QGALORE_KERNELS", "auto")
        where = "without Triton's kernels" if chosen == "auto" else f"with QGALORE_KERNELS={chosen}"
        instead = f"{'installing triton' if chosen == 'auto' else 'leaving QGALORE_KERNELS out'} is faster"
    return (
        f"{' and '.join(in_fp8)} {where}: values are rounded as a GPU rounds them and then multiplied in float32, "
        f"which is slower than without; it shows what FP8 does to the loss, and {instead}"
    )


def problem_of_gpu(name: str, capability: tuple[int, int], dtype: str, in_triton: bool) -> str:
    """The sentence for a GPU of a compute capability, such as (7, 5); "" where there is no problem."""
    number = ".".join(map(str, capability))
    if dtype == "bfloat16" and capability < _AMPERE:
        return (
            f"--dtype bfloat16: {name} has compute capability {number}, and bfloat16 needs 8.0: give --dtype float16, "
            "which scales the loss, or --dtype float32"
        )
    if in_triton and capability < _VOLTA:
        return (
            f"{name} has compute capability {number}, and Triton's kernels need 7.0: set QGALORE_KERNELS=reference in "
            "the environment"
        )
    return ""


def problem_of_products(name: str, capability: tuple[int, int], in_triton: bool, quantization: QuantizationArgs) -> str:
    """The sentence for a GPU without products of the format that is asked for; "" where it has them."""
    number = ".".join(map(str, capability))
    if in_triton and quantization.int8_products and capability < _AMPERE:
        return (
            f"--int8_products: {name} has compute capability {number}, and Triton's products in INT8 need 8.0: leave "
            "--int8_products out"
        )
    if in_triton and quantization.fp8_products and capability < _ADA:
        instead = ", or give --int8_products" if capability >= _AMPERE else ""
        return (
            f"--fp8_products: {name} has compute capability {number}, and products in FP8 need 8.9 (RTX 40, L4, H100 "
            f"and newer): leave --fp8_products out{instead}"
        )
    return ""


def problem_of_steps(name: str, capability: tuple[int, int], newton_schulz: str) -> str:
    """The sentence for a GPU without the products of a method of `--newton_schulz`; "" where it has them."""
    if not asks_for_fp8(newton_schulz) or capability >= _ADA:
        return ""
    number = ".".join(map(str, capability))
    return (
        f"--newton_schulz {newton_schulz}: {name} has compute capability {number}, and products "
        "in FP8 need 8.9 (RTX 40, L4, H100 and newer): give --newton_schulz muon"
    )
