"""Quantized weights in state dicts: codes have a name that no float model takes, and nothing is taken for codes.

Under the name `weight`, codes would be copied into a float layer as they are, as weights from 0 to 255, and float
weights into codes; torch and transformers convert dtypes in silence. State dicts from before have them there: beside
scales, integers of that name are still read as codes. Where the dequantized weight is there, too, as `save_pretrained`
writes it (`qgalore.layer.export`), a quantized layer reads the codes and a float one the floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WEIGHT, CODES, SCALE = "weight", "weight_qdata", "weight_scale"
ZERO_POINT, FORMAT = "weight_zero_point", "weight_format"
PARTS = (CODES, SCALE, ZERO_POINT, FORMAT)
"""What stands for a quantized weight in a state dict."""
_START = "stored weights do not fit the layers' formats"


def entries_for(
    state_dict: Mapping[str, Any], prefix: str, bits: int | None, group_size: int, columns: int
) -> dict[str, Any] | str:
    """The entries of a layer with its codes, if it has any, under the name of the parameter.

    bits, group_size, columns: of the layer's codes; bits are None where its weight is float. Gives a sentence instead
    where a weight of another format would be loaded.
    """
    entries = dict(state_dict)
    weight, codes = entries.get(f"{prefix}{WEIGHT}"), entries.pop(f"{prefix}{CODES}", None)
    format = entries.pop(f"{prefix}{FORMAT}", None)
    if codes is None and _is_codes(weight) and f"{prefix}{SCALE}" in entries:
        codes = weight
    here = "float" if bits is None else _described(bits, group_size)
    start = f"{_START}: {prefix}{WEIGHT} is {here} here and"
    if bits is None:
        if not _is_codes(weight) and (codes is None or weight is not None):
            return dict(state_dict)  # codes beside floats are unexpected, as they are to nn.Linear
        return f"{start} {_stored(format)} there. Convert the model to the format of the state dict before it is loaded"
    if codes is None and weight is not None:
        return f"{start} {weight.dtype} there. Load float weights into the model before convert_linears"
    if codes is not None and not _is_codes(codes):
        return f"{start} {codes.dtype} there, where codes are torch.uint8"
    if format is not None:
        stored_bits, stored_size = format.tolist()
        if (stored_bits, min(stored_size, columns)) != (bits, min(group_size, columns)):
            return f"{start} {_described(stored_bits, stored_size)} there. Convert the model with that WeightFormat"
    if codes is not None:
        entries[f"{prefix}{WEIGHT}"] = codes
    return entries


def add_refusal(messages: list[str], sentence: str) -> None:
    """Add a sentence of `entries_for` to the errors of a load: the first, which stands for all layers."""
    if not any(message.startswith(_START) for message in messages):
        messages.append(sentence)


def _is_codes(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype == torch.uint8


def _described(bits: object, group_size: object) -> str:
    return f"{bits} bits in groups of {group_size}"


def _stored(format: Tensor | None) -> str:
    return "quantized" if format is None else _described(*format.tolist())
