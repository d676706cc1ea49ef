"""The weights of a stack of layers that lie with their owners, gathered for the layers that run.

Of a layer each rank has what it owns for good: stored weights, codes and scales, and the bases of their subspaces. What
others own is received into one of two buffers, which layers of even and of odd number share, so that the next layer's
weights arrive while one layer runs. A layer's weights are views of its buffer at all times, at addresses that never
change: what autograd has saved in the forward pass is there again when they are gathered for the backward pass, and
nothing is freed or allocated in between. A forward pass needs no bases, and gets none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.slots import Slot, move, size_of
from qgalore.update.all_reduce import Waiting
from qgalore.update.weight import Weight

_BUFFERS = 2


class Gathering:
    """Gathers layers, by their number in the stack."""

    def __init__(self, slots: Sequence[Sequence[Slot]], mesh: ShardMesh) -> None:
        """slots: of the weights of each layer, those of one owner in each; others' weights are given up."""
        self._slots, self._mesh = slots, mesh
        self._present: list[tuple[int, bool] | None] = [None] * _BUFFERS
        """The layer of each buffer, and whether its bases are there."""
        self._works: dict[int, list[Waiting]] = {}
        self._version = -1
        self._buffers: list[Tensor] = []
        self._lay_out(with_bases=False)

    def _lay_out(self, with_bases: bool) -> None:
        """Give all slots their memory."""
        tensors = {
            slot: slot.tensors + (bases_of(slot) if with_bases else []) for of_layer in self._slots for slot in of_layer
        }
        most = max(sum(size_of(tensors[slot]) for slot in of_layer if not slot.owned) for of_layer in self._slots)
        device = next(iter(tensors)).buffer.device
        self._buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        for index, of_layer in enumerate(self._slots):
            start = 0
            for slot in of_layer:
                size = size_of(tensors[slot])
                if slot.owned:
                    slot.buffer = torch.empty(size, dtype=torch.uint8, device=device) if with_bases else slot.buffer
                else:
                    slot.buffer = self._buffers[index % _BUFFERS][start : start + size]
                    start += size
                if with_bases or not slot.owned:
                    move(tensors[slot], slot.buffer, copy=slot.owned)
        self._present = [None] * _BUFFERS

    def begin(self, version: int) -> None:
        """Call before the forward pass of a training step; version: another number if states have been replaced."""
        if version != self._version:
            self._take_bases()
            self._version = version

    def enter(self, index: int, step: int) -> None:
        """Let a layer be here for work that is launched from now on, and begin to gather layer index + step.

        step: 1 in a forward pass, -1 in a backward one, which needs bases, too.
        """
        self.fetch(index, step < 0)
        self.wait(index)
        self.fetch(index + step, step < 0)

    def _take_bases(self) -> None:
        """Let the bases of subspaces, which all weights have by now, lie with their weights."""
        for of_layer in self._slots:
            for slot in of_layer:
                for weight in slot.weights:
                    weight.init_state()
        self._lay_out(with_bases=True)

    def fetch(self, index: int, bases: bool) -> None:
        """Begin to gather a layer, if it is not here; nothing for a number that no layer has."""
        if not 0 <= index < len(self._slots):
            return
        number = index % _BUFFERS
        layer, complete = self._present[number] or (-1, False)
        if layer == index and (complete or not bases):
            return
        self.wait(layer)
        self._present[number] = index, bases
        works = self._works.setdefault(index, [])
        for slot in self._slots[index]:
            start, stop = (
                slot.weight_bytes if layer == index else 0,
                slot.buffer.numel() if bases else slot.weight_bytes,
            )
            if stop > start:
                works.append(self._mesh.broadcast(slot.buffer[start:stop], slot.owner))

    def wait(self, index: int) -> None:
        """Let later work wait for a layer."""
        for work in self._works.pop(index, ()):
            work.wait()

    def forget(self) -> None:
        """From now on what is here of other ranks is of an earlier update."""
        for index in list(self._works):
            self.wait(index)
        self._present = [None] * _BUFFERS


def bases_of(slot: Slot) -> list[Tensor]:
    """The bases of the weights of a slot, in one order on all ranks."""
    found: list[tuple[Weight, str]] = []
    for weight in slot.weights:
        found += [(weight, key) for key in sorted(weight.state) if "_basis" in key]
    return [weight.state[key] for weight, key in found]
