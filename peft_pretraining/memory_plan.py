"""The memory that a run needs on one device, by component, worked out before anything is built.

Pure arithmetic on the model's shapes. What stays for the whole run (weights, projections, moments, sums of gradients)
is exact to the byte. What comes and goes is the tensors that autograd saves plus the largest of the passing peaks: for
each phase of an update the tensors that are alive at its worst moment, counted in the code that makes them, with
PyTorch's fused attention and norms as they run on a GPU. Of compiled layers they are those of the code that inductor
makes. All ranks need the same.

Measured peaks are up to one per cent higher: PyTorch's allocator leaves up to 1 MiB of a block unused, and the tensors
that are smaller than a matrix's side are not counted one by one.
"""

import math
from dataclasses import dataclass, field

from peft_pretraining.lasting_memory import (
    MemorySettings,
    Shape,
    basis_values,
    gradient_bytes,
    gradient_shape,
    has_8bit_states,
    projection_bytes,
    refresh_bytes,
    sides,
    state_bytes,
    weight_bytes,
)
from peft_pretraining.linear_cross_entropy import token_chunks
from peft_pretraining.model_config import LlamaConfig
from qgalore.padding import padded_width
from qgalore.subspace import projects_directly

_GRADIENTS, _REFRESHES = "gradients", "for refreshes of subspaces (at most)"
_WORKSPACES = 2 * (32 << 20)
"""cuBLAS takes 8 times 4 MiB, as `run_pretrain.py` sets CUBLAS_WORKSPACE_CONFIG, for each thread that multiplies: that
of the forward pass and autograd's."""
_HEAD_COLUMNS = 64  # the logits of a token are padded to a multiple
_ROW_CHUNK = 4 * (1 << 22)  # bytes of the float32 rows that float weights are updated in
_INDUCTOR_ROW, _INDUCTOR_MIN_COLUMNS = 128, 1024  # inductor aligns longer rows of what it keeps to this many bytes
_READ_8BIT_MOMENTS = 12
"""Bytes a value: both moments in float32 (8), and while the second is read its codes as int32 (4)."""
_ROTATE_8BIT_MOMENTS = 39
"""Bytes a value: both moments in float32 before (8) and after (8); to take the change back, their codes (2); to write
the second its padded copy, scaled values, codes, least codes and the larger of the two (20), and the first's codes."""
_ROTATE_FLOAT_MOMENTS = 20  # both moments after (8) and before (8), and the one of the two that is chosen (4)
_CHANGE_BASIS = 16  # bytes a value: a basis in float32, old and new, each in two places


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component: `lasting` and `overhead` stay; of the phases in `passing` only the largest counts."""

    lasting: dict[str, int]
    passing: dict[str, int]
    activations: int
    """What the backward pass keeps of the forward one; the phases of the backward pass include it."""
    overhead: dict[str, int] = field(default_factory=dict)
    """What the way of running takes on a GPU: workspaces, and memory that CUDA graphs hold."""

    @property
    def weights_and_states_bytes(self) -> int:
        """Weights and optimizer states alone: the estimate that the papers' tables give."""
        return sum(size for name, size in self.lasting.items() if name not in (_GRADIENTS, _REFRESHES))

    @property
    def peak_bytes(self) -> int:
        """The planned peak."""
        return sum(self.lasting.values()) + sum(self.overhead.values()) + max(self.passing.values())

    def table(self) -> str:
        """The plan as text, in GB (10^9 bytes)."""

        def line(name: str, size: int) -> str:
            return f"  {name:<44}{size / 1e9:>10.3f} GB"

        largest = max(self.passing, key=lambda name: self.passing[name])
        lines = ["Planned memory of one rank", "kept during the run:"]
        lines += [line(name, size) for name, size in (self.lasting | self.overhead).items() if size]
        lines += ["passing, of which the largest (*) counts:"]
        lines += [line(f"{name}{' *' if name == largest else ''}", size) for name, size in self.passing.items()]
        lines += [line("of these, activations", self.activations), "together:"]
        lines += [line("weights and optimizer states", self.weights_and_states_bytes), line("peak", self.peak_bytes)]
        return "\n".join(lines)


