"""A stack of layers whose training step is replayed from CUDA graphs: one launch where Python would make thousands.

A step through a LLaMA with low-rank weights is about a hundred kernels a layer. On a small model a GPU finishes them
sooner than Python can ask for them. Here the forward pass of all layers is one graph, and each layer has another for
its backward pass together with the updates of its weights, which happen as soon as their gradients are there.

Where the update waits, for more micro-batches or for the norm of all gradients, a layer's graph adds its gradients to
sums that have their fixed places, and the optimizer updates from Python.

Nothing is computed otherwise: the graphs are captured from the ordinary code, and hold the same kernels in the same
order, but that a layer's quantized matrices are dequantized together (`qgalore.held_matrices`). What changes from step
to step (seeds, learning rates, bias corrections) is read from a table on the device, one row a weight, written before
each backward pass. A layer in which a subspace is to be refreshed runs its backward pass from Python that time, over
what the graph of the forward pass has saved.

The autograd graphs of the captured forward passes are kept, so that a layer's backward pass can be captured or run at
any time; the activations lie at fixed addresses, and no more of them than one forward pass needs.

On several ranks the sum of a layer's gradients is under way while the layer above is updated and the layer below runs
its backward pass. Gradients and updates of a layer are then two graphs, and the sum is part of neither: all kernels of
a graph are slower where another stream takes part in it, and NCCL waits for graphs that hold its sums, forever, when a
process takes its leave.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgalore import adam
from qgalore.held_matrices import held_bases, held_weights
from qgalore.linear import LowRankLinear
from qgalore.optimizer import LowRankAdamW
from qgalore.rank_sum import RankSum

_ORDINARY_STEPS = 2
"""Steps without graphs, in which kernels are compiled and libraries set up."""

RunLayer = Callable[..., Tensor]
"""run(layer, x, *constants) -> x of the next layer."""


class LayerGraphs:
    """Runs layers one after the other; from the third training step of one shape on by CUDA graphs."""

    def __init__(self, layers: Sequence[nn.Module], run: RunLayer, optimizer: LowRankAdamW) -> None:
        """layers are on one device, and `optimizer` is attached to them.

        Nothing can be captured on CUDA's default stream: without a `torch.cuda.set_stream` before `attach` and the
        first step, the layers run as without graphs, and so they do on another device.
        """
        # The retained backward passes of a compiled layer must not write over what they have saved.
        torch._functorch.config.donated_buffer = False
        self._layers, self._run, self._optimizer = list(layers), run, optimizer
        self._steps = 0
        self._states_replaced = optimizer.states_replaced
        self._captured: _CapturedStack | None = None

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x through all layers; `constants` are further arguments of each, the same in all steps of one shape."""
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Step.apply(x, self._stack_for(x, constants))
            return out
        for layer in self._layers:
            x = self._run(layer, x, *constants)
        return x

    @property
    def replays(self) -> bool:
        """Whether graphs have been captured."""
        return self._captured is not None

    def memory(self) -> contextlib.AbstractContextManager[None]:
        """Within it this thread allocates in the memory of the graphs, which nobody else needs between two replays.

        Only for what is gone before the backward pass of the layers begins, since a replay writes over it; other memory
        where gradients may stay.
        """
        if self._captured is None or not self._optimizer.keeps_no_gradient:
            return contextlib.nullcontext()
        return self._captured.memory()

    def _stack_for(self, x: Tensor, constants: tuple[Tensor, ...]) -> _Stack:
        self._steps += 1
        if self._states_replaced != self._optimizer.states_replaced:
            # Ordinary steps come first again: a state that begins in a graph would begin anew with every replay.
            self._captured, self._states_replaced, self._steps = None, self._optimizer.states_replaced, 1
        if self._captured is not None and self._captured.serves(x):
            return self._captured
        arguments = (self._layers, self._run, self._optimizer, constants, x)
        begins = self._steps > _ORDINARY_STEPS and not self._optimizer.has_sums
        # A gradient that is updated with at once is packed, if at all, with a seed of the host.
        packs = self._optimizer.updates_at_once and self._optimizer.sums_in_int8
        if self._captured is not None or packs or not begins or not _can_capture(x.device):
            return _Stack(*arguments)
        self._captured = _CapturedStack(*arguments)
        return self._captured


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


