"""The memory that a run needs on one device, by component, worked out before anything is built.

Pure arithmetic on the model's shapes. What stays for the whole run (weights, projections, moments, sums of gradients)
is exact to the byte. What comes and goes is the tensors that autograd saves plus the largest of the passing peaks: for
each phase of an update the tensors that are alive at its worst moment, counted in the code that makes them, with
PyTorch's fused attention and norms as they run on a GPU. Of compiled layers they are those of the code that inductor
makes. CUDA graphs have memory of their own, which between replays the loss and refreshes from Python take: their
phases are as without graphs, over activations that stay. All ranks need the same.

Measured peaks are up to one per cent higher: PyTorch's allocator leaves up to 1 MiB of a block unused, and the tensors
that are smaller than a matrix's side are not counted one by one.
"""

import math
from dataclasses import dataclass, field, replace

from peft_pretraining.memory.activation_bytes import (
    attention_widths,
    hidden_bytes,
    kept_activation_bytes,
    layer_activation_bytes,
    mlp_width,
    recomputes_last_layer,
)
from peft_pretraining.memory.dequant_cache_bytes import held_bases_bytes, held_weights_bytes
from peft_pretraining.memory.settings import MemorySettings, Shape
from peft_pretraining.memory.state_bytes import (
    basis_values,
    gradient_bytes,
    gradient_shape,
    has_8bit_states,
    projection_bytes,
    refresh_bytes,
    residual_bytes,
    sides,
    state_bytes,
    weight_bytes,
)
from peft_pretraining.memory.update_bytes import (
    READ_8BIT_PART,
    ROW_CHUNK,
    basis_copy_values,
    gradient_values,
    largest_update_bytes,
    part_of_moment,
    updated_together,
)
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.ops.linear_cross_entropy import token_chunks
from qgalore.layer.layout import padded_width
from qgalore.subspace.fit import projects_directly

_GRADIENTS, _REFRESHES = "gradients", "for refreshes of subspaces (at most)"
_WORKSPACES = 2 * (32 << 20)
"""cuBLAS takes 8 times 4 MiB, as `run_pretrain.py` sets CUBLAS_WORKSPACE_CONFIG, for each thread that multiplies: that
of the forward pass and autograd's."""
_HEAD_COLUMNS = 64  # the logits of a token are padded to a multiple


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


def plan_memory(config: ModelConfig, settings: MemorySettings) -> MemoryPlan:
    """The memory of one rank; takes milliseconds for any model size."""
    matrices = list(config.matrix_shapes().values())
    layers, s = config.num_hidden_layers, replace(settings, mlp_width=config.intermediate_size)
    rest = config.other_shapes()
    low_rank = [gradient_shape(shape, s) for shape in matrices]
    waiting = 0 if s.gradients_live_in_backward else residual_bytes(matrices, s)
    lasting = {
        "decoder weights": layers * sum(weight_bytes(shape, s) for shape in matrices),
        "embeddings, head, norms": s.dtype_bytes * sum(map(math.prod, rest)),
        "projections": layers * sum(projection_bytes(shape, s) for shape in matrices),
        "optimizer states, decoder": layers * sum(state_bytes(shape, s, decoder=True) for shape in low_rank),
        "optimizer states, embeddings, head, norms": sum(state_bytes(shape, s) for shape in rest),
        _GRADIENTS: layers * (gradient_bytes(low_rank, s) + waiting) + gradient_bytes(rest, s),
        _REFRESHES: refresh_bytes(matrices, layers, s),
    }
    kept = kept_activation_bytes(config, s)
    overhead = {"workspaces of cuBLAS": _WORKSPACES} if s.cuda else {}
    if s.cuda_graphs:
        overhead["memory of CUDA graphs"] = _held_by_graphs_bytes(config, s)
    return MemoryPlan(lasting, _passing(config, s, kept), kept, overhead)


# ---- phases


