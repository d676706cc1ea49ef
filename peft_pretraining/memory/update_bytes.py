"""The memory that comes and goes while matrices are updated: steps, several at once, and refreshes of subspaces.

Counted in the code that makes the tensors, as in `plan.py`, which has the rest.
"""

import math

from peft_pretraining.memory.dequant_cache_bytes import held_bases_bytes
from peft_pretraining.memory.settings import MemorySettings, Shape
from peft_pretraining.memory.state_bytes import basis_values, gradient_shape, has_8bit_states, sides
from peft_pretraining.models.config import ModelConfig
from qgalore.kernels import GROUP_LIMIT
from qgalore.kernels.api import PART
from qgalore.subspace.fit import COLUMNS_AT_ONCE
from qgalore.update.directions import DIRECTIONS

ROW_CHUNK = 4 * (1 << 22)  # bytes of the float32 rows that float weights are updated in
READ_8BIT_PART = 8  # bytes a value of a part: the codes as int32, and the float32 values
_WRITE_8BIT_PART = 20
"""Bytes a value of a part: its padded copy, scaled values, codes, least codes and the larger of the two."""
_WRITE_FLOAT_MOMENT = 8  # bytes a value: the new values, and those of them or the old ones that are chosen
_DIRECTION = 12  # bytes a value: gradient, its share of the momentum, and that looking ahead, in plain PyTorch
_ORTHONORMALIZE = 12  # bytes a value: a basis in float32, with scaled rows, and without zero rows


def largest_update_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Beside the gradients, of the matrices that are updated at once, and of bases that are held for them."""
    shapes = config.matrix_shapes().values()
    held = held_bases_bytes(config, s) if s.gradients_live_in_backward else 0
    largest = max(_steps_bytes(group, s, bool(held)) for group in updated_together(config, s))
    if s.subspace is not None:
        largest = max(largest, *(refresh_of_subspace_bytes(shape, s) for shape in shapes))
        if s.cuda and s.decoder_states == 1:
            largest = max(largest, directions_bytes(config, s))
    return held + largest


def updated_together(config: ModelConfig, s: MemorySettings) -> list[list[Shape]]:
    """The matrices of which Adam's steps are made at once (`qgalore.update.step`); others are made alone."""
    shapes, groups = list(config.matrix_shapes().values()), list[list[Shape]]()
    one_by_one = s.subspace is None or s.decoder_states != 2 or (s.gradients_live_in_backward and not s.cuda_graphs)
    limit = 0 if one_by_one else DIRECTIONS["adam"].values_together
    for shape in shapes if s.gradients_live_in_backward else shapes * config.num_hidden_layers:
        if not groups or gradient_values(groups[-1], s) > limit:
            groups.append([])
        groups[-1].append(shape)
    return groups


def _steps_bytes(shapes: list[Shape], s: MemorySettings, held: bool) -> int:
    """Steps made at once: all directions and, of quantized weights, all bases; what else it takes for one.

    Bases that are `held` are there already.
    """
    bases = [s.dtype_bytes * basis_copy_values(shape, s) for shape in shapes]
    steps = [step_bytes(shape, s) - (basis if held else 0) for shape, basis in zip(shapes, bases, strict=True)]
    if held or s.subspace is None or s.weight.stored_bits is None or s.residual:
        bases = [0] * len(shapes)
    directions = [s.dtype_bytes * gradient_values([shape], s) if s.subspace is not None else 0 for shape in shapes]
    there = list(map(sum, zip(directions, bases, strict=True)))
    return sum(there) + max(step - own for step, own in zip(steps, there, strict=True))


def step_bytes(shape: Shape, s: MemorySettings) -> int:
    """Beside a matrix's gradient: the direction and the bases, and what making and applying the direction takes."""
    if s.subspace is None:
        return min(ROW_CHUNK, 4 * math.prod(shape))
    values, bases = math.prod(gradient_shape(shape, s)), basis_values(shape, s)
    step = s.dtype_bytes * (values + basis_copy_values(shape, s))
    if s.decoder_states == 1 and not s.cuda:  # there a kernel makes the direction
        part = part_of_moment(values, s) if has_8bit_states(gradient_shape(shape, s), s) else 0
        step += _DIRECTION * values + _WRITE_8BIT_PART * part
    if s.residual:  # the whole direction, and what is added to it
        step += 2 * s.dtype_bytes * math.prod(shape)
    elif s.weight.stored_bits is None or s.weight.int8_products or len(sides(shape, s)) == 2:
        on_tensor_cores = s.cuda and s.dtype_bytes == 2 and len(sides(shape, s)) == 1
        step += (0 if on_tensor_cores else 4 * (values + bases)) + min(ROW_CHUNK, 4 * math.prod(shape))
    return step


def refresh_of_subspace_bytes(shape: Shape, s: MemorySettings) -> int:
    """Beside a matrix's gradient before or after the step, when a refresh is due: the sketch and what is made of it.

    By SVD that is the gradient in float32 and float64, and eigenvectors; the solver's workspace is not counted.
    """
    if s.svd:
        return 12 * math.prod(shape) + 24 * min(shape) ** 2
    values, bases = math.prod(gradient_shape(shape, s)), basis_values(shape, s)
    rotated = _WRITE_FLOAT_MOMENT * values
    if has_8bit_states(gradient_shape(shape, s), s):
        rotated = s.dtype_bytes * values + max(s.dtype_bytes * values, _WRITE_8BIT_PART * part_of_moment(values, s))
    rank = s.rank_of(shape)
    squared = rank**2
    multiplying = 8 * (squared + rank * min(bases // rank, COLUMNS_AT_ONCE))  # in float64, with some columns
    solving = 4 * bases + 12 * squared  # the solution, and the factor in float64 and float32
    finding = s.dtype_bytes * bases + max(_ORTHONORMALIZE * bases, 4 * bases + max(multiplying, 16 * squared, solving))
    changing = (s.dtype_bytes + 1) * bases + s.dtype_bytes * squared + rotated  # the new basis, before and quantized
    return s.dtype_bytes * bases + max(finding, changing)


def part_of_moment(values: int, s: MemorySettings) -> int:
    """Values of an 8-bit moment that plain PyTorch reads or writes at a time; kernels need nothing beside them."""
    return 0 if s.cuda else min(values, PART)


def directions_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Orthogonal directions of several matrices: momenta, two buffers, and two squares a matrix.

    Matrices wait until they are enough, those of one layer where the updates are made inside its backward pass.
    """
    layers = 1 if s.gradients_live_in_backward else config.num_hidden_layers
    sizes = [math.prod(gradient_shape(shape, s)) for shape in config.matrix_shapes().values()]
    values = min(layers * sum(sizes), DIRECTIONS["orthogonal"].values_together + max(sizes))
    largest = 0 if s.subspace is None else max(s.subspace.rank, s.mlp_rank)
    return s.dtype_bytes * (3 * values + 2 * min(GROUP_LIMIT, layers * len(sizes)) * largest**2)


def gradient_values(shapes: list[Shape], s: MemorySettings) -> int:
    """Of all gradients that the optimizer sees of these matrices."""
    return sum(math.prod(gradient_shape(shape, s)) for shape in shapes)


def basis_copy_values(shape: Shape, s: MemorySettings) -> int:
    """Values of bases that have to be converted to the activations' dtype."""
    return basis_values(shape, s) if s.basis_bits is not None or s.weight.stored_bits is not None else 0