def plan_memory(config: LlamaConfig, settings: MemorySettings) -> MemoryPlan:
    """The memory of one rank; takes milliseconds for any model size."""
    matrices = list(config.matrix_shapes().values())
    layers, s = config.num_hidden_layers, settings
    table = (config.vocab_size, config.hidden_size)
    tables = [table] if config.tie_word_embeddings else [table, table]
    norms = [(config.hidden_size,)] * (2 * layers + 1)
    rest: list[Shape] = [*tables, *norms]
    low_rank = [gradient_shape(shape, s) for shape in matrices]
    lasting = {
        "decoder weights": layers * sum(weight_bytes(shape, s) for shape in matrices),
        "embeddings, head, norms": s.dtype_bytes * sum(map(math.prod, rest)),
        "projections": layers * sum(projection_bytes(shape, s) for shape in matrices),
        "optimizer states, decoder": layers * sum(state_bytes(shape, s) for shape in low_rank),
        "optimizer states, embeddings, head, norms": sum(state_bytes(shape, s) for shape in rest),
        _GRADIENTS: layers * gradient_bytes(low_rank, s) + gradient_bytes(rest, s),
        _REFRESHES: refresh_bytes(matrices, layers, s),
    }
    kept = _kept_activation_bytes(config, s)
    overhead = {"workspaces of cuBLAS": _WORKSPACES} if s.cuda else {}
    if s.cuda_graphs:
        # Two gradients between layers have places of their own.
        overhead["memory of CUDA graphs"] = 2 * _hidden_bytes(config, s) + _in_layer_backward_bytes(config, s, False)
    return MemoryPlan(lasting, _passing(config, s, kept), kept, overhead)


# ---- activations