class _Step(torch.autograd.Function):
    """All layers as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: _Stack) -> Tensor:
        out = stack.forward(x)
        ctx.stack, ctx.number = stack, stack.forward_passes
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if ctx.number != ctx.stack.forward_passes:
            raise RuntimeError(
                "layers in CUDA graphs keep the activations of their newest forward pass alone: make the backward pass "
                "of each before the next one, or do without the graphs"
            )
        return ctx.stack.backward(grad_output), None


Memory = contextlib.AbstractContextManager[None]
Work = Callable[[int, Memory], None]
"""work(layer, memory) launches a part of the backward pass of a layer, which allocates in that memory."""
_ANY_MEMORY: Memory = contextlib.nullcontext()


class _Stack:
    """The layers for one step, run from Python in the order in which the graphs have it."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        constants: tuple[Tensor, ...],
        x: Tensor,
    ) -> None:
        self._layers, self._run, self._optimizer, self._constants = layers, run, optimizer, constants
        self._dtype = x.dtype
        self._linears = [[part for part in layer.modules() if isinstance(part, LowRankLinear)] for layer in layers]
        self._weights = [optimizer.weights_of(layer) for layer in layers]
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._messages: dict[int, RankSum] = {}
        """The gradients of layers on their way over the ranks."""
        self._at_once = optimizer.updates_at_once
        self._sends = self._at_once and optimizer.sums_over_ranks
        self._grad = torch.empty(0)
        self.forward_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer."""
        self.forward_passes += 1
        self._inputs.append(x.detach().requires_grad_())
        self._run_forward()
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the first layer's input; all weights of all layers are updated on the way."""
        self._inputs.pop()
        self._grad = grad
        self._run_backward()
        return self._grad

    def _run_forward(self) -> None:
        with torch.enable_grad():
            for layer, linears in zip(self._layers, self._linears, strict=True):
                with held_weights(linears, self._dtype):
                    self._outputs.append(self._run(layer, self._inputs[-1], *self._constants))
                self._inputs.append(self._outputs[-1].detach().requires_grad_())

    def _run_backward(self) -> None:
        for index in reversed(range(len(self._layers))):
            self._perform(self._gradients, index)
            if self._sends:
                self._messages[index].start()
                self._finish(index + 1)
            elif not self._at_once:
                self._optimizer.gradients_ready(self._weights[index])
        self._finish(0)

    def _finish(self, index: int) -> None:
        """Update a layer whose gradients are on their way, if they are."""
        if index in self._messages:
            self._messages[index].wait()
            self._perform(self._updates, index)
            del self._messages[index]

    def _perform(self, work: Work, index: int) -> None:
        work(index, _ANY_MEMORY)

    def _gradients(self, index: int, memory: Memory) -> None:
        """The backward pass of a layer, and the updates of its weights if nothing else has to come before."""
        with memory, held_bases(self._weights[index], self._dtype):
            self._backward_of_layer(index)
            if self._at_once and not self._sends:
                self._optimizer.complete(self._weights[index], None)
        if self._sends:
            # Not there: it is still needed when graphs write over their memory.
            message = self._optimizer.message_of(self._weights[index], self._buffer_of(index))
            assert message is not None
            self._messages[index] = message

    def _updates(self, index: int, memory: Memory) -> None:
        with memory, held_bases(self._weights[index], self._dtype):
            self._optimizer.complete(self._weights[index], self._messages[index])

    def _backward_of_layer(self, index: int) -> None:
        """From the gradient of the layer's output to that of its input, which takes its place."""
        self._grad = self._gradient(index, self._grad)
        self._inputs[index] = self._outputs[index] = torch.empty(0)  # what the layer has saved is needed no longer

    def _gradient(self, index: int, grad: Tensor, keep: bool = False) -> Tensor:
        """The gradient of a layer's input; its weights take theirs. `keep` what the layer has saved."""
        own = [weight for weight in self._weights[index] if weight.layer is None]
        inputs = [self._inputs[index], *(weight.param for weight in own)]
        with held_weights(self._linears[index], self._dtype):
            grad, *own_grads = torch.autograd.grad(self._outputs[index], inputs, grad, retain_graph=keep)
        with torch.no_grad():
            for weight, own_grad in zip(own, own_grads, strict=True):
                weight.accumulate_full(own_grad)
        return grad

    def _buffer_of(self, index: int) -> Tensor | None:
        """A place for the layer's message to the other ranks; None for any."""
        return None


