"""The memory that a run needs on one device, by component, worked out before anything is built.

Pure arithmetic on the model's shapes. What stays for the whole run (weights, projections, moments, accumulators) is
exact to the byte. What comes and goes is the tensors that autograd saves plus the largest of the passing peaks, with
PyTorch's fused attention and norms as they run on a GPU; measured peaks also hold the allocator's rounding and the
libraries' workspaces. All ranks need the same.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from peft_pretraining.model_config import LlamaConfig

_BLOCK = 256  # values that share a float32 absmax in an 8-bit state
_MIN_8BIT = 4096  # smaller weights keep float32 states
_ACCUMULATOR_GROUP = 256  # values that share a scale and a zero point in an INT8 gradient accumulator
_ACCUMULATOR_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component: `lasting` stays for the run; of the phases in `passing` only the largest counts."""

    lasting: dict[str, int]
    passing: dict[str, int]
    activations: int
    """What the backward pass keeps of the forward one; the first two phases include it."""

    @property
    def weights_and_states_bytes(self) -> int:
        """Weights and optimizer states alone: the estimate that the papers' tables give."""
        return sum(size for name, size in self.lasting.items() if name not in (_GRADIENTS, _REFRESHES))

    @property
    def peak_bytes(self) -> int:
        """The planned peak."""
        return sum(self.lasting.values()) + max(self.passing.values())

    def table(self) -> str:
        """The plan as text, in GB (10^9 bytes)."""

        def line(name: str, size: int) -> str:
            return f"  {name:<44}{size / 1e9:>10.3f} GB"

        largest = max(self.passing, key=lambda name: self.passing[name])
        lines = ["Planned memory of one rank", "kept during the run:"]
        lines += [line(name, size) for name, size in self.lasting.items() if size]
        lines += ["passing, of which the largest (*) counts:"]
        lines += [line(f"{name}{' *' if name == largest else ''}", size) for name, size in self.passing.items()]
        lines += [line("of these, activations", self.activations), "together:"]
        lines += [line("weights and optimizer states", self.weights_and_states_bytes), line("peak", self.peak_bytes)]
        return "\n".join(lines)


_GRADIENTS, _REFRESHES = "gradients", "for refreshes of subspaces (at most)"
_FIRST_REFRESH_SPREAD = 8  # updates over which the first refreshes of all subspaces are spread


@dataclass(frozen=True)
class MemorySettings:
    """What besides the model's shape decides the memory; names and meanings are the flags'."""

    batch_size: int
    """Sequences a micro-batch of this rank."""
    max_length: int
    """Tokens a sequence."""
    dtype_bytes: int = 2
    """Bytes a float weight or activation: 2 for bfloat16, 4 for float32."""
    grad_accum_steps: int = 1
    """Micro-batches an update."""
    grad_accum_dtype: str = "float32"
    """float32, bfloat16 or int8: sums of gradients between micro-batches."""
    per_layer: bool = False
    """Updates inside the backward pass."""
    activation_checkpointing: bool = False
    """Keep one activation a layer and recompute the others."""
    rank: int | None = None
    """Dimension of the subspace of the decoder matrices; None trains them in full."""
    proj_type: str = "std"
    """std, reverse_std, left, right or full."""
    proj_bits: int | None = None
    """8 or 4: bits of a projection; None keeps it float."""
    proj_group_size: int = 256
    """Values of a basis vector that share a scale."""
    update_proj_gap: int = 200
    """Updates between two refreshes of a subspace, over which those of all matrices are spread."""
    svd: bool = True
    """Subspaces come from the full gradient of one matrix at a time; False: from a sketch (streaming)."""
    weight_bits: int | None = None
    """8 or 4: bits of a decoder weight; None keeps it float (as --simulation does)."""
    weight_group_size: int = 256
    """Weights of a row that share a scale."""
    state_bits: int = 32
    """8 (block-wise), 16 or 32 bits a value of an optimizer state."""
    states: int = 2
    """Optimizer states of the weights' size: 2 for Adam, 1 for momentum, 0 for none."""
    factored: bool = False
    """Adafactor: of a matrix one value a row and one a column instead."""