def layer_activation_bytes(config: LlamaConfig, s: MemorySettings) -> int:
    """What autograd keeps of one decoder layer between forward and backward.

    Each norm: its input, its output (which the linears save once for all) and one float32 a token; of the second one's
    input a compiled layer keeps the part that attention added. Attention: rotated queries and keys, values, output
    (shared with o_proj's input) and the float32 log-sum-exp of each head; the rotation itself saves only its tables.
    MLP: gate (input of silu), up, and the product; uncompiled also silu(gate), its factor. What a product of matrices
    reads in the backward pass the compiler saves and does not compute again.
    """
    tokens, query, key_value = s.batch_size * s.max_length, *_attention_widths(config)
    width = _mlp_width(config, s)
    product = width
    if s.compiled and width > _INDUCTOR_MIN_COLUMNS:
        product = _multiple(width, _INDUCTOR_ROW // s.dtype_bytes)
    mlp = 2 * width + product + (0 if s.compiled else width)
    values = 4 * config.hidden_size + 2 * query + 2 * key_value + mlp
    return tokens * (values * s.dtype_bytes + 4 * (2 + config.num_attention_heads))


def _kept_activation_bytes(config: LlamaConfig, s: MemorySettings) -> int:
    """Of all layers; then the last one's output, one float32 a token of the norm, the ids and the labels."""
    hidden, layers = _hidden_bytes(config, s), config.num_hidden_layers
    recomputed = math.ceil(layers / s.checkpoint_every) if s.activation_checkpointing else 0
    of_layers = recomputed * hidden + (layers - recomputed) * layer_activation_bytes(config, s)
    return of_layers + hidden + (4 + 8 + 8) * s.batch_size * s.max_length


def _recomputes_last_layer(config: LlamaConfig, s: MemorySettings) -> bool:
    """Whether the layer whose backward pass comes first, when all others are still kept, is a checkpointed one."""
    return s.activation_checkpointing and (config.num_hidden_layers - 1) % s.checkpoint_every == 0


def _hidden_bytes(config: LlamaConfig, s: MemorySettings) -> int:
    return s.batch_size * s.max_length * config.hidden_size * s.dtype_bytes


def _mlp_width(config: LlamaConfig, s: MemorySettings) -> int:
    return config.intermediate_size if s.rank is None else padded_width(config.intermediate_size)


def _attention_widths(config: LlamaConfig) -> tuple[int, int]:
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# ---- phases


def _passing(config: LlamaConfig, s: MemorySettings, kept: int) -> dict[str, int]:
    """The moments that can be the peak, in the order in which an update comes to them."""
    hidden, table = _hidden_bytes(config, s), config.vocab_size * config.hidden_size
    shapes = list(config.matrix_shapes().values())
    layer = hidden if _recomputes_last_layer(config, s) else layer_activation_bytes(config, s)
    # Beside the head's gradient while it is used up: by its update, or by the sum over micro-batches.
    copied = _table_copy_bytes(table, s)
    of_table = copied + (_table_update_bytes(config, s) if s.gradients_live_in_backward else 0)
    phases = {
        "activations and loss": kept + _loss_bytes(config, s),
        "activations and gradient of the head": kept + hidden + table * s.dtype_bytes + of_table,
    }
    # The gradient of the last layer's output takes the place of that output, which graphs keep.
    stays = kept + (hidden if s.cuda_graphs else 0)
    if not s.cuda_graphs:
        phases["activations and backward of one layer"] = stays + _in_layer_backward_bytes(config, s, False)
    if s.rank is not None:
        phases["activations and backward with a refresh"] = stays + _in_layer_backward_bytes(config, s, True)
    updates = max(_update_bytes(shape, s) for shape in shapes)
    if s.gradients_live_in_backward:
        values = sum(math.prod(gradient_shape(shape, s)) for shape in shapes)
        gradients = _float32_copy_bytes(values, s) or s.dtype_bytes * values
        rest = stays - (0 if s.cuda_graphs else layer)
        phases["activations and updates of one layer"] = rest + hidden + gradients + updates
    else:
        gradients = max(_float32_copy_bytes(math.prod(gradient_shape(shape, s)), s) for shape in shapes)
        of_table = copied + _table_update_bytes(config, s)
        phases["update of the largest weight"] = max(gradients + updates, of_table)
    return phases


def _loss_bytes(config: LlamaConfig, s: MemorySettings) -> int:
    """The final norm's output and its gradient, a chunk of logits, and the gradient of the head.

    Over several chunks the latter is summed in float32 and then rounded, beside the chunk. A token also has a target
    and a float32 loss.
    """
    tokens, table = s.batch_size * s.max_length, config.vocab_size * config.hidden_size
    row = _multiple(config.vocab_size, _HEAD_COLUMNS) * s.dtype_bytes
    chunks = token_chunks(tokens, row)
    in_float32 = len(chunks) > 1 and s.dtype_bytes < 4
    head = table * (s.dtype_bytes + (4 if in_float32 else 0))
    return 2 * _hidden_bytes(config, s) + row * max(stop - start for start, stop in chunks) + head + (8 + 4) * tokens


def _in_layer_backward_bytes(config: LlamaConfig, s: MemorySettings, refresh: bool) -> int:
    """Inside the backward pass of a layer, beside what is kept and the gradient of the layer's output.

    down_proj: the gradient of the product, and what multiplying or projecting takes. SwiGLU: the gradients of product,
    gate and up, or those of gate and up with the codes of one; a compiled layer writes one over a tensor that it has
    saved, unless its backward pass is run again and again. Attention: gradients of the inputs of gate and up, of the
    norm's input, of o_proj's input, of queries, keys and values, and those of the queries in float32; the MLP's tensors
    are gone by then.
    """
    tokens, query, key_value = s.batch_size * s.max_length, *_attention_widths(config)
    hidden, wide = _hidden_bytes(config, s), tokens * _mlp_width(config, s) * s.dtype_bytes
    shape = (config.hidden_size, config.intermediate_size)
    multiplying, codes = _multiplying_bytes(shape, s), _codes_bytes(config.intermediate_size, s)
    projecting = _refresh_in_backward_bytes(shape, s) if refresh else _projecting_bytes(shape, s)
    attention = 4 * hidden + tokens * ((query + 2 * key_value) * s.dtype_bytes + 4 * query)
    recomputes = _recomputes_last_layer(config, s)
    saved = layer_activation_bytes(config, s) - hidden if recomputes else 0
    steps: tuple[int, ...]
    if s.cuda_graphs and not recomputes:
        steps = (wide + max(multiplying, projecting), 3 * wide, 2 * wide + codes, attention)
    else:
        at_swiglu = 0 if s.compiled else 2 * wide
        steps = (wide + max(multiplying, projecting), at_swiglu + codes, attention - 3 * wide - hidden)
    return saved + max(steps)


def _multiplying_bytes(shape: Shape, s: MemorySettings) -> int:
    """Beside the factors of an input's gradient and the result: the dequantized weight; or codes, and the weight's own
    where its rows have to be moved to even addresses."""
    if s.weight_bits is None:
        return 0
    if s.int8_products:
        return _codes_bytes(shape[0], s) + (shape[0] * _multiple(shape[1], 16) if shape[1] % 16 else 0)
    return math.prod(map(padded_width, shape)) * s.dtype_bytes


def _codes_bytes(columns: int, s: MemorySettings) -> int:
    """Activations of so many columns in INT8, with a scale and a sum a row; nothing without products in INT8."""
    return s.batch_size * s.max_length * (_multiple(columns, 128) + 8) if s.int8_products else 0


def _projecting_bytes(shape: Shape, s: MemorySettings) -> int:
    """What makes the gradient of one matrix: basis, projected gradient, and a projected factor or the full gradient."""
    full = math.prod(shape) * s.dtype_bytes
    if s.rank is None:
        return full
    tokens, projected = s.batch_size * s.max_length, sides(shape, s)
    direct = projects_directly(tokens, shape[0], shape[1], s.rank, projected[0])
    between = len(projected) * tokens * s.rank * s.dtype_bytes if direct else full
    return _held_in_projecting_bytes(shape, s) + between


def _held_in_projecting_bytes(shape: Shape, s: MemorySettings) -> int:
    return s.dtype_bytes * (_basis_copy_values(shape, s) + math.prod(gradient_shape(shape, s)))


def _basis_copy_values(shape: Shape, s: MemorySettings) -> int:
    """Values of bases that have to be converted to the activations' dtype."""
    return basis_values(shape, s) if s.proj_bits is not None or s.weight_bits is not None else 0


def _refresh_in_backward_bytes(shape: Shape, s: MemorySettings) -> int:
    """A sketch: momentum, test matrix in float32 and again, its product with a factor; or the full gradient (svd)."""
    assert s.rank is not None
    values, tokens = math.prod(gradient_shape(shape, s)), s.batch_size * s.max_length
    copied = s.dtype_bytes if s.dtype_bytes < 4 else 0
    sketching = values * (4 + copied) + s.dtype_bytes * (tokens * s.rank + basis_values(shape, s))
    if s.svd:  # the first refresh is from a sketch with random numbers
        return max(math.prod(shape) * s.dtype_bytes, _held_in_projecting_bytes(shape, s) + sketching)
    reading = values * (_READ_8BIT_MOMENTS if has_8bit_states(gradient_shape(shape, s), s) else 4)
    return _held_in_projecting_bytes(shape, s) + max(reading, sketching)


def _update_bytes(shape: Shape, s: MemorySettings) -> int:
    """Beside a matrix's gradient: the direction and the bases, and what the refresh takes when one is due.

    By SVD that is the gradient in float32 twice, and singular vectors; the solver's workspace is not counted.
    """
    if s.rank is None:
        return min(_ROW_CHUNK, 4 * math.prod(shape))
    values, bases = math.prod(gradient_shape(shape, s)), basis_values(shape, s)
    update = s.dtype_bytes * (values + _basis_copy_values(shape, s))
    if s.weight_bits is None or s.int8_products or len(sides(shape, s)) == 2:
        update += 4 * (values + bases) + min(_ROW_CHUNK, 4 * math.prod(shape))
    if s.svd:
        return max(update, 4 * (2 * math.prod(shape) + min(shape) * sum(shape)))
    rotated = _ROTATE_8BIT_MOMENTS if has_8bit_states(gradient_shape(shape, s), s) else _ROTATE_FLOAT_MOMENTS
    sketch = 4 * values + s.dtype_bytes * bases  # with the matrix that it was made with
    return update + sketch + rotated * values + _CHANGE_BASIS * bases + 4 * s.rank**2


def _table_update_bytes(config: LlamaConfig, s: MemorySettings) -> int:
    """The float32 direction: of some rows, unless a block of an 8-bit state straddles them."""
    whole = 4 * config.vocab_size * config.hidden_size
    ragged = s.state_bits == 8 and config.hidden_size % 256 != 0
    return whole if ragged else min(whole, _ROW_CHUNK)


def _float32_copy_bytes(values: int, s: MemorySettings) -> int:
    """A gradient leaves an INT8 sum, and goes to the other ranks, in float32."""
    in_float32 = s.dtype_bytes == 4 or (s.grad_accum_dtype == "float32" and s.grad_accum_steps > 1)
    return 4 * values if s.grad_accum_dtype == "int8" or (s.ranks > 1 and not in_float32) else 0


def _table_copy_bytes(table: int, s: MemorySettings) -> int:
    """The same for a table of that many values, of which one rank's INT8 sum is read in rows."""
    whole = _float32_copy_bytes(table, s)
    return min(_ROW_CHUNK, whole) if s.ranks == 1 else whole
