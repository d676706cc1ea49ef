"""What of a model's layers waits in host memory, and which pass over a layer needs what of it.

Of the matrices of a layer these are, each if asked for:

- *states*: the moments, or the momentum; and the bases of subspaces with their scales. A backward pass that adds up
  gradients needs the bases alone, which project them; an update needs all.
- *weights*: codes, scales and zero points. Forward and backward passes need them.

A pass over layers enters one after the other and leaves each before it enters the one that has the same slot; the next
one is copied meanwhile. Whatever updates weights that are outside, as `LowRankAdamW.step` does, is let in for that
(`window`). Scalars of a state, vectors such as norms, and what is in no layer stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from qgalore.offload.hosted import Copies, Hosted
from qgalore.offload.side_stream import CudaStreams, HostStreams, Streams
from qgalore.sharding.slots import stored_tensors
from qgalore.update.weight import HOST_STATE, Weight


class Pass(Enum):
    """What is done with a layer."""

    FORWARD = "forward"
    GRADIENTS = "gradients"
    """A backward pass, after which nothing is updated yet."""
    UPDATE = "update"
    """An update, with a backward pass before it or without."""


class Offload:
    """The layers of one optimizer."""

    def __init__(
        self, layers: Sequence[Sequence[Weight]], device: torch.device, weights: bool = False, slots: int = 2
    ) -> None:
        """layers: the weights of each; weights: whether stored weights are on the host, too, and not states alone.

        slots: how many layers may be inside at the same time, or on their way. Raises PageLockError.
        """
        self._layers = [[weight for weight in of_layer if len(weight.shape) > 1] for of_layer in layers]
        self._index = {weight: index for index, of_layer in enumerate(self._layers) for weight in of_layer}
        copies = Copies(streams_of(device), device)
        self._streams = copies.streams
        count = len(self._layers)
        self._bases = Hosted(self._find_bases, copies, count, slots)
        self._moments = Hosted(self._find_moments, copies, count, slots)
        self._weights = Hosted(self._find_weights, copies, count, slots) if weights else None
        self._inside: dict[int, Pass] = {}
        self._refreshing: set[int] = set()
        """Layers inside of which some bases are about to change."""
        if self._weights is not None:
            for weight in self._index:
                weight.home = device
            for index in range(count):
                self._weights.adopt(index)

    def _find_weights(self, index: int) -> list[Tensor]:
        return [tensor for weight in self._layers[index] for tensor in stored_tensors(weight)]

    def _find_bases(self, index: int) -> list[Tensor]:
        return [value for weight in self._layers[index] for key, value in _hosted_state(weight) if "_basis" in key]

    def _find_moments(self, index: int) -> list[Tensor]:
        return [value for weight in self._layers[index] for key, value in _hosted_state(weight) if "_basis" not in key]

    @property
    def hosts_weights(self) -> bool:
        """Whether the stored weights of layers lie on the host, too."""
        return self._weights is not None

    def is_hosted(self, weight: Weight, value: Tensor) -> bool:
        """Whether an entry of the state of a weight lies on the host."""
        return value.dim() > 0 and weight in self._index

    # ---- passes

    def leave_all(self) -> None:
        """End the passes over all layers that are inside, as before a new pass where an error has ended the last."""
        for index in list(self._inside):
            self.leave(index)

    def enter(self, index: int, which: Pass, then: int = 0) -> None:
        """Begin a pass over a layer, after which layer number index + then comes; then: 0 for no other."""
        before = self._inside.get(index)
        if before is not None and before is not which:
            raise RuntimeError(f"layer {index} is inside for another pass already")
        self._inside[index] = which
        if which is not Pass.FORWARD and any(weight.subspace.due for weight in self._layers[index]):
            self._refreshing.add(index)
        for part in self._needed(index, which):
            part.enter(index)
        if then and 0 <= index + then < len(self._layers):
            for part in self._needed(index + then, which):
                part.prefetch(index + then)

    def leave(self, index: int) -> None:
        """End the pass over a layer; nothing where none has begun."""
        which = self._inside.pop(index, None)
        if which is None:
            return
        updated, refreshed = which is Pass.UPDATE, index in self._refreshing
        self._refreshing.discard(index)
        if self._weights is not None:
            self._weights.leave(index, updated)
        if which is not Pass.FORWARD:
            self._bases.leave(index, updated and refreshed)
            self._moments.leave(index, updated or self._sums_in_momentum(index))

    def _needed(self, index: int, which: Pass) -> list[Hosted]:
        parts = [] if self._weights is None else [self._weights]
        if which is Pass.FORWARD:
            return parts
        reads_momentum = self._sums_in_momentum(index) or any(weight.subspace.due for weight in self._layers[index])
        return [*parts, self._bases, *([self._moments] if which is Pass.UPDATE or reads_momentum else [])]

    def _sums_in_momentum(self, index: int) -> bool:
        return any(weight.sums_in_momentum for weight in self._layers[index])

    def by_layer(self, weights: Sequence[Weight]) -> Iterator[list[Weight]]:
        """The weights in parts: those on the device, then those of each layer while it is inside for an update."""
        groups: dict[int, list[Weight]] = {}
        for weight in weights:
            groups.setdefault(self._index.get(weight, -1), []).append(weight)
        if -1 in groups:
            yield groups.pop(-1)
        order = list(groups)
        for number, index in enumerate(order):
            following = order[number + 1] - index if number + 1 < len(order) else 0
            with self._window(index, following):
                yield groups[index]

    @contextlib.contextmanager
    def _window(self, index: int, then: int) -> Iterator[None]:
        if self._inside.get(index) is Pass.UPDATE:
            yield
            return
        self.enter(index, Pass.UPDATE, then)
        yield
        self.leave(index)

    # ---- who reads or writes what is on the host

    def settle(self) -> None:
        """Let the host have what the device has computed: it waits for all copies."""
        self.leave_all()
        self._streams.join()

    def forget(self) -> None:
        """`settle`, before somebody writes to what is on the host."""
        self.settle()
        for part in self._parts:
            part.forget()

    def release(self) -> None:
        """Bring all back to the device."""
        self.settle()
        for part in self._parts:
            part.release()
        for weight in self._index:
            weight.home = None

    @property
    def _parts(self) -> list[Hosted]:
        return [self._bases, self._moments, *([] if self._weights is None else [self._weights])]


def offload_modules(
    modules: Sequence[nn.Module], layers: Sequence[Sequence[Weight]], device: torch.device, weights: bool, slots: int
) -> Offload:
    """An `Offload` of modules, each with its weights, whose state dicts are those of what was computed last.

    Raises ValueError where weights are to be offloaded that are not quantized, PageLockError as `Offload` does.
    """
    floats = [x.name for of_layer in layers for x in of_layer if len(x.shape) > 1 and x.param.is_floating_point()]
    if weights and floats:
        raise ValueError(f"{floats[0]} is float, and only quantized weights are offloaded: leave weights=True out")
    offload = Offload(layers, device, weights, slots)
    for module in modules if weights else ():
        module.register_state_dict_pre_hook(lambda *_: offload.settle())
        module.register_load_state_dict_pre_hook(lambda *_: offload.forget())
    return offload


def _hosted_state(weight: Weight) -> list[tuple[str, Tensor]]:
    found = ((key, weight.state[key]) for key in sorted(weight.state) if key not in HOST_STATE)
    return [(key, value) for key, value in found if value.dim()]


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