def _passing(config: ModelConfig, s: MemorySettings, kept: int) -> dict[str, int]:
    """The moments that can be the peak, in the order in which an update comes to them."""
    hidden, table = hidden_bytes(config, s), config.vocab_size * config.hidden_size
    # Beside the head's gradient while it is used up: by its update, or by the sum over micro-batches.
    copied = _table_copy_bytes(table, s)
    of_table = copied + (_table_update_bytes(config, s) if s.gradients_live_in_backward else 0)
    phases = {
        "activations and loss": kept + _loss_bytes(config, s),
        "activations and gradient of the head": kept + hidden + table * s.dtype_bytes + of_table,
    }
    # The gradient of the last layer's output takes the place of that output, which graphs keep.
    stays = kept + (hidden if s.cuda_graphs else 0)
    # A tied head's gradient waits for that of the embeddings.
    waits = table * s.dtype_bytes if config.tie_word_embeddings else 0
    own = _graphs_have_own_memory(config, s)
    phases |= {name: stays + waits + (0 if own else size) for name, size in _beside_activations(config, s).items()}
    if waits:
        phases["gradients of head and embeddings"] = (stays if s.cuda_graphs else hidden) + 2 * waits + of_table
    if not s.gradients_live_in_backward:
        gradients = max(_float32_copy_bytes(gradient_values(group, s), s) for group in updated_together(config, s))
        of_table = copied + _table_update_bytes(config, s)
        phases["update of the largest weight"] = max(gradients + largest_update_bytes(config, s), of_table)
    return phases


def _held_by_graphs_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """What nothing else uses: over ranks, messages of a layer's gradients.

    They are two in turn, and one with what a refresh needs: the sketches of a layer at first, or a full gradient.
    """
    held = 0
    if s.ranks > 1 and s.gradients_live_in_backward:
        shapes = config.matrix_shapes().values()
        values = sum(math.prod(gradient_shape(shape, s)) for shape in shapes) + 2 * config.hidden_size  # of the norms
        sketches = sum(basis_values(shape, s) for shape in shapes) if s.subspace is not None else 0
        refresh = max(sketches, max(map(math.prod, shapes)) if s.svd else 0)
        held += s.dtype_bytes * (3 * values + refresh)
    if _graphs_have_own_memory(config, s):
        held += max(_beside_activations(config, s).values())
    return held


def _graphs_have_own_memory(config: ModelConfig, s: MemorySettings) -> bool:
    """Whether the loss cannot take the memory of the layers' backward pass, since the head's gradient outlives it."""
    used_up = s.gradients_live_in_backward or s.grad_accum_dtype == "int8"
    return s.cuda_graphs and (config.tie_word_embeddings or not used_up)


def _beside_activations(config: ModelConfig, s: MemorySettings) -> dict[str, int]:
    """What the backward pass of the layers takes by its moments, beside all activations: in the graphs' memory."""
    moments = {"activations and backward of one layer": _in_layer_backward_bytes(config, s, False)}
    if s.subspace is not None:
        moments["activations and backward with a refresh"] = _in_layer_backward_bytes(config, s, True)
        moments["activations and backward with a refresh"] += _other_sketches_bytes(config, s)
    if s.gradients_live_in_backward:
        values = sum(math.prod(gradient_shape(shape, s)) for shape in config.matrix_shapes().values())
        gradients, updates = _float32_copy_bytes(values, s) or s.dtype_bytes * values, largest_update_bytes(config, s)
        gradients += residual_bytes(config.matrix_shapes().values(), s)
        updates += _other_sketches_bytes(config, s)
        if not s.cuda_graphs:
            # The layer has given up what it saved, and there is the gradient of its input.
            hidden = hidden_bytes(config, s)
            saved = hidden if recomputes_last_layer(config, s) else layer_activation_bytes(config, s)
            together = hidden - saved + gradients + updates
        else:
            # Over ranks the gradients are copied to a message that has a place of its own, and updates read that.
            together = max(gradients, updates) if s.ranks > 1 else gradients + updates
        moments["activations and updates of one layer"] = together
    return moments


