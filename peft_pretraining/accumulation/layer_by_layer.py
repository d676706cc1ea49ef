"""The passes of an update layer by layer, each layer over all micro-batches: one layer's sums of gradients at a time.

Accumulation by micro-batches makes the forward and the backward pass of one micro-batch after the other, so that the
sums of all gradients are alive from the first to the last. Here the loops are the other way round:

1. embeddings, then each layer from the first to the last, for each micro-batch: only its output is kept;
2. final norm, head and loss for each micro-batch, and their gradients;
3. each layer from the last to the first, for each micro-batch: the layer is computed again from its input, and its
   gradients are added to its sums. After the last micro-batch they are used up by the layer's update, and freed;
4. the embeddings, in the same way.

It is activation checkpointing (Chen et al., arXiv 1604.06174) with a checkpoint a layer, of all micro-batches: they are
in host memory (`hidden_states`). Each sum has its addends in the order of the micro-batches, as it does otherwise, and
thus the same bits; but where the head's weight is that of the embeddings, whose gradients come one after the other
here. A layer's quantized weights are dequantized once a pass, not once a micro-batch: all of them in the forward pass,
and as many as `CACHED_BYTES` holds in the backward pass, which has the sums of gradients beside them.

With `--shard full` a layer's weights are gathered from their owners twice an update, for each pass through it, while
the layer before it runs. The head is gathered once, for the losses of all micro-batches, and embeddings for each pass
of the first layer: its inputs then wait with the hidden states, where nothing else does at that time.

Losses are known before any weight is updated. A gradient that is not finite is found when layers above may have been
updated, as it is with one micro-batch: `LowRankAdamW.late_overflow`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from peft_pretraining.accumulation.hidden_states import HiddenStates, hidden_states
from peft_pretraining.models.network import CausalLM
from peft_pretraining.optim.protocol import TrainingOptimizer
from qgalore.graphs.dequant_cache import cached_bases, cached_weights
from qgalore.layer.layout import padded_width
from qgalore.layer.linear import LowRankLinear
from qgalore.offload.offload import Pass
from qgalore.optimizer import LowRankAdamW
from qgalore.update.weight import Weight

CACHED_BYTES = 128 << 20
"""Of weights of a layer that stay dequantized during its backward pass: all up to 1B, at 7B those of the attention. The
others would take 0.27 GB more there for 3 % of the time."""
Batch = tuple[Tensor, Tensor]
"""Token ids and labels (B, L) of a micro-batch, on the device."""


class LayerByLayer:
    """The passes of the updates of one model, layer by layer."""

    def __init__(self, model: CausalLM, optimizer: TrainingOptimizer) -> None:
        """model: of a family that says `runs_by_layer`, as `build_training` gives it with its optimizer."""
        self._model, self._optimizer = model, optimizer
        optimizer.accumulates_by_layer = True
        self._layers = list(model.decoder_layers)
        self._linears = [
            [part for part in layer.modules() if isinstance(part, LowRankLinear)] for layer in self._layers
        ]
        self._gathering = optimizer.gathering if isinstance(optimizer, LowRankAdamW) else None
        self._embeddings, self._table_of_head = map(model.get_parameter, model.table_names)
        self._embeddings_arrive = optimizer.kept_rows(self._embeddings) is not None
        self._inputs_at: int | None = None
        """The boundary at which inputs of the first layer wait; None where they are looked up when they are read."""
        inside = {id(param) for param in (self._embeddings, *model.decoder_layers.parameters())}
        self._of_head = [param for param in model.parameters() if id(param) not in inside]
        self._states: HiddenStates | None = None
        self._shape: tuple[int, ...] = ()
        self._batches: Sequence[Batch] = ()
        self._constants: tuple[Tensor, ...] = ()

    def forward(self, batches: Sequence[Batch], begin: Callable[[int], None], go_on: Callable[[], bool]) -> bool:
        """Make the forward passes of all micro-batches, all of one shape, up to the last layer.

        begin is called with the number of a micro-batch, from 1 on, before each pass of it through a layer. go_on is
        called before each layer: once it is false nothing more is done, and False is returned.
        """
        self._batches, self._begin = batches, begin
        self._make_rows(len(batches), batches[0][0].shape)
        if self._gathering is not None and isinstance(self._optimizer, LowRankAdamW):
            self._gathering.begin(self._optimizer.states_replaced)
        if isinstance(self._optimizer, LowRankAdamW) and self._optimizer.offload is not None:
            self._optimizer.offload.leave_all()
        for index in range(len(self._layers)):
            if not go_on():
                self._batches = ()
                return False
            if index == 0:
                self._look_up(len(self._layers) - 1)
            with self._inside(index, 1), cached_weights(self._linears[index], self._embeddings.dtype, limit=math.inf):
                for number, x in enumerate(self._inputs(index)):
                    # With gradients, though none is asked for: the backward pass then begins with the same kernels.
                    self._rows.write(index, number, self._run(index, number, x.requires_grad_()).detach())
        return True

    def backward(self, target_tokens: int, check: Callable[[Tensor], None]) -> Tensor:
        """Make loss and backward passes of what `forward` was given last, with the updates that are made inside them.

        The loss of each micro-batch is divided by target_tokens; their sum (), which is returned, is given to `check`
        before the backward pass of the last one: before any weight is updated.
        """
        optimizer, rows, last = self._optimizer, self._rows, len(self._layers) - 1
        dtype = self._embeddings.dtype
        optimizer.is_last_micro_batch = False
        # The only loss may take the head's memory, others leave it to the next.
        stays = len(self._batches) > 1
        with self._model.tables.whole(self._table_of_head) if stays else contextlib.nullcontext():
            loss = self._head(target_tokens, check)
        optimizer.end_layer(self._of_head)
        for index in range(last, -1, -1):
            optimizer.is_last_micro_batch = False
            if index == 0:
                self._look_up(0 if last else None)  # of a single layer the gradients of outputs are there
            with self._inside(index, -1):
                with self._dequantized(index, dtype), cached_bases(self._weights_of(index), dtype):
                    for number, (x, grad) in enumerate(zip(self._inputs(index), rows.read(last), strict=True)):
                        self._run(index, number, x.requires_grad_()).backward(grad)
                        rows.write(last, number, _gradient_of(x))
                optimizer.end_layer(self._layers[index].parameters())
        optimizer.is_last_micro_batch = False
        with self._model.tables.unread(self._embeddings):
            for (ids, _), grad in zip(self._batches, rows.read(last), strict=True):
                self._model.embed(ids).backward(grad)
        optimizer.end_layer([self._embeddings])
        self._batches = ()
        return loss

    def _head(self, target_tokens: int, check: Callable[[Tensor], None]) -> Tensor:
        """The sum of all losses (); the gradients of the last layer's outputs take the place of these."""
        loss, last, scale = (
            torch.zeros((), device=self._embeddings.device),
            len(self._layers) - 1,
            self._optimizer.loss_scale,
        )
        for number, (x, (_, labels)) in enumerate(zip(self._read(last), self._batches, strict=True), start=1):
            micro_loss = self._model.head_loss(x.requires_grad_(), labels) / target_tokens
            loss += micro_loss.detach()
            if number == len(self._batches):
                check(loss)
            (micro_loss if scale is None else scale.scaled(micro_loss)).backward()
            self._rows.write(last, number - 1, _gradient_of(x))
        return loss

    @property
    def _rows(self) -> HiddenStates:
        assert self._states is not None
        return self._states

    def _make_rows(self, micro_batches: int, shape: torch.Size) -> None:
        """Room for the outputs of all layers, and what else depends on the shape of token ids."""
        if self._shape != (micro_batches, *shape):
            self._states = None  # before there are others
            like = self._embeddings.new_empty(*shape, self._embeddings.shape[1], requires_grad=False)
            self._states, self._shape = hidden_states(len(self._layers), micro_batches, like), (micro_batches, *shape)
            self._constants = self._model.layer_constants(shape[1])

    @torch.no_grad()
    def _look_up(self, boundary: int | None) -> None:
        """Let the inputs of the first layer wait at a boundary, if the embeddings are not here for long."""
        self._inputs_at = boundary if self._embeddings_arrive else None
        if self._inputs_at is not None:
            with self._model.tables.whole(self._embeddings):
                for number, (ids, _) in enumerate(self._batches):
                    self._rows.write(self._inputs_at, number, self._model.embed(ids))

    def _inputs(self, index: int) -> Iterator[Tensor]:
        """The input of a layer for each micro-batch, a leaf of autograd's graph."""
        boundary = index - 1 if index else self._inputs_at
        if boundary is not None:
            yield from self._read(boundary)
            return
        for ids, _ in self._batches:
            yield self._model.embed(ids).detach()

    def _read(self, boundary: int) -> Iterator[Tensor]:
        for row in self._rows.read(boundary):
            yield row.detach()

    def _run(self, index: int, number: int, x: Tensor) -> Tensor:
        """The output of a layer for a micro-batch."""
        self._begin(number + 1)
        run, layer = self._model.compiled_layer, self._layers[index]
        out: Tensor = layer(x, *self._constants) if run is None else run(layer, x, *self._constants)
        return out

    def _dequantized(self, index: int, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
        """Within it the first of a layer's quantized weights are there in `dtype`, up to `CACHED_BYTES`."""
        linears = self._linears[index]
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        return cached_weights(linears[: cached_matrices(shapes, dtype)], dtype, limit=math.inf)

    @contextlib.contextmanager
    def _inside(self, index: int, step: int) -> Iterator[None]:
        """Within it what other ranks or host memory have of a layer is here: in the forward pass where step is 1."""
        optimizer = self._optimizer
        if self._gathering is not None:
            self._gathering.enter(index, step)
        if not isinstance(optimizer, LowRankAdamW) or (offload := optimizer.offload) is None:
            yield
            return
        backward = Pass.UPDATE if optimizer.update_in_backward else Pass.GRADIENTS
        offload.enter(index, Pass.FORWARD if step > 0 else backward, step)
        yield
        offload.leave(index)

    def _weights_of(self, index: int) -> list[Weight]:
        optimizer = self._optimizer
        return optimizer.weights_of(self._layers[index]) if isinstance(optimizer, LowRankAdamW) else []


def cached_matrices(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """How many of a layer's matrices, the first ones, stay dequantized during its backward pass."""
    sizes = itertools.accumulate(dtype.itemsize * math.prod(map(padded_width, shape)) for shape in shapes)
    return sum(size <= CACHED_BYTES for size in sizes)


def _gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
