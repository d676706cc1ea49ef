"""The memory of what one rank writes and the others receive: the weights of a layer that it owns, in one piece.

A quantized matrix is codes, scales and zero points. Moved into one buffer, those of all matrices of a layer that one
rank owns are one message, which is read from the weights and written to them without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.sharding.deal import layer_of, row_ranges
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import Waiting
from qgalore.update.weight import Weight

_ALIGNMENT = 256
"""Bytes: at least what kernels want of a tensor's address, and what PyTorch's allocator gives."""


class Slot:
    """Weights of one owner, stored in one buffer."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        """Move the weights there; the parameters stay the same objects."""
        self.owner, self.owned, self.waiting = weights[0].owner, weights[0].owned, set(weights)
        self.weights = tuple(weights)
        self.tensors = [tensor for weight in weights for tensor in stored_tensors(weight)]
        self.weight_bytes = size_of(self.tensors)
        given_up = not self.owned and any(map(is_given_up, self.tensors))
        self.buffer = torch.empty(
            0 if given_up else self.weight_bytes, dtype=torch.uint8, device=weights[0].param.device
        )
        if not given_up:
            move(self.tensors, self.buffer)


def give_up(tensor: Tensor) -> None:
    """Free the memory of a tensor, which keeps its shape: every value is the same zero."""
    tensor.data = torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def is_given_up(tensor: Tensor) -> bool:
    """Whether `give_up` has freed a tensor."""
    return tensor.numel() > 1 and not any(tensor.stride())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of a buffer for tensors."""
    return sum(map(_aligned, tensors))


def move(tensors: Sequence[Tensor], buffer: Tensor, copy: bool = True) -> None:
    """Let tensors be views of a buffer, one behind the other; `copy` what they have been."""
    for tensor, view in zip(tensors, views_of(buffer, tensors), strict=True):
        tensor.data = view.copy_(tensor.data) if copy else view


def views_of(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer, which may have more bytes, of the shapes and dtypes of tensors, one behind the other."""
    parts = buffer[: size_of(tensors)].split([_aligned(tensor) for tensor in tensors])
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    ]


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def stored_tensors(weight: Weight) -> list[Tensor]:
    """What holds a weight: of a quantized one codes, scales and zero points."""
    layer = weight.layer
    if layer is None or layer.weight_scale is None or layer.weight_zero_point is None:
        return [weight.param]
    return [layer.weight, layer.weight_scale, layer.weight_zero_point]


class Slots:
    """The slots of a model, and the messages of those whose weights have been updated."""

    def __init__(self, weights: Sequence[Weight], mesh: ShardMesh) -> None:
        """Move weights into slots: by layer and owner, vectors by owner; not those that are dealt by rows."""
        grouped: dict[tuple[str, int], list[Weight]] = {}
        self._by_rows = {weight for weight in weights if weight.rows is not None}
        for weight in weights:
            if weight in self._by_rows:
                continue
            layer = layer_of(weight.name) if len(weight.shape) > 1 else ""
            grouped.setdefault((layer, weight.owner), []).append(weight)
        self._mesh = mesh
        self._slots = [Slot(alike) for alike in grouped.values()]
        self._gathered: set[Weight] = set()
        self._slot_of = {weight: slot for slot in self._slots for weight in slot.weights}
        self._works: list[Waiting] = []

    def take_matrices(self, weights: Iterable[Weight]) -> list[Slot]:
        """The slots of the matrices of a layer, which are sent no more from here: others gather them."""
        chosen = [weight for weight in weights if weight not in self._by_rows and len(weight.shape) > 1]
        self._gathered.update(chosen)
        slots = list(dict.fromkeys(self._slot_of.pop(weight) for weight in chosen))
        self._slots = [slot for slot in self._slots if slot not in slots]
        return slots

    def take_rows(self, weights: Iterable[Weight]) -> list[Weight]:
        """Of some weights those that are dealt by rows, which are sent no more from here: others gather them."""
        chosen = [weight for weight in weights if weight in self._by_rows]
        self._gathered.update(chosen)
        return chosen

    def is_gathered(self, weight: Weight) -> bool:
        """Whether what another rank owns of a weight is here only while it is used."""
        return weight in self._gathered

    def publish(self, weights: Iterable[Weight]) -> None:
        """Send each slot of which all weights have been updated."""
        for weight in weights:
            if weight in self._gathered:
                continue
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