def _loss_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """The final norm's output and its gradient, a chunk of logits, and the gradient of the head.

    Over several chunks the latter is summed in float32 and then rounded, beside the chunk. A token also has a target
    and a float32 loss.
    """
    tokens, table = s.batch_size * s.max_length, config.vocab_size * config.hidden_size
    row = _multiple(config.vocab_size, _HEAD_COLUMNS) * s.dtype_bytes
    chunks = token_chunks(tokens, row)
    in_float32 = len(chunks) > 1 and s.dtype_bytes < 4
    head = table * (s.dtype_bytes + (4 if in_float32 else 0))
    return 2 * hidden_bytes(config, s) + row * max(stop - start for start, stop in chunks) + head + (8 + 4) * tokens


def _in_layer_backward_bytes(config: ModelConfig, s: MemorySettings, refresh: bool) -> int:
    """Inside the backward pass of a layer, beside what is kept and the gradient of the layer's output.

    It is the most where a layer is computed again. By then the layers above it have given up what they had saved, but
    not to graphs.
    """
    held = held_weights_bytes(config, s) + held_bases_bytes(config, s)
    plain = held + _plain_backward_bytes(config, s, refresh, recomputed=False)
    if not s.activation_checkpointing:
        return plain
    hidden, layer = hidden_bytes(config, s), layer_activation_bytes(config, s)
    # A compiled layer has both norms' outputs since the second forward pass.
    again = layer_activation_bytes(config, s, recomputed=True) - hidden + (2 * hidden if s.compiled else 0)
    gone = 0 if s.cuda_graphs else (config.num_hidden_layers - 1) % s.checkpoint_every * layer
    again += held + _plain_backward_bytes(config, s, refresh, recomputed=True) - gone
    return again if s.checkpoint_every == 1 else max(again, plain)


def _plain_backward_bytes(config: ModelConfig, s: MemorySettings, refresh: bool, recomputed: bool) -> int:
    """The same of a layer that has kept its activations, or has just computed them again, without what is held.

    down_proj: the product or its gradient, and what multiplying or projecting takes (uncompiled, both). SwiGLU: the
    gradients of product, gate and up, and the product itself, unless it was freed before. up_proj: the gradients of
    gate and up, the norm's output and its gradient, and again a weight or a projection. Attention: gradients of the
    inputs of gate and up, of the norm's input, of o_proj's input, of queries, keys and values, and those of the queries
    in float32. A compiled layer computes the product anew first, and the output of the attention's norm together with
    the gradient of the other. It writes one gradient over what it has saved, and the MLP's tensors are gone when
    attention comes: unless graphs hold the layer, which runs again, or it has saved codes in INT8. The projected
    gradients made so far are there all along.
    """
    tokens, query, key_value = s.batch_size * s.max_length, *attention_widths(config)
    hidden, wide = hidden_bytes(config, s), tokens * mlp_width(config, s) * s.dtype_bytes
    shape = (config.hidden_size, config.intermediate_size)
    projecting = _refresh_in_backward_bytes(shape, s) if refresh else _projecting_bytes(shape, s)
    if held_bases_bytes(config, s):
        projecting -= s.dtype_bytes * basis_copy_values(shape, s)
    multiplying = max(0 if held_weights_bytes(config, s) else _multiplying_bytes(shape, s), projecting)
    made = s.dtype_bytes * math.prod(gradient_shape(shape, s)) if s.gradients_live_in_backward else 0
    made += residual_bytes([shape], s) if s.gradients_live_in_backward else 0
    attention = 4 * hidden + tokens * ((query + 2 * key_value) * s.dtype_bytes + 4 * query) + 3 * made
    if not s.compiled:
        return max(wide + multiplying, 2 * wide, attention - 3 * wide - hidden)
    attention += hidden
    if recomputed:
        return max(wide + multiplying, attention - 2 * wide)
    if not s.cuda_graphs and not s.int8_activations:
        return max(3 * wide, wide + multiplying, attention - 2 * wide)
    return max(wide + multiplying, 4 * wide, 2 * (wide + hidden) + multiplying + made, attention)


