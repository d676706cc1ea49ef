"""Throughput, model FLOPs utilisation and memory of a run.

Model FLOPs utilisation follows PaLM (arXiv 2204.02311, appendix B): 6 FLOPs a token for every weight that is
multiplied, plus 12 x layers x hidden x length for attention; recomputed activations and quantization do not count.
Peaks are the makers' dense bfloat16 figures.
"""

import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from qgalore.layer.linear_names import linear_layers, shape_of

GIGABYTE = 10**9

# FLOP/s, dense bfloat16 with float32 accumulation; a device has the longest name that is part of its own.
PEAK_FLOPS: Mapping[str, float] = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}


def matmul_parameters(model: nn.Module) -> int:
    """The number of weights of all linear layers, quantized or not, without the embedding."""
    return sum(math.prod(shape_of(layer)) for layer in linear_layers(model).values())


def train_flops_per_token(matmul_parameters: int, num_layers: int, hidden_size: int, max_length: int) -> float:
    """FLOPs of forward and backward for one token; `matmul_parameters` without the embedding table."""
    return 6.0 * matmul_parameters + 12.0 * num_layers * hidden_size * max_length


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak in FLOP/s of a GPU by `torch.cuda.get_device_name`, None for one that is not listed."""
    words = device_name.replace("-", " ").split()
    matching = [name for name in PEAK_FLOPS if set(name.split()) <= set(words)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


class ThroughputMeter:
    """Measures tokens per second over the updates since the last report, without the time between updates."""

    def __init__(self, flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops`: the sum over all ranks, in FLOP/s; None: no utilisation is reported."""
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._update_start = 0.0
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._wait_seconds = 0.0
        self._tokens = self._updates = 0

    def start_update(self) -> None:
        """Start to time an update."""
        self._update_start = time.perf_counter()

    def finish_update(self, tokens: int, wait_seconds: float) -> None:
        """Stop timing an update of `tokens` over all ranks; this rank waited `wait_seconds` of it for data."""
        self._seconds += time.perf_counter() - self._update_start
        self._wait_seconds += wait_seconds
        self._tokens += tokens
        self._updates += 1

    def report(self) -> dict[str, float]:
        """The metrics of the updates since the last report; empty if there was none."""
        if not self._updates:
            return {}
        seconds = max(self._seconds, 1e-9)
        rate = self._tokens / seconds
        metrics = {
            "throughput/tokens_per_second": rate,
            "time/update_seconds": seconds / self._updates,
            "data/wait_fraction": min(1.0, self._wait_seconds / seconds),
        }
        if self._peak_flops:
            metrics["throughput/mfu"] = rate * self._flops_per_token / self._peak_flops
        self._reset()
        return metrics


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory in GB (10^9 bytes): allocated and reserved on CUDA, resident in this process on the CPU."""
    if device.type == "cuda":
        return {
            "memory/peak_gb": torch.cuda.max_memory_allocated(device) / GIGABYTE,
            "memory/reserved_gb": torch.cuda.max_memory_reserved(device) / GIGABYTE,
        }
    return {"memory/peak_gb": _peak_resident_bytes() / GIGABYTE}


def _peak_resident_bytes() -> int:
    # getrusage keeps the peak of the program that started this one, Linux' VmHWM does not.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
