"""The memory of what one rank writes and the others receive: the weights of a layer that it owns, in one piece.

A quantized matrix is codes, scales and zero points. Moved into one buffer, those of all matrices of a layer that one
rank owns are one message, which is read from the weights and written to them without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.sharding.deal import SMALL, layer_of, row_ranges
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import Waiting
from qgalore.update.weight import Weight

_ALIGNMENT = 256
"""Bytes: at least what kernels want of a tensor's address, and what PyTorch's allocator gives."""


class Slot:
    """Weights of one owner, stored in one buffer."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        """Move the weights there; the parameters stay the same objects."""
        self.owner, self.waiting = weights[0].owner, set(weights)
        self.weights = tuple(weights)
        tensors = [tensor for weight in weights for tensor in stored_tensors(weight)]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self.buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=weights[0].param.device)
        for tensor, part in zip(tensors, self.buffer.split(sizes), strict=True):
            tensor.data = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.data)


def stored_tensors(weight: Weight) -> list[Tensor]:
    """What holds a weight: of a quantized one codes, scales and zero points."""
    layer = weight.layer
    if layer is None or layer.weight_scale is None or layer.weight_zero_point is None:
        return [weight.param]
    return [layer.weight, layer.weight_scale, layer.weight_zero_point]


class Slots:
    """The slots of a model, and the messages of those whose weights have been updated."""

    def __init__(self, weights: Sequence[Weight], mesh: ShardMesh) -> None:
        """Move weights into slots: by layer and owner, the small ones by owner; not those that are dealt by rows."""
        grouped: dict[tuple[str, int], list[Weight]] = {}
        self._by_rows = {weight for weight in weights if weight.rows is not None}
        for weight in weights:
            if weight in self._by_rows:
                continue
            layer = layer_of(weight.name) if weight.shape.numel() > SMALL else ""
            grouped.setdefault((layer, weight.owner), []).append(weight)
        self._mesh = mesh
        self._slots = [Slot(alike) for alike in grouped.values()]
        self._slot_of = {weight: slot for slot in self._slots for weight in slot.weights}
        self._works: list[Waiting] = []

    def publish(self, weights: Iterable[Weight]) -> None:
        """Send each slot of which all weights have been updated."""
        for weight in weights:
            if weight in self._by_rows:
                self._works += [
                    self._mesh.broadcast(kernels.rows_of(weight.param.data, start, stop), owner)
                    for owner, (start, stop) in enumerate(row_ranges(weight.shape, self._mesh.size))
                ]
                continue
            slot = self._slot_of[weight]
            slot.waiting.discard(weight)
            if not slot.waiting:
                self._send(slot)

    def finish(self) -> None:
        """Send slots of which only some weights have been updated, and let later work wait for all that were sent."""
        for slot in self._slots:
            if len(slot.waiting) < len(slot.weights):
                self._send(slot)
        for work in self._works:
            work.wait()
        self._works.clear()

    def _send(self, slot: Slot) -> None:
        self._works.append(self._mesh.broadcast(slot.buffer, slot.owner))
        slot.waiting = set(slot.weights)
