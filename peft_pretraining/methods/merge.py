"""A state dict of a run with factors or adapters as that of the plain model: its names, and one float matrix for each.

Adapters are added in float32 and the sum is rounded once, to floats: rounded to NF4 again, or to 8 bits, it would lose
an adapter that is small beside the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.config.flag_groups import MethodArgs
from peft_pretraining.methods.adapters import BASE, A, B
from peft_pretraining.methods.factored import FACTORS


def merged_entries(
    state: Mapping[str, Any], method: MethodArgs, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the entries of the plain model, one matrix at a time; other entries as they are.

    dtype: of the matrices, None for that of their factors.
    """
    names = FACTORS if method.method == "low_rank" else (A, B)
    prefixes = {name.removesuffix(names[0]) for name in state if name.endswith(f".{names[0]}")}
    made = set[str]()
    for name, value in state.items():
        prefix = next((start for start in _starts(name) if start in prefixes), None)
        if prefix is None:
            yield name, value
            continue
        if prefix not in made:
            made.add(prefix)
            first, second = (state[f"{prefix}{each}"] for each in names)
            weight = merged(_base(state, prefix, first, second, method), first, second, method)
            yield f"{prefix}weight", weight.to(dtype or first.dtype)
        if name.endswith(".bias"):
            yield f"{prefix}bias", value


def merged(base: Tensor | None, first: Tensor, second: Tensor, method: MethodArgs) -> Tensor:
    """The float32 matrix W + (alpha / rank) B A, or B A where there is no W."""
    product = second.float() @ first.float()
    return product if base is None else base.float().add(product, alpha=method.lora_alpha / len(first))


def _base(
    state: Mapping[str, Any], prefix: str, first: Tensor, second: Tensor, method: MethodArgs
) -> Tensor | None:  # fmt: skip
    start = f"{prefix}{BASE}."
    if method.method == "low_rank":
        return None
    if method.method != "qlora":
        weight: Tensor = state[f"{start}weight"]
        return weight
    from peft_pretraining.methods.frozen import dequantized

    own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    own.pop("bias", None)
    return dequantized(own, (second.shape[0], first.shape[1]), method.qlora_bits)


def _starts(name: str) -> Iterator[str]:
    """The beginnings of a dotted name, with their dots, from the longest."""
    while "." in name.rstrip("."):
        name = name.rstrip(".").rpartition(".")[0] + "."
        yield name