def plan_memory(config: LlamaConfig, settings: MemorySettings) -> MemoryPlan:
    """The memory of one rank; takes milliseconds for any model size."""
    matrices = list(config.matrix_shapes().values())
    layers, s = config.num_hidden_layers, settings
    table = (config.vocab_size, config.hidden_size)
    tables = [table] if config.tie_word_embeddings else [table, table]
    norms = [(config.hidden_size,)] * (2 * layers + 1)
    rest: list[tuple[int, ...]] = [*tables, *norms]
    low_rank = [_gradient_shape(shape, s) for shape in matrices]
    tokens = s.batch_size * s.max_length
    boundary = tokens * config.hidden_size * s.dtype_bytes
    saved = layer_activation_bytes(config, s.batch_size, s.max_length, s.dtype_bytes)
    ends = 2 * boundary + 8 * tokens  # the last layer's output, its norm, the token ids
    kept = layers * (boundary if s.activation_checkpointing else saved) + ends
    lasting = {
        "decoder weights": layers * sum(_weight_bytes(shape, s) for shape in matrices),
        "embeddings, head, norms": s.dtype_bytes * sum(map(math.prod, rest)),
        "projections": layers * sum(_projection_bytes(shape, s) for shape in matrices),
        "optimizer states, decoder": layers * sum(_state_bytes(shape, s) for shape in low_rank),
        "optimizer states, embeddings, head, norms": sum(_state_bytes(shape, s) for shape in rest),
        _GRADIENTS: layers * _gradient_bytes(low_rank, s) + _gradient_bytes(rest, s),
        _REFRESHES: _refresh_bytes(matrices, layers, s),
    }
    return MemoryPlan(lasting, _passing(config, s, kept, saved), kept)


def layer_activation_bytes(config: LlamaConfig, batch_size: int, length: int, dtype_bytes: int) -> int:
    """What autograd keeps of one decoder layer between forward and backward.

    Each norm: its input, its output (which the linears save once for all) and one float32 a token. Attention: rotated
    queries and keys, values, output (shared with o_proj's input) and the float32 log-sum-exp of each head; the rotation
    itself saves only its tables. MLP: gate (input of silu), up, silu(gate) (factor of the product), product.
    """
    tokens = batch_size * length
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    values = 4 * config.hidden_size + 2 * query + 2 * key_value + 4 * config.intermediate_size
    return tokens * (values * dtype_bytes + 4 * (2 + config.num_attention_heads))


def _passing(config: LlamaConfig, s: MemorySettings, kept: int, saved: int) -> dict[str, int]:
    """The three moments that can be the peak.

    At the loss all activations are alive and beside them, in float32, the log-probabilities, their gradient and the
    logits' gradient. In the backward pass of the last layer's MLP the loss is gone, and beside what that layer saved
    (again, under checkpointing) are the gradients of gate, up and product. At an update outside the backward pass the
    activations are gone; in per-layer mode the matrices are updated in the second phase, the head before it.
    """
    tokens = s.batch_size * s.max_length
    largest = max(map(math.prod, config.matrix_shapes().values()))
    table = config.vocab_size * config.hidden_size
    dense = largest * s.dtype_bytes if s.weight_bits is not None else 0
    gradients = tokens * s.dtype_bytes * (3 * config.intermediate_size + 2 * config.hidden_size)
    recomputed = saved if s.activation_checkpointing else 0
    # float32: the update of the largest matrix and at a refresh its full gradient; of a table gradient and update.
    of_matrix = largest * (4 if s.rank is not None and not s.svd else 8)
    of_table = table * (8 if _lives_in_backward_only(s) else 4)
    return {
        "activations and loss": kept + 3 * 4 * tokens * config.vocab_size,
        "activations and backward of one layer": kept
        + recomputed
        + gradients
        + dense
        + (of_matrix if s.per_layer else 0),
        "update of the largest weight": kept + of_table if s.per_layer else max(of_matrix, of_table),
    }


