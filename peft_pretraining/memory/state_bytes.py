"""What decides the memory of a run, and the bytes of every tensor that lasts longer than one backward pass.

All sizes are exact: of the weights, projections, optimizer states and sums of gradients of one rank. Only the sums for
refreshes of subspaces are a bound. `plan.py` adds what comes and goes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from peft_pretraining.memory.settings import MemorySettings, Shape
from qgalore.layer.quantization import aligned_row_bytes, row_bytes
from qgalore.subspace.schedule import first_refresh_spread
from qgalore.update.gradient_sum import GROUP_SIZE
from qgalore.update.moments import BLOCK_SIZE, MIN_8BIT_NUMEL

_ACCUMULATOR_BYTES = {"float32": 4, "bfloat16": 2}


def sides(shape: Shape, s: MemorySettings) -> tuple[str, ...]:
    """The sides of a decoder matrix that are projected."""
    return () if s.subspace is None else s.subspace.sides(shape)


def gradient_shape(shape: Shape, s: MemorySettings) -> Shape:
    """Of what the optimizer sees: (rank, in), (out, rank), (rank, rank), or the matrix's own."""
    if s.subspace is None:
        return shape
    return dataclasses.replace(s.subspace, rank=s.rank_of(shape)).gradient_shape(shape)


def basis_values(shape: Shape, s: MemorySettings) -> int:
    """Values of all bases of a matrix."""
    return 0 if s.subspace is None else s.rank_of(shape) * sum(shape[0 if x == "left" else 1] for x in sides(shape, s))


def weight_bytes(shape: Shape, s: MemorySettings) -> int:
    """Of a decoder matrix as it is stored."""
    if s.weight.stored_bits is None:
        return math.prod(shape) * s.dtype_bytes
    group_size = shape[1] if s.weight.int8_products else s.weight.group_size
    return shape[0] * (aligned_row_bytes(shape[1], s.weight.stored_bits) + _group_bytes(shape[1], group_size))


def projection_bytes(shape: Shape, s: MemorySettings) -> int:
    """Of the bases of a matrix as they are stored."""
    if s.subspace is None:
        return 0
    if s.basis_bits is not None:
        lengths = [shape[0 if side == "left" else 1] for side in sides(shape, s)]
        return sum(
            _quantized_bytes(s.rank_of(shape), length, s.basis_bits, s.subspace.proj_group_size) for length in lengths
        )
    # A float basis has the dtype of a float weight, and is float32 beside integer weights.
    return basis_values(shape, s) * (s.dtype_bytes if s.weight.stored_bits is None else 4)


def state_bytes(shape: Shape, s: MemorySettings, decoder: bool = False) -> int:
    """Of the optimizer's states for a gradient of this shape."""
    states = s.decoder_states if decoder else s.states
    if s.factored and len(shape) == 2:
        return 4 * sum(shape)
    values = math.prod(shape)
    if has_8bit_states(shape, s):
        return states * (values + 4 * math.ceil(values / BLOCK_SIZE))
    return states * values * (s.state_bits // 8 if s.state_bits != 8 else 4)


def has_8bit_states(shape: Shape, s: MemorySettings) -> bool:
    """Whether the states of a gradient of this shape are held in 8 bits."""
    return s.state_bits == 8 and math.prod(shape) >= MIN_8BIT_NUMEL


def residual_bytes(shapes: Iterable[Shape], s: MemorySettings) -> int:
    """Of full gradients (m, n) that are kept for their residuals until the update."""
    return s.dtype_bytes * sum(map(math.prod, shapes)) if s.residual else 0


def gradient_bytes(shapes: Iterable[Shape], s: MemorySettings) -> int:
    """Of gradients that wait for their update: all, but where each update happens in its layer's backward pass."""
    return 0 if s.gradients_live_in_backward else sum(sum_bytes(shape, s) for shape in shapes)


def sum_bytes(shape: Shape, s: MemorySettings) -> int:
    """Of a sum over the micro-batches and ranks of an update; a gradient that comes alone keeps its own dtype."""
    if s.grad_accum_dtype == "int8" and len(shape) == 2:
        return _quantized_bytes(shape[0], shape[1], 8, GROUP_SIZE)
    alone = s.grad_accum_steps == 1
    return math.prod(shape) * (s.dtype_bytes if alone else _ACCUMULATOR_BYTES.get(s.grad_accum_dtype, 4))


def refresh_bytes(matrices: Sequence[Shape], layers: int, s: MemorySettings) -> int:
    """Of all that is summed for the subspaces that are due in one update, at most.

    That is a sketch (rank, side), or in svd mode from the second refresh on a full gradient. Where an update ends with
    the one backward pass of each layer, nothing of it outlives that.
    """
    if s.subspace is None or s.gradients_live_in_backward:
        return 0

    count, gap = layers * len(matrices), s.subspace.shortest_interval

    def due(spread: int) -> int:
        return math.ceil(count / max(1, min(spread, gap)))

    def sketch(shape: Shape, side: str) -> int:
        return sum_bytes((s.rank_of(shape), shape[0 if side == "left" else 1]), s)

    sketches = max(sum(sketch(shape, side) for side in sides(shape, s)) for shape in matrices)
    full = max(sum_bytes(shape, s) for shape in matrices)
    # The first refreshes, always from sketches, can meet the second ones of a short interval.
    first = due(first_refresh_spread(count, gap))
    return first * sketches + due(gap) * (full if s.svd else sketches)


def _quantized_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Codes and groups, which do not straddle rows."""
    return rows * (row_bytes(columns, bits) + _group_bytes(columns, group_size))


def _group_bytes(columns: int, group_size: int) -> int:
    """A bfloat16 scale and zero point for each group of a row."""
    return 4 * math.ceil(columns / group_size)
