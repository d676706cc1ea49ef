"""A stack of layers whose training step is replayed from CUDA graphs: one launch where Python would make thousands.

A step through a LLaMA with low-rank weights is about a hundred kernels a layer. On a small model a GPU finishes them
sooner than Python can ask for them. Here the forward pass of all layers is one graph, and each layer has another for
its backward pass together with the updates of its weights, which happen as soon as their gradients are there.

Where the weights of a layer come before it runs, from the ranks that own them or from the host, a pass of each layer
forward is a graph of its own, since what brings them is part of none: a graph reads the memory into which they come,
whose addresses never change.

Where the update waits, for more micro-batches or for the norm of all gradients, a layer's graph adds its gradients to
sums at fixed addresses, and the optimizer updates from Python.

Nothing is computed otherwise: the graphs are captured from the ordinary code, and hold the same kernels in the same
order, but that a layer's quantized matrices are dequantized as a group (`qgalore.graphs.dequant_cache`). What changes
from step to step (seeds, learning rates, bias corrections) is read from a table on the device, one row a weight,
written before each backward pass. A layer in which a subspace is to be refreshed runs its backward pass from Python
that time, over what the graph of the forward pass has saved.

The autograd graphs of the captured forward passes are kept, so that a layer's backward pass can be captured or run at
any time; the activations lie at fixed addresses, and no more of them than one forward pass needs.

On several ranks the sum of a layer's gradients is under way while the layer above is updated and the layer below runs
its backward pass. Gradients and updates of a layer are then two graphs, and the sum is part of neither: all kernels of
a graph are slower where another stream takes part in it, and NCCL waits for graphs that hold its sums, forever, when a
process takes its leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qgalore.graphs.captured import CapturedStack
from qgalore.graphs.eager import EagerStack, RunLayer
from qgalore.graphs.eager_layers import EagerLayers
from qgalore.optimizer import LowRankAdamW
from qgalore.torch_internals import set_for_process

_ORDINARY_STEPS = 2
"""Steps without graphs, in which kernels are compiled and libraries set up."""


class LayerGraphs(EagerLayers):
    """Runs layers one after the other; from the third training step of one shape on by CUDA graphs."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer, optimizer: LowRankAdamW) -> None:
        """layers are on one device, and `optimizer` is attached to them.

        Nothing can be captured on CUDA's default stream: without a `torch.cuda.set_stream` before `attach` and the
        first step, the layers run as without graphs, and so they do on another device.
        """
        # The retained backward passes of a compiled layer must not write over what they have saved.
        set_for_process("torch._functorch.config.donated_buffer", False)
        super().__init__(layers, run, optimizer)
        self._steps = 0
        self._states_replaced = optimizer.states_replaced
        self._captured: CapturedStack | None = None

    @property
    def replays(self) -> bool:
        """Whether graphs have been captured."""
        return self._captured is not None

    def graph_pool(self) -> contextlib.AbstractContextManager[None]:
        """Within it this thread allocates in the memory of the graphs, which nobody else needs between two replays.

        Only for what is gone before the backward pass of the layers begins, since a replay writes over it; other memory
        where gradients may stay.
        """
        if self._captured is None or not self._optimizer.cycle.keeps_no_gradient:
            return contextlib.nullcontext()
        return self._captured.graph_pool()

    def _stack(self, constants: tuple[Tensor, ...], x: Tensor) -> EagerStack:
        self._steps += 1
        if self._states_replaced != self._optimizer.states_replaced:
            # Run eagerly first: state initialised during capture would be reset by each replay.
            self._captured, self._states_replaced, self._steps = None, self._optimizer.states_replaced, 1
        if self._captured is not None and not self._captured.is_whole:
            self._captured = None
        if self._captured is not None and self._captured.serves(x):
            return self._captured
        arguments, cycle = (self._layers, self._run, self._optimizer, constants, x), self._optimizer.cycle
        begins = self._steps > _ORDINARY_STEPS and not cycle.has_sums
        # A gradient that is updated with at once is packed, if at all, with a seed of the host.
        packs = cycle.updates_immediately and cycle.sums_in_int8
        # A momentum that sums gradients has them one after the other; in graphs each would have a buffer.
        packs = packs or self._optimizer.sums_in_momentum
        # One that waits for `step` alone would lie in the buffer that the next layer but one is sent from.
        alone = cycle.takes_whole_gradients and not cycle.updates_immediately
        packs = packs or (cycle.ranks.owners_sum and alone)
        if self._captured is not None or packs or not begins or not _can_capture(x.device):
            return EagerStack(*arguments)
        self._captured = CapturedStack(*arguments)
        return self._captured


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)
