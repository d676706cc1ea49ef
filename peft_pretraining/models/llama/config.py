"""The shape of a LLaMA, read from a Hugging Face `config.json` and checked before anything is built.

Only what our LLaMA implements is accepted (SiLU, plain RoPE, no biases, no dropout); everything else is refused by
name, because a key that is silently ignored trains another model than the one that was asked for.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError

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
_HF_HINT = "or pass --use_hf_model, which trains transformers' own class"


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one LLaMA, under transformers' names; `source` is the file that errors name."""

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
        values = {key: raw[key] for key in cls.__dataclass_fields__ if key in raw and key != "source"}
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
        head = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
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

    def parameter_count(self) -> int:
        """Trainable values, a tied head counted once."""
        layer = sum(out * into for out, into in self.matrix_shapes().values()) + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * layer + self.hidden_size

    def check_length(self, max_length: int) -> None:
        """Refuse sequences longer than the context."""
        if max_length > self.max_position_embeddings:
            raise UserError(
                f"--max_length is {max_length}, but {self.source} has max_position_embeddings "
                f"{self.max_position_embeddings}: give at most that, or a config with a longer context."
            )

    def check_tokenizer(self, vocab_size: int, name: str) -> None:
        """Refuse a tokenizer whose ids do not fit into the embedding table."""
        if vocab_size > self.vocab_size:
            raise UserError(
                f"--tokenizer {name} has {vocab_size} tokens, but {self.source} has vocab_size {self.vocab_size}: "
                f"raise vocab_size in the config or take a smaller tokenizer."
            )

    def check_rank(self, rank: int, flag: str = "rank") -> None:
        """Refuse a rank that exceeds the smaller side of a decoder matrix."""
        name, shape = min(self.matrix_shapes().items(), key=lambda item: min(item[1]))
        if rank > min(shape):
            size = f"{shape[0]} x {shape[1]}"
            raise UserError(f"--{flag} is {rank}, but {name} of {self.source} is {size}: give at most {min(shape)}.")


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a model config; raises UserError if there is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--model_config {path}: no such file; configs/ holds llama_9m.json to llama_13b.json."
        ) from None
    except OSError as error:
        raise UserError(f"--model_config {path}: cannot be read ({error.strerror}); give a JSON file.") from None
    except ValueError as error:
        raise UserError(f"--model_config {path}: not JSON ({error}); give a Hugging Face config.json.") from None
    if not isinstance(raw, dict):
        raise UserError(f"--model_config {path}: holds a JSON {type(raw).__name__}; a config.json is an object.")
    return raw


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    for old, new in _RENAMED.items():
        if old in raw:
            raise UserError(f"{source}: {old} is the official Q-GaLore code's name; rename it {new}.")
    if raw.get("model_type", "llama") != "llama":
        raise UserError(f"{source}: model_type is {raw['model_type']!r}; it must be 'llama', {_HF_HINT}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act is {raw['hidden_act']!r}; it must be 'silu', {_HF_HINT}.")
    for key, only in _UNSUPPORTED.items():
        if raw.get(key) not in (only, None):
            raise UserError(f"{source}: {key} is {raw[key]!r}; it must be {json.dumps(only)}, {_HF_HINT}.")


def _rope_theta(raw: dict[str, Any], source: str) -> Any:
    """The base of RoPE from today's `rope_parameters`, else from the older `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: {key} is {rope!r}; it must be an object with rope_theta and rope_type.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{source}: {key} has rope_type {kind!r}; it must be 'default', {_HF_HINT}.")
    return rope.get("rope_theta", raw.get("rope_theta", 10000.0))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