def _lives_in_backward_only(s: MemorySettings) -> bool:
    return s.per_layer and s.grad_accum_steps == 1


def _sides(shape: tuple[int, ...], s: MemorySettings) -> tuple[str, ...]:
    longer, shorter = ("right", "left") if shape[0] >= shape[1] else ("left", "right")
    one = {"std": longer, "reverse_std": shorter, "left": "left", "right": "right"}
    return (one[s.proj_type],) if s.proj_type in one else ("left", "right")


def _gradient_shape(shape: tuple[int, int], s: MemorySettings) -> tuple[int, ...]:
    """Of what the optimizer sees: (rank, in), (out, rank) or (rank, rank)."""
    if s.rank is None:
        return shape
    sides = _sides(shape, s)
    return (s.rank if "left" in sides else shape[0], s.rank if "right" in sides else shape[1])


def _quantized_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Codes, and a bfloat16 scale and zero point a group; groups and packed bytes do not straddle rows."""
    return rows * (math.ceil(columns * bits / 8) + 4 * math.ceil(columns / group_size))


def _weight_bytes(shape: tuple[int, int], s: MemorySettings) -> int:
    if s.weight_bits is None:
        return math.prod(shape) * s.dtype_bytes
    return _quantized_bytes(*shape, s.weight_bits, s.weight_group_size)


def _projection_bytes(shape: tuple[int, int], s: MemorySettings) -> int:
    if s.rank is None:
        return 0
    lengths = [shape[0 if side == "left" else 1] for side in _sides(shape, s)]
    if s.proj_bits is not None:
        return sum(_quantized_bytes(s.rank, length, s.proj_bits, s.proj_group_size) for length in lengths)
    # A float basis has the dtype of a float weight, and is float32 beside integer weights.
    return s.rank * sum(lengths) * (s.dtype_bytes if s.weight_bits is None else 4)


def _state_bytes(shape: tuple[int, ...], s: MemorySettings) -> int:
    if s.factored and len(shape) == 2:
        return 4 * sum(shape)
    values = math.prod(shape)
    if s.state_bits == 8 and values >= _MIN_8BIT:
        return s.states * (values + 4 * math.ceil(values / _BLOCK))
    return s.states * values * (s.state_bits // 8 if s.state_bits != 8 else 4)


def _gradient_bytes(shapes: Iterable[tuple[int, ...]], s: MemorySettings) -> int:
    """Gradients that wait for their update: all of them, but where each update happens in its layer's backward.

    Without per-layer updates all are complete, in float32, before the first update; with them they only ever are sums.
    """
    if _lives_in_backward_only(s):
        return 0
    if not s.per_layer:
        return 4 * sum(map(math.prod, shapes))
    return sum(_sum_bytes(shape, s) for shape in shapes)


def _sum_bytes(shape: tuple[int, ...], s: MemorySettings) -> int:
    """A sum over three micro-batches or more; the first gradient alone is kept in its own dtype."""
    if s.grad_accum_dtype == "int8" and len(shape) == 2:
        return _quantized_bytes(*shape, 8, _ACCUMULATOR_GROUP)
    return math.prod(shape) * _ACCUMULATOR_BYTES.get(s.grad_accum_dtype, 4)


def _refresh_bytes(matrices: list[tuple[int, int]], layers: int, s: MemorySettings) -> int:
    """Sketches (rank, side), or in svd mode from the second refresh on full gradients, of the subspaces that are due.

    Where an update ends with the one backward pass of each layer, they do not outlive it.
    """
    if s.rank is None or _lives_in_backward_only(s):
        return 0

    def due(spread: int) -> int:
        return math.ceil(layers * len(matrices) / max(1, min(spread, s.update_proj_gap)))

    sketch = max(_sum_bytes((s.rank, shape[side == "right"]), s) for shape in matrices for side in _sides(shape, s))
    full = max(_sum_bytes(shape, s) for shape in matrices)
    # The first refreshes, always from sketches, can meet the second ones of a short interval.
    return due(_FIRST_REFRESH_SPREAD) * sketch + due(s.update_proj_gap) * (full if s.svd else sketch)
