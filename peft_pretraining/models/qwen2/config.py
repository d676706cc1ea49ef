"""The shape of a Qwen2: LLaMA's with biases of queries, keys and values (Yang et al., arXiv 2407.10671)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_pretraining.models.llama.config import LlamaConfig


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """As `LlamaConfig`, with what transformers' Qwen2Config takes for keys that are not there."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    required: ClassVar[tuple[str, ...]] = (*LlamaConfig.required, "num_key_value_heads")
    fixed: ClassVar[dict[str, Any]] = {"attention_dropout": 0.0, "use_sliding_window": False}
    unread: ClassVar[tuple[str, ...]] = ("sliding_window", "max_window_layers")

    max_position_embeddings: int = 32768
    attention_bias: bool = True
    """Whether q, k and v have a bias; all Qwen2 do, and their files do not say so."""
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def _faults(self) -> Iterator[tuple[str, str]]:
        """See `LlamaConfig`."""
        yield from super()._faults()
        if self.attention_bias is False:
            yield "attention_bias", "true or left out: q, k and v have biases"

    def has_bias(self, matrix: str) -> bool:
        """See `LlamaConfig.has_bias`."""
        return matrix in ("q_proj", "k_proj", "v_proj")

    def to_hf_dict(self, dtype: str) -> dict[str, Any]:
        """See `LlamaConfig.to_hf_dict`."""
        values = super().to_hf_dict(dtype)
        del values["attention_bias"]
        return values
