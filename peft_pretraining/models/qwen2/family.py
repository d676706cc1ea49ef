"""Qwen2 among the families of models: LLaMA's network with another configuration."""

from __future__ import annotations

from typing import Any

from peft_pretraining.models.llama.family import Llama
from peft_pretraining.models.qwen2.config import Qwen2Config


class Qwen2(Llama):
    """Qwen2."""

    model_type = Qwen2Config.model_type

    def config(self, raw: dict[str, Any], source: str) -> Qwen2Config:
        """See `ModelFamily.config`."""
        return Qwen2Config.from_dict(raw, source)

    def unknown_keys(self, raw: dict[str, Any]) -> dict[str, str]:
        """See `ModelFamily.unknown_keys`."""
        return Qwen2Config.unknown_keys(raw)


FAMILY = Qwen2()
