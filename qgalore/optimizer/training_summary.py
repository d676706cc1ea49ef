"""What an optimizer trains of a model, and how many bytes its weights and states take: `qgalore.summary`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgalore.config import FULL
from qgalore.layer.linear import LowRankLinear
from qgalore.optimizer import LowRankAdamW

_Holders = Mapping[Tensor, LowRankLinear]
"""Layers by their weight."""


@dataclass(frozen=True)
class TrainingSummary:
    """Counts of matrices, parameters, values and bytes; `str` gives it as a few lines."""

    model: str
    """The class of the model."""
    ranks: tuple[int | str, ...]
    """The ranks that there are, in order; "full" for the whole space."""
    low_rank_matrices: int
    low_rank_values: int
    """In low-rank matrices."""
    stored_bits: dict[str, int]
    """How many of those matrices are stored as "INT8", "INT4" or in a float dtype, by its name."""
    full_rank_parameters: int
    full_rank_values: int
    full_rank_stored_bits: dict[str, int]
    """How many of those parameters are stored as "INT8" or "INT4"."""
    frozen_values: int
    """In parameters and layers that the optimizer does not train."""
    weight_bytes: int
    """Of all parameters, with the scales and zero points of quantized ones."""
    state_bytes: int
    """Of the optimizer, projections among them, from the first update on."""
    notes: tuple[str, ...] = ()
    """What is not as one might expect, each as a sentence."""

    def __str__(self) -> str:
        stored = ", ".join(f"{count} in {kind}" for kind, count in self.stored_bits.items())
        ranks = " and ".join(map(str, self.ranks))
        codes = ", ".join(f"{count} in {kind}" for kind, count in self.full_rank_stored_bits.items())
        whole = self.ranks == (FULL,)
        kind, matrices, others = (
            ("full-rank", "without projections", "others") if whole else ("low-rank", "low-rank", "full-rank")
        )
        rank = "" if whole else f", rank {ranks}"
        lines = [
            f"{self.model} under {kind} training:",
            f"  {matrices}: {self.low_rank_matrices} matrices, {self.low_rank_values:,} values{rank} ({stored})",
            f"  {others}: {self.full_rank_parameters} parameters, {self.full_rank_values:,} values"
            + (f" ({codes})" if codes else ""),
            f"  frozen: {self.frozen_values:,} values",
            f"  bytes: {self.weight_bytes:,} of weights, {self.state_bytes:,} of optimizer states",
        ]
        return "\n".join([line for line in lines if line != "  frozen: 0 values"] + [f"  {x}" for x in self.notes])


def summary(model: nn.Module, optimizer: LowRankAdamW, notes: tuple[str, ...] = ()) -> TrainingSummary:
    """What an optimizer trains of a model; nothing is allocated. notes: sentences to add."""
    holders: _Holders = {layer.weight: layer for layer in model.modules() if isinstance(layer, LowRankLinear)}
    low, rest = list[Tensor](), list[Tensor]()
    for group in optimizer.param_groups:
        (low if "rank" in group else rest).extend(group["params"])
    ranks = {group["rank"] for group in optimizer.param_groups if "rank" in group}
    trained, stored = {*low, *rest}, dict[str, int]()
    coded: dict[str, int] = {}
    for param in rest:
        if (kind := _kind(param, holders.get(param))).startswith("INT"):
            coded[kind] = coded.get(kind, 0) + 1
    for param in low:
        kind = _kind(param, holders.get(param))
        stored[kind] = stored.get(kind, 0) + 1
    return TrainingSummary(
        model=type(model).__name__,
        ranks=tuple(sorted(ranks, key=lambda rank: (isinstance(rank, str), rank))),
        low_rank_matrices=len(low),
        low_rank_values=sum(_shape(param, holders).numel() for param in low),
        stored_bits=stored,
        full_rank_parameters=len(rest),
        full_rank_values=sum(_shape(param, holders).numel() for param in rest),
        full_rank_stored_bits=coded,
        frozen_values=sum(_shape(x, holders).numel() for x in model.parameters() if x not in trained),
        weight_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *_scales(holders)]),
        state_bytes=_state_bytes(optimizer, holders),
        notes=notes,
    )


def _kind(param: Tensor, layer: LowRankLinear | None) -> str:
    if layer is None or layer.quantized_weight is None:
        return str(param.dtype).removeprefix("torch.")
    return f"INT{layer.format.bits}"


def _shape(param: Tensor, holders: _Holders) -> torch.Size:
    layer = holders.get(param)
    return param.shape if layer is None else torch.Size((layer.out_features, layer.in_features))


def _scales(holders: _Holders) -> Iterator[Tensor]:
    for layer in holders.values():
        yield from layer.buffers(recurse=False)


def _state_bytes(optimizer: LowRankAdamW, holders: _Holders) -> int:
    """Counted on the meta device, of parameters that have only the shapes and dtypes of the optimizer's."""
    groups = []
    for group in optimizer.param_groups:
        stand_ins = [
            torch.empty(
                _shape(param, holders), device="meta", dtype=param.dtype if param.is_floating_point() else torch.float32
            )
            for param in group["params"]
        ]
        groups.append({**group, "params": stand_ins})
    states = type(optimizer).initial_states(groups, [])
    return sum(tensor.nbytes for state in states.values() for tensor in state.values())
