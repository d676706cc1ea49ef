"""LLaMA among the families of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_pretraining.models.family import ModelFamily
from peft_pretraining.models.llama.config import LlamaConfig

if TYPE_CHECKING:
    from peft_pretraining.models.network import CausalLM


class Llama(ModelFamily[LlamaConfig]):
    """LLaMA."""

    model_type = LlamaConfig.model_type
    compiles_layers = True
    recomputes_layers = True
    int8_activations = True
    fp8_head = True
    runs_by_layer = True
    brings_tables = True

    def config(self, raw: dict[str, Any], source: str) -> LlamaConfig:
        """See `ModelFamily.config`."""
        return LlamaConfig.from_dict(raw, source)

    def unknown_keys(self, raw: dict[str, Any]) -> dict[str, str]:
        """See `ModelFamily.unknown_keys`."""
        return LlamaConfig.unknown_keys(raw)

    def network(self, config: LlamaConfig) -> CausalLM:
        """See `ModelFamily.network`."""
        from peft_pretraining.models.llama.modeling import LlamaForCausalLM

        return LlamaForCausalLM(config)


FAMILY = Llama()
