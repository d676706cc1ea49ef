"""The decoder's matrices in the form of `--method` by their bytes alone, for the memory plan.

So a plan takes no time and needs neither peft nor bitsandbytes. A test holds it to what these allocate.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from peft_pretraining.config.flag_groups import MethodArgs
from peft_pretraining.models.init import OnModule
from peft_pretraining.models.network import CausalLM

_NF4_BLOCK, _SCALE_BLOCK = 64, 256
_TABLES = 4 * (16 + 256) + 4
"""Of the 16 values of NF4 and the 256 of its scales, which each layer has for itself, and of the mean of the scales."""


class PlannedMatrix(nn.Module):
    """Tensors on the meta device with the sizes of a decoder matrix in another form."""

    def __init__(self, linear: nn.Linear, method: MethodArgs, rank: int) -> None:
        """linear: the matrix, on the meta device and in the data type of the run."""
        super().__init__()
        weight, (rows, columns) = linear.weight, linear.weight.shape
        self.factor_A = nn.Parameter(weight.new_empty(rank, columns))
        self.factor_B = nn.Parameter(weight.new_empty(rows, rank))
        self.bias = linear.bias
        if method.method == "qlora":
            size = frozen_bytes(rows, columns, method.qlora_bits)
            self.register_buffer("frozen", torch.empty(size, dtype=torch.uint8, device="meta"))
        elif method.method != "low_rank":
            self.frozen = nn.Parameter(weight.detach(), requires_grad=False)


def frozen_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix in a layer of `methods.frozen`."""
    size = rows * columns
    if bits == 8:
        return size + 4 * rows
    blocks = math.ceil(size / _NF4_BLOCK)
    return math.ceil(size / 2) + blocks + 4 * math.ceil(blocks / _SCALE_BLOCK) + _TABLES


def planned_converter(method: MethodArgs, rank: int | str) -> OnModule:
    """What `matrix_converter` is to a model with memory."""
    assert isinstance(rank, int)

    def convert(model: CausalLM, name: str) -> None:
        linear = model.get_submodule(name)
        if model.is_decoder_matrix(name) and isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PlannedMatrix(linear, method, rank))

    return convert
