"""The families of models: every folder here whose module `family` has an object `FAMILY` (see `family`)."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining import models
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import HF_HINT, ModelConfig, read_config_json
from peft_pretraining.models.family import ModelFamily

if TYPE_CHECKING:
    from peft_pretraining.models.network import CausalLM

WITHOUT_MODEL_TYPE = "llama"


def families() -> dict[str, ModelFamily[Any]]:
    """All families by the `model_type` of their config.json, in the alphabetical order of their folders."""
    found: dict[str, ModelFamily[Any]] = {}
    for folder in sorted(module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg):
        name = f"{models.__name__}.{folder}.family"
        if importlib.util.find_spec(name) is None:
            continue
        family = importlib.import_module(name).FAMILY
        if not isinstance(family, ModelFamily):
            raise TypeError(f"FAMILY of {name} is no ModelFamily")
        if family.model_type in found:
            raise ValueError(f"two folders of {models.__name__} define the family {family.model_type}")
        found[family.model_type] = family
    return found


def find_family(raw: dict[str, Any], source: str) -> ModelFamily[Any]:
    """The family of a config.json with these contents. Raises UserError that lists them all."""
    known, model_type = families(), raw.get("model_type", WITHOUT_MODEL_TYPE)
    for name, family in known.items():
        if name == model_type:
            return family
    names = " or ".join(map(repr, known))
    raise UserError(f"{source}: model_type is {model_type!r}; it must be {names}, {HF_HINT}.")


def config_from(raw: dict[str, Any], source: str) -> ModelConfig:
    """The configuration in a config.json with these contents. Raises UserError."""
    config: ModelConfig = find_family(raw, source).config(raw, source)
    return config


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in the file of `--model_config`. Raises UserError."""
    return config_from(read_config_json(path), str(path))


def family_of(config: ModelConfig) -> ModelFamily[Any]:
    """The family that a configuration is of."""
    return families()[config.model_type]


def network_of(config: ModelConfig) -> CausalLM:
    """The network of a configuration; see `ModelFamily.network`."""
    return family_of(config).network(config)
