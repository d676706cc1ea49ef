"""Frozen linear layers in 4 or 8 bits, by bitsandbytes.

4 bits are NF4 in blocks of 64 values whose scales are 8-bit codes themselves (QLoRA, Dettmers et al., arXiv
2305.14314); 8 bits are the rows of LLM.int8() (arXiv 2208.07339), with transformers' threshold of 6 for outliers of
activations. Both layers are the library's with a state dict of their own, which they can load (the library's layer of 4
bits cannot load what it writes): tensors whose names, shapes and types depend on the layer's sizes alone, so that a
checkpoint can be compared with the model before anything is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from peft_pretraining.methods.default_stream import in_default_stream

# It says so at each product that is not of float16, hundreds of times an update.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "will be cast" not in record.getMessage()
)

_OUTLIERS = 6.0
_Entries = dict[str, Any]


class FrozenNF4(bitsandbytes.nn.Linear4bit):
    """A frozen linear layer in NF4."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """weight (out_features, in_features) in floats, bias (out_features,)."""
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        self.bias = bias
        # Else an evaluation on some CPUs would leave the codes in a layout that no backward pass reads.
        self.support_avx512bf16_for_cpu = False
        self.store_(weight)

    def store_(self, weight: Tensor) -> None:
        """Replace the weight by float values, quantized where they are."""
        weight = weight.to(self.compute_dtype).contiguous()  # dequantized it has the data type that it had
        made = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        with in_default_stream(weight.device):
            self.weight = made.to(weight.device)

    def dequantized(self) -> Tensor:
        """The weight in float32."""
        weight: Tensor = bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight.float()

    def _statistics(self) -> dict[str, Tensor]:
        state = self.weight.quant_state
        return {"absmax": state.absmax, "nested_absmax": state.state2.absmax, "nested_offset": state.offset}

    def _save_to_state_dict(self, destination: _Entries, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update({f"{prefix}weight.{key}": value for key, value in self._statistics().items()})

    def _load_from_state_dict(self, state_dict: _Entries, prefix: str, *args: Any) -> None:
        _copy_and_load(self, self._statistics(), state_dict, f"{prefix}weight.", prefix, args)


class FrozenInt8(bitsandbytes.nn.Linear8bitLt):
    """A frozen linear layer in 8 bits, with a scale for each row."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """See `FrozenNF4`."""
        rows, columns = weight.shape
        super().__init__(
            columns, rows, bias=False, has_fp16_weights=False, threshold=_OUTLIERS, device="meta"
        )  # fmt: skip
        self.bias = bias
        self.store_(weight)

    def store_(self, weight: Tensor) -> None:
        """See `FrozenNF4`."""
        made = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        with in_default_stream(weight.device):
            self.weight = made.to(weight.device)  # which quantizes what comes from the CPU alone
        self.state.CB = self.state.SCB = None

    def dequantized(self) -> Tensor:
        """See `FrozenNF4`."""
        weight: Tensor = self.weight.data.float() * (self._scale()[:, None] / 127)
        return weight

    def _scale(self) -> Tensor:
        """(out_features,), the largest magnitude of each row; the first forward pass puts it in another place."""
        scale: Tensor = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        return scale

    def _save_to_state_dict(self, destination: _Entries, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = self._scale()

    def _load_from_state_dict(self, state_dict: _Entries, prefix: str, *args: Any) -> None:
        _copy_and_load(self, {"SCB": self._scale()}, state_dict, prefix, prefix, args)


FrozenLinear = FrozenNF4 | FrozenInt8


def frozen(linear: nn.Linear, bits: int) -> FrozenLinear:
    """A linear layer with its weight frozen in 4 or 8 bits; its bias stays the same parameter."""
    return (FrozenNF4 if bits == 4 else FrozenInt8)(linear.weight.data, linear.bias)


def dequantized(entries: Mapping[str, Tensor], shape: tuple[int, int], bits: int) -> Tensor:
    """The weight (out_features, in_features) of a state dict of a `FrozenLinear` in float32.

    Raises KeyError where an entry is missing.
    """
    layer = (FrozenNF4 if bits == 4 else FrozenInt8)(torch.zeros(shape), None)
    layer.load_state_dict(dict(entries))
    return layer.dequantized()


def _copy_and_load(
    layer: nn.Module, statistics: Mapping[str, Tensor], state_dict: _Entries, start: str, prefix: str, args: Any
) -> None:
    """Copy what a state dict has of the statistics, by names that begin with `start`, and load the rest as usual."""
    rest = dict(state_dict)
    for key, value in statistics.items():
        value.copy_(rest.pop(f"{start}{key}"))
    nn.Module._load_from_state_dict(layer, rest, prefix, *args)