def _multiplying_bytes(shape: Shape, s: MemorySettings) -> int:
    """Beside the factors of an input's gradient and the result: the dequantized weight, or codes of both factors."""
    if s.weight.stored_bits is None:
        return 0
    if s.weight.int8_products:
        return _codes_bytes(shape[0], s) + _multiple(shape[0], 128) * shape[1]
    return math.prod(map(padded_width, shape)) * s.dtype_bytes


def _codes_bytes(columns: int, s: MemorySettings) -> int:
    """Activations of so many columns in INT8, with a scale and a sum a row; nothing without products in INT8."""
    return s.batch_size * s.max_length * (_multiple(columns, 128) + 8) if s.weight.int8_products else 0


def _projecting_bytes(shape: Shape, s: MemorySettings) -> int:
    """What makes the gradient of one matrix: basis, projected gradient, and a projected factor or the full gradient."""
    full = math.prod(shape) * s.dtype_bytes
    if s.subspace is None:
        return full
    tokens, projected = s.batch_size * s.max_length, sides(shape, s)
    direct = not s.residual and projects_directly(tokens, shape[0], shape[1], s.rank_of(shape), projected[0])
    between = len(projected) * tokens * s.rank_of(shape) * s.dtype_bytes if direct else full
    return _held_in_projecting_bytes(shape, s) + between


def _held_in_projecting_bytes(shape: Shape, s: MemorySettings) -> int:
    return s.dtype_bytes * (basis_copy_values(shape, s) + math.prod(gradient_shape(shape, s)))


def _refresh_in_backward_bytes(shape: Shape, s: MemorySettings) -> int:
    """A sketch: momentum in float32, and scaled; that and its product with a factor; or the full gradient."""
    values, tokens = math.prod(gradient_shape(shape, s)), s.batch_size * s.max_length
    sketching = s.dtype_bytes * (values + tokens * s.rank_of(shape) + basis_values(shape, s))
    if s.svd:  # the first refresh is from a sketch with random numbers
        sketching = max(sketching, (4 + s.dtype_bytes) * values)
        return max(math.prod(shape) * s.dtype_bytes, _held_in_projecting_bytes(shape, s) + sketching)
    read = 4 * values if has_8bit_states(gradient_shape(shape, s), s) else 0
    reading = read + (READ_8BIT_PART * part_of_moment(values, s) if read else 0)
    return _held_in_projecting_bytes(shape, s) + max(reading, read + s.dtype_bytes * values, sketching)


def _other_sketches_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Where graphs run a layer and several of its matrices are due: what waits for the end of its backward pass."""
    if s.subspace is None or s.svd or not (s.cuda_graphs and s.gradients_live_in_backward):
        return 0
    shapes = list(config.matrix_shapes().values())
    due = min(len(shapes), math.ceil(config.num_hidden_layers * len(shapes) / s.subspace.shortest_interval))
    return (due - 1) * s.dtype_bytes * max(basis_values(shape, s) for shape in shapes)


def _table_update_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """The float32 direction: of some rows, unless a block of an 8-bit state straddles them."""
    whole = 4 * config.vocab_size * config.hidden_size
    ragged = s.state_bits == 8 and config.hidden_size % 256 != 0
    return whole if ragged else min(whole, ROW_CHUNK)


def _float32_copy_bytes(values: int, s: MemorySettings) -> int:
    """A gradient leaves an INT8 sum, also for the other ranks, in float32."""
    return 4 * values if s.grad_accum_dtype == "int8" else 0


def _table_copy_bytes(table: int, s: MemorySettings) -> int:
    """The same for a table of that many values, of which one rank's INT8 sum is read in rows."""
    whole = _float32_copy_bytes(table, s)
    return min(ROW_CHUNK, whole) if s.ranks == 1 else whole


def _multiple(size: int, unit: int) -> int:
    return -(-size // unit) * unit
