"""Tensors of a stack of layers that lie in host memory, and on the device while their layer is inside its slot.

Of each layer there is a *block*: its tensors behind each other, in one buffer of the host. On the device a few *slots*
have room for one block each, which layers use in turn. While a layer is outside, its tensors are views of the host's
buffer, so that who saves, loads or hashes them needs to know nothing of all this; while it is inside they are views of
its slot, at addresses that never change: what autograd or a CUDA graph has noted of them is there again.

What keeps copies right is an event each:

- a block is copied to its slot after the computation that used the slot before, and after the copy from the slot to
  the host that followed it: the block's own newest one, or one after that, since a layer has the same slot each time;
- what is computed with a layer begins after its block has come, and after the slot's newest copy to the host, since it
  may write there;
- a block that was written goes to the host after that was computed.

So the host waits for nothing. What is in a slot stays valid until another layer needs it: a layer that comes again
at once is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgalore.offload.page_locked import page_locked, pages
from qgalore.offload.side_stream import Event, SideStream, Streams
from qgalore.sharding.slots import size_of, views_of

Find = Callable[[int], list[Tensor]]
"""find(index) -> the tensors of a layer that exist by now, in one order at all times."""


class Copies:
    """The two side streams of a device that all parts of layers share, so that the link is busy in both directions."""

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self.streams, self.device = streams, device
        self.to_device: SideStream = streams.side_stream()
        self.to_host: SideStream = streams.side_stream()


class _Block:
    """The tensors of a layer, in host memory."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        """Copy them there; raises PageLockError where the system does not lock so much memory for a CUDA `device`."""
        self.tensors, self.nbytes = tensors, size_of(tensors)
        shape = torch.Size((self.nbytes,))
        self.host = page_locked(self, [shape], torch.uint8)[0] if device.type == "cuda" else pages(shape, torch.uint8)
        self._views = views_of(self.host, tensors)
        self._in_slot: tuple[Tensor, list[Tensor]] | None = None
        for tensor, view in zip(tensors, self._views, strict=True):
            view.copy_(tensor.data)
        self.be_outside()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the block is of these tensors."""
        return len(tensors) == len(self.tensors) and all(map(_is, tensors, self.tensors))

    def be_outside(self) -> None:
        """Let the tensors be those of the host."""
        for tensor, view in zip(self.tensors, self._views, strict=True):
            tensor.data = view

    def be_inside(self, buffer: Tensor) -> None:
        """Let the tensors be those of a slot."""
        if self._in_slot is None or self._in_slot[0] is not buffer:
            self._in_slot = buffer, views_of(buffer, self.tensors)
        for tensor, view in zip(self.tensors, self._in_slot[1], strict=True):
            tensor.data = view


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


class _Slot:
    """Memory of the device for one block."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.layer: int | None = None
        """The layer whose block is here, or on its way."""
        self.inside = False
        """Whether it is in use."""
        self.ready: Event | None = None
        """When the block has come."""
        self.free: Event | None = None
        """When the slot may be written to."""


class Hosted:
    """One kind of tensors of all layers, such as their optimizer states."""

    def __init__(self, find: Find, copies: Copies, layers: int, slots: int) -> None:
        """slots: how many layers may be inside, or on their way, at the same time."""
        self._find, self._copies, self._blocks = find, copies, dict[int, _Block]()
        self._slots = [_Slot() for _ in range(min(slots, layers))]

    def prefetch(self, index: int) -> None:
        """Begin to copy a layer to its slot, if it has tensors and the slot is not in use."""
        slot, block = self._slot(index), self._blocks.get(index)
        if block is None or slot.inside or slot.layer == index:
            return
        if slot.buffer is None or slot.buffer.numel() < block.nbytes:
            if slot.buffer is not None:  # copies of before may be under way
                self._copies.streams.join()
            most = max(block.nbytes for block in self._blocks.values())
            slot.buffer = torch.empty(most, dtype=torch.uint8, device=self._copies.device)
            slot.free = self._copies.streams.mark()  # of who had the memory before
        after = [] if slot.free is None else [slot.free]
        out = slot.buffer[: block.nbytes]
        slot.layer, slot.ready = index, self._copies.to_device.copy(out, block.host, after)

    def enter(self, index: int) -> None:
        """Let the tensors of a layer that exist be on the device, for what is computed from now on."""
        self.adopt(index)
        if index not in self._blocks:
            return
        slot = self._slot(index)
        if slot.inside and slot.layer != index:
            raise RuntimeError(f"layer {index} needs the slot in which layer {slot.layer} still is")
        self.prefetch(index)
        assert slot.buffer is not None
        for event in (slot.ready, slot.free):
            if event is not None:
                self._copies.streams.wait(event)
        slot.inside = True
        self._blocks[index].be_inside(slot.buffer)

    def leave(self, index: int, written: bool) -> None:
        """Let them be on the host again; written: whether they have changed. Those that are new come there, too."""
        slot, block = self._slot(index), self._blocks.get(index)
        if slot.inside and slot.layer == index:
            slot.inside = False
            slot.free = self._copies.streams.mark()
            if block is not None and written and block.holds(self._find(index)):
                assert slot.buffer is not None
                source = slot.buffer[: block.nbytes]
                slot.free = self._copies.to_host.copy(block.host, source, [slot.free])
        if not self.adopt(index) and block is not None:
            block.be_outside()

    def adopt(self, index: int) -> bool:
        """Move tensors to a block on the host if they are new; returns whether they were. Then the host waits."""
        tensors = self._find(index)
        block = self._blocks.get(index)
        if not tensors or (block is not None and block.holds(tensors)):
            return False
        self._copies.streams.join()
        self._blocks[index] = _Block(tensors, self._copies.device)
        slot = self._slot(index)
        if slot.layer == index:
            slot.layer = None
        return True

    def forget(self) -> None:
        """From now on what is in slots is old: somebody writes to the host's tensors. All layers are outside."""
        for slot in self._slots:
            slot.layer = None

    def release(self) -> None:
        """Give all tensors memory of their own on the device."""
        for block in self._blocks.values():
            for tensor in block.tensors:
                tensor.data = tensor.data.to(self._copies.device, copy=True)
        self._blocks.clear()
        self.forget()

    def _slot(self, index: int) -> _Slot:
        return self._slots[index % len(self._slots)]
