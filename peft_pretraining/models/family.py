"""What a family of models says about itself, so that nothing else has to know it by name.

To add a family, add a folder to this one, with a module `family` that has an object `FAMILY` of a subclass of
`ModelFamily`: the registry finds it by the `model_type` of a config.json. Beside it lie the class of its configuration,
with what `ModelConfig` asks for, and its network, a `CausalLM` (see `network`). `family` and the configuration are read
before torch is loaded; the network is imported inside the method `network`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from peft_pretraining.models.config import ModelConfig

if TYPE_CHECKING:
    from peft_pretraining.models.network import CausalLM

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class ModelFamily(ABC, Generic[ConfigT]):
    """A family of models."""

    model_type: str
    """As a config.json has it."""
    compiles_layers: bool = False
    """Its network overrides `CausalLM.compile_layers`; --compile changes nothing otherwise."""
    recomputes_layers: bool = False
    """It overrides `gradient_checkpointing_enable`; --activation_checkpointing is refused otherwise."""
    int8_activations: bool = False
    """It overrides `keep_int8_activations`; --int8_activations is refused otherwise."""
    fp8_head: bool = False
    """It overrides `multiply_head_in_fp8`; --fp8_head is refused otherwise."""

    runs_by_layer: bool = False
    """It overrides `CausalLM.embed`, `layer_constants` and `head_loss`; --accumulate_by layer is refused otherwise."""

    brings_tables: bool = False
    """It overrides `CausalLM.tables` and `bring_tables_by`; each rank of --shard full has embeddings and head whole
    otherwise."""

    @abstractmethod
    def config(self, raw: dict[str, Any], source: str) -> ConfigT:
        """The contents of a config.json, checked; raises UserError that names `source`, the file, and the key."""

    def unknown_keys(self, raw: dict[str, Any]) -> dict[str, str]:
        """Keys of a config.json that nothing reads, each with the known key that may be meant, or ""."""
        return {}

    @abstractmethod
    def network(self, config: ConfigT) -> CausalLM:
        """The network with parameters on PyTorch's default device, not initialised yet."""
