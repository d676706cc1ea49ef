"""What the backward pass keeps of the forward one: what autograd saves, counted in the code that makes it."""

import math

from peft_pretraining.memory.settings import MemorySettings
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.ops.swiglu import group_size_of
from qgalore.layer.layout import padded_width


def layer_activation_bytes(config: ModelConfig, s: MemorySettings, recomputed: bool = False) -> int:
    """What autograd keeps of one decoder layer between forward and backward.

    Each norm: its input and one float32 a token. Attention: rotated queries and keys, values, output (shared with
    o_proj's input) and the float32 log-sum-exp of each head; the rotation itself saves only its tables. MLP: gate
    (input of silu) and up. Uncompiled also the output of each norm, which the linears save once for all, silu(gate) and
    the product; a compiled layer computes these again. Gate and up may be kept in INT8, but not when they are
    `recomputed` for the backward pass that follows.
    """
    tokens, query, key_value = s.batch_size * s.max_length, *attention_widths(config)
    again = 0 if s.compiled else 2 * config.hidden_size + 2 * mlp_width(config, s)
    values = 2 * config.hidden_size + 2 * query + 2 * key_value + again
    gate_and_up = 2 * tokens * mlp_width(config, s)
    size = group_size_of(gate_and_up // 2) if s.int8_activations and s.compiled and not recomputed else None
    of_mlp = gate_and_up * s.dtype_bytes if size is None else gate_and_up + gate_and_up // size * 2
    return tokens * (values * s.dtype_bytes + 4 * (2 + config.num_attention_heads)) + of_mlp


def kept_activation_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Of all layers; then the last one's output, one float32 a token of the norm, the ids and the labels."""
    hidden, layers = hidden_bytes(config, s), config.num_hidden_layers
    recomputed = math.ceil(layers / s.checkpoint_every) if s.activation_checkpointing else 0
    of_layers = recomputed * hidden + (layers - recomputed) * layer_activation_bytes(config, s)
    return of_layers + hidden + (4 + 8 + 8) * s.batch_size * s.max_length


def recomputes_last_layer(config: ModelConfig, s: MemorySettings) -> bool:
    """Whether the layer whose backward pass comes first, when all others are still kept, is a checkpointed one."""
    return s.activation_checkpointing and (config.num_hidden_layers - 1) % s.checkpoint_every == 0


def hidden_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Of the hidden states between two layers."""
    return s.batch_size * s.max_length * config.hidden_size * s.dtype_bytes


def mlp_width(config: ModelConfig, s: MemorySettings) -> int:
    """Of the MLP's activations, which low-rank layers pad."""
    return config.intermediate_size if s.subspace is None else padded_width(config.intermediate_size)


def attention_widths(config: ModelConfig) -> tuple[int, int]:
    """Of all queries of a token, and of all keys or values."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
