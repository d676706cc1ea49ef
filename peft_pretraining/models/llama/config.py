"""The shape of a LLaMA, read from a Hugging Face `config.json` and checked before anything is built.

Only what our LLaMA implements is accepted (SiLU, plain RoPE, no biases, no dropout); everything else is refused by
name, because a key that is silently ignored trains another model than the one that was asked for.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import HF_HINT, read_config_json

_RENAMED = {"max_sequence_length": "max_position_embeddings"}  # the official Q-GaLore configs' name
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)
_UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one LLaMA, under transformers' names; `source` is the file that errors name."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = 1
    pad_token_id: int | None = 0
    source: str = "the model config"

    def __post_init__(self) -> None:
        for key in _SIZES:
            self._require(_is_int(getattr(self, key)) and getattr(self, key) > 0, key, "a positive whole number")
        for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
            self._require(_is_number(getattr(self, key)) and getattr(self, key) > 0, key, "a positive number")
        self._require(isinstance(self.tie_word_embeddings, bool), "tie_word_embeddings", "true or false")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        self._require(self.head_dim % 2 == 0, "head_dim", "even, because RoPE turns pairs (hidden_size / heads)")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, key)
            inside = token is None or (_is_int(token) and 0 <= token < self.vocab_size)
            self._require(inside, key, f"null or an id inside the vocabulary, 0 to {self.vocab_size - 1}")

    def _require(self, holds: bool, key: str, right: str) -> None:
        if not holds:
            raise UserError(f"{self.source}: {key} is {getattr(self, key)!r}; it must be {right}.")

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read and check a `config.json`; raises UserError naming the file and the key."""
        return cls.from_dict(read_config_json(path), source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "the model config") -> "LlamaConfig":
        """The same from the file's contents; keys that say nothing about the model's arithmetic are ignored."""
        _refuse_unsupported(raw, source)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if key not in raw]
        if missing:
            raise UserError(f"{source}: {', '.join(missing)} missing; a LLaMA config.json gives {', '.join(required)}.")
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        values = {field.name: raw[field.name] for field in fields(cls) if field.name in raw and field.name != "source"}
        values["rope_theta"] = _rope_theta(raw, source)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            if not (_is_int(heads) and _is_int(hidden) and heads > 0 and hidden > 0 and hidden % heads == 0):
                raise UserError(f"{source}: hidden_size is {hidden!r}; it must be a multiple of the {heads!r} heads.")
            values["head_dim"] = hidden // heads
        eos = values.get("eos_token_id")
        if isinstance(eos, list) and eos:
            values["eos_token_id"] = eos[0]
        return cls(**values, source=source)

    def to_hf_dict(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers reads; `dtype` is the stored weights' ("bfloat16", "float32")."""
        values = asdict(self)
        del values["source"]
        rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
        fixed = {"hidden_act": "silu", "use_cache": True, **_UNSUPPORTED}
        head = {"architectures": ["LlamaForCausalLM"], "model_type": self.model_type}
        return {**head, **values, "rope_parameters": rope, **fixed, "dtype": dtype}

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each decoder matrix of one layer, by its name in the state dict."""
        hidden, inter = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }

    def other_shapes(self) -> list[tuple[int, ...]]:
        """Of the embedding table, of the head unless it is tied, and of all norms."""
        tables = [(self.vocab_size, self.hidden_size)] * (1 if self.tie_word_embeddings else 2)
        return [*tables, *[(self.hidden_size,)] * (2 * self.num_hidden_layers + 1)]

    def parameter_count(self) -> int:
        """Trainable values, a tied head counted once."""
        matrices = sum(map(math.prod, self.matrix_shapes().values()))
        return self.num_hidden_layers * matrices + sum(map(math.prod, self.other_shapes()))


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    for old, new in _RENAMED.items():
        if old in raw:
            raise UserError(f"{source}: {old} is the official Q-GaLore code's name; rename it {new}.")
    if raw.get("model_type", "llama") != "llama":
        raise UserError(f"{source}: model_type is {raw['model_type']!r}; it must be 'llama', {HF_HINT}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act is {raw['hidden_act']!r}; it must be 'silu', {HF_HINT}.")
    for key, only in _UNSUPPORTED.items():
        if raw.get(key) not in (only, None):
            raise UserError(f"{source}: {key} is {raw[key]!r}; it must be {json.dumps(only)}, {HF_HINT}.")


def _rope_theta(raw: dict[str, Any], source: str) -> Any:
    """The base of RoPE from today's `rope_parameters`, else from the older `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: {key} is {rope!r}; it must be an object with rope_theta and rope_type.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{source}: {key} has rope_type {kind!r}; it must be 'default', {HF_HINT}.")
    return rope.get("rope_theta", raw.get("rope_theta", 10000.0))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
