"""The shape of a LLaMA, read from a Hugging Face `config.json` and checked before anything is built.

Only what our LLaMA implements is accepted (SiLU, RoPE plain or with LLaMA 3.1's scaling, biases in attention alone, no
dropout); everything else is refused by name, because a key that is silently ignored trains another model than the one
that was asked for.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import HARMLESS, HF_HINT, read_config_json
from peft_pretraining.models.rope import RopeScaling, read_rope

_RENAMED = {"max_sequence_length": "max_position_embeddings"}  # the official Q-GaLore configs' name
_OFF: dict[str, Any] = {
    # Of models that are LLaMA but for these, by the value that leaves them out.
    "sliding_window": None, "use_sliding_window": False, "qk_norm": False, "use_qk_norm": False, "qk_layernorm": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "clip_qkv": None, "logit_scale": 1,
    "logits_scaling": 1, "embedding_multiplier": 1, "residual_multiplier": 1, "attention_multiplier": None,
    "scale_emb": 1, "scale_depth": None, "dim_model_base": None, "query_pre_attn_scalar": None, "alibi": False,
    "num_local_experts": 0, "num_experts": 0, "n_routed_experts": 0, "rotary_pct": 1, "rotary_dim": None,
    "rope_interleave": False, "rope_interleaved": False, "no_rope_layers": None, "hidden_dropout": 0,
    "residual_dropout": 0, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_bidirectional_attention": False,
    "use_mrope": False,
}  # fmt: skip
_READ = ("hidden_act", "rope_parameters", "partial_rotary_factor", "layer_types", "quantization_config")
"""Keys that are read and are no field."""
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


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one LLaMA, under transformers' names; `source` is the file that errors name."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    """transformers' class of it."""
    required: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    fixed: ClassVar[dict[str, Any]] = {"mlp_bias": False, "attention_dropout": 0.0}
    """The one value of further keys that is implemented; null and nothing count as it."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Further keys that its files have, which mean nothing with the values of `fixed`."""

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
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    """Whether q, k, v and o have a bias, all of them."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = 1
    pad_token_id: int | None = 0
    source: str = "the model config"

    def __post_init__(self) -> None:
        _refuse(self.source, [f"{key} is {getattr(self, key)!r}; it must be {right}" for key, right in self._faults()])

    def _faults(self) -> Iterator[tuple[str, str]]:
        """Keys whose value cannot be, with what it must be."""
        sizes = {key for key in _SIZES if _is_positive(getattr(self, key))}
        for key in _SIZES:
            if key not in sizes:
                yield key, "a positive whole number"
        for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not (_is_number(getattr(self, key)) and getattr(self, key) > 0):
                yield key, "a positive number"
        for key in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, key), bool):
                yield key, "true or false"
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if {"num_attention_heads", "num_key_value_heads"} <= sizes and heads % kv_heads:
            yield "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
        if "head_dim" in sizes and self.head_dim % 2:
            yield "head_dim", "even, because RoPE turns pairs (hidden_size / heads)"
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, key)
            if "vocab_size" in sizes and token is not None and not (_is_int(token) and 0 <= token < self.vocab_size):
                yield key, f"null or an id inside the vocabulary, 0 to {self.vocab_size - 1}"

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read and check a `config.json`; raises UserError naming the file and the key."""
        return cls.from_dict(read_config_json(path), source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "the model config") -> Self:
        """The same from the file's contents; keys that say nothing about the model's arithmetic are ignored.

        All faults are named at once.
        """
        problems, values = list(cls._unsupported(raw)), {}
        try:
            values["rope_theta"], values["rope_scaling"] = read_rope(raw, source)
        except UserError as error:
            problems.append(_without_source(error, source))
        missing = [key for key in cls.required if key not in raw]
        if missing:
            kind, needed = cls.architecture.removesuffix("ForCausalLM"), ", ".join(cls.required)
            problems.append(f"{', '.join(missing)} missing; a {kind} config.json gives {needed}")
            _refuse(source, problems)
        names = [field.name for field in fields(cls) if field.name not in ("source", "rope_theta", "rope_scaling")]
        values |= {name: raw[name] for name in names if name in raw}
        if values.get("attention_bias") is None:
            values.pop("attention_bias", None)
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            values["head_dim"] = 2  # where the sizes are no numbers, which is said of them
            if _is_positive(heads) and _is_positive(hidden):
                if hidden % heads:
                    problems.append(f"hidden_size is {hidden!r}; it must be a multiple of the {heads!r} heads")
                else:
                    values["head_dim"] = hidden // heads
        eos = values.get("eos_token_id")
        if isinstance(eos, list) and eos:
            values["eos_token_id"] = eos[0]
        try:
            config = cls(**values, source=source)
        except UserError as error:
            problems.append(_without_source(error, source))
        _refuse(source, problems)
        return config

    @classmethod
    def _unsupported(cls, raw: dict[str, Any]) -> Iterator[str]:
        """What keys say of the model's arithmetic that is not implemented."""
        for old, new in _RENAMED.items():
            if old in raw:
                yield f"{old} is the official Q-GaLore code's name; rename it {new}"
        for key, only in (("model_type", cls.model_type), ("hidden_act", "silu")):
            if raw.get(key, only) != only:
                yield f"{key} is {raw[key]!r}; it must be {only!r}, {HF_HINT}"
        for key, only in {**_OFF, **dict.fromkeys(cls.unread), **cls.fixed}.items():
            if key not in cls.unread and raw.get(key) not in (only, None):
                yield f"{key} is {raw[key]!r}; it must be {json.dumps(only)}, {HF_HINT}"
        if raw.get("quantization_config"):
            yield (
                "quantization_config says that the weights are stored in another library's format; give a model with "
                "float weights, or leave the key out"
            )
        types = raw.get("layer_types") or []
        others = [kind for kind in types if kind != "full_attention"] if isinstance(types, list) else [types]
        if others:
            yield f"layer_types has {others[0]!r}; it must be 'full_attention' for every layer, {HF_HINT}"

    @classmethod
    def unknown_keys(cls, raw: dict[str, Any]) -> dict[str, str]:
        """Keys of a config.json that nothing reads, each with the known key that it is nearest to, or ""."""
        known = {field.name for field in fields(cls)} | {*cls.fixed, *cls.unread, *_OFF, *_READ}
        unknown = [key for key in raw if key not in known | HARMLESS and not key.startswith("_")]
        return {key: next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), "") for key in unknown}

    def to_hf_dict(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers reads; `dtype` is the stored weights' ("bfloat16", "float32")."""
        values = asdict(self)
        del values["source"], values["rope_scaling"]
        scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_hf_dict()
        rope = {"rope_theta": values.pop("rope_theta"), **scaling}
        fixed = {"hidden_act": "silu", "use_cache": True, **self.fixed}
        head = {"architectures": [self.architecture], "model_type": self.model_type}
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

    def has_bias(self, matrix: str) -> bool:
        """Whether a matrix of the attention has a bias, by the last part of its name, such as "q_proj"."""
        return self.attention_bias

    def other_shapes(self) -> list[tuple[int, ...]]:
        """Of the embedding table, of the head unless it is tied, of all norms and biases."""
        tables = [(self.vocab_size, self.hidden_size)] * (1 if self.tie_word_embeddings else 2)
        of_attention = {name: shape for name, shape in self.matrix_shapes().items() if name.startswith("self_attn.")}
        biases = [(rows,) for name, (rows, _) in of_attention.items() if self.has_bias(name.removeprefix("self_attn."))]
        norms = [(self.hidden_size,)] * (2 * self.num_hidden_layers + 1)
        return [*tables, *norms, *biases * self.num_hidden_layers]

    def parameter_count(self) -> int:
        """Trainable values, a tied head counted once."""
        matrices = sum(map(math.prod, self.matrix_shapes().values()))
        return self.num_hidden_layers * matrices + sum(map(math.prod, self.other_shapes()))


def _refuse(source: str, problems: Sequence[str]) -> None:
    """Raise UserError with all problems, clauses each, of the file `source`, if there are any."""
    if problems:
        raise UserError(f"{source}: {'. '.join(problems)}.")


def _without_source(error: UserError, source: str) -> str:
    """The clauses of an error that names the file."""
    return str(error).removeprefix(f"{source}: ").removesuffix(".")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and value > 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