class _CapturedStack(_Stack):
    """The graphs for inputs of one shape."""

    def __init__(
        self,
        layers: list[nn.Module],
        run: RunLayer,
        optimizer: LowRankAdamW,
        constants: tuple[Tensor, ...],
        x: Tensor,
    ) -> None:
        super().__init__(layers, run, optimizer, constants, x)
        self._shape = x.shape
        # Graphs have memory of their own: what the ordinary steps took is given back first.
        torch.cuda.empty_cache()
        self._pool: Any = torch.cuda.graph_pool_handle()
        adam.make_tables(x.device)  # which `memory` must not hold
        self._buffers = self._message_buffers(x)
        self._sent: dict[int, RankSum] = {}
        """The message that a layer's graph makes."""
        count = sum(map(len, self._weights))
        self._numbers = torch.zeros(count, 8, dtype=torch.int32, device=x.device)
        self._inputs.append(torch.empty_like(x).requires_grad_())
        for weight in itertools.chain(*self._weights):
            if weight.layer is not None:
                weight.layer.checks_version = False
            if not self._at_once:
                # A gradient that comes alone keeps its dtype, as it does without graphs.
                weight.fix_sum(x.dtype if optimizer.takes_whole_gradients else None)
        self._forward_graph = self._capture(self._run_forward)
        # Of the gradients between layers, one after the other: the last layer's output, which nobody needs by then.
        self._place = self._outputs[-1].data
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

    def serves(self, x: Tensor) -> bool:
        """Whether the graphs are those of a step like the one that begins."""
        return self._shape == x.shape and self._at_once == self._optimizer.updates_at_once

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """See `LayerGraphs`; `torch.cuda.use_mem_pool` for the pool of graphs, which is a number and no MemPool."""
        device = self._numbers.device.index
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, self._pool)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last layer, at an address that the next step uses again."""
        self.forward_passes += 1
        if not self._at_once and not self._optimizer.has_sums:
            for weight in itertools.chain(*self._weights):
                weight.begin_sum()
        # Through .data: autograd would take the write for a change of what the backward passes have saved.
        self._inputs[0].data.copy_(x)
        self._forward_graph.replay()
        return self._outputs[-1].detach()

    def backward(self, grad: Tensor) -> Tensor:
        """See `_Stack`; layers in which a subspace is refreshed run from Python."""
        self._write_numbers()
        self._place.copy_(grad)
        self._run_backward()
        return self._place

    def _perform(self, work: Work, index: int) -> None:
        if any(weight.changes_subspace for weight in self._weights[index]):
            work(index, self.memory())
        else:
            self._replay(work, index)

    def _replay(self, work: Work, index: int) -> None:
        """A part of a layer's backward pass by its graph."""
        key, only_sends = (work.__name__, index), self._sends and work == self._gradients
        if key not in self._graphs:
            self._numbers_in_use(True)
            self._graphs[key] = self._capture(functools.partial(work, index, _ANY_MEMORY))
            self._numbers_in_use(False)
            if only_sends:
                self._sent[index] = self._messages[index]
        elif only_sends:
            self._messages[index] = self._sent[index]
        else:
            for weight in self._weights[index]:
                if self._at_once:
                    weight.count_replayed_update()
                else:
                    weight.count_replayed_sum()
        self._graphs[key].replay()

    def _backward_of_layer(self, index: int) -> None:
        grad = self._gradient(index, self._place, keep=True)
        if grad.data_ptr() != self._place.data_ptr():  # a compiled layer puts it there itself
            self._place.copy_(grad)

    def _message_buffers(self, x: Tensor) -> list[Tensor]:
        """Two places for the messages of the layers in turn, in the dtype of one micro-batch; none on one rank."""
        sizes = [sum(weight.values_to_sum for weight in weights) for weights in self._weights]
        return [x.new_empty(max(sizes)) for _ in range(2)] if self._sends else []

    def _buffer_of(self, index: int) -> Tensor | None:
        return self._buffers[index % 2] if self._buffers else None

    def _write_numbers(self) -> None:
        weights = itertools.chain(*self._weights)
        if self._at_once:
            rows = [weight.numbers_of_update() for weight in weights]
        else:
            rows = [weight.numbers_of_next_sum() for weight in weights]
        # A new pinned buffer each time: the copy may still be under way when the next one is written.
        self._numbers.copy_(torch.tensor(rows, dtype=torch.int32).pin_memory(), non_blocking=True)

    def _numbers_in_use(self, used: bool) -> None:
        """Let what is launched read the table, or again take the numbers of the host."""
        rows = self._numbers.unbind() if used else [None] * len(self._numbers)
        for weight, row in zip(itertools.chain(*self._weights), rows, strict=True):
            if self._at_once:
                weight.numbers = row
            else:
                weight.numbers_of_sums = row

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches; nothing of it has run yet."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        work()
        graph.capture_end()
        return graph
