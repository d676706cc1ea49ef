"""The models that the benchmarks use: their configurations, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.rows import ROOT
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.registry import read_config

LENGTH = 256
"""The tokens of a sequence."""
MICRO_BATCHES: Mapping[str, int] = {"60m": 256, "130m": 128, "350m": 64, "1b": 16, "7b": 16, "13b": 8}
"""Sequences of a micro-batch by model."""
RANKS: Mapping[str, int] = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024, "13b": 1024}


def config_path(model: str) -> Path:
    """The configuration of a model by its name."""
    return ROOT / f"configs/llama_{model}.json"


def config(model: str) -> ModelConfig:
    """The contents of the configuration file."""
    return read_config(config_path(model))


def tokens(model: str) -> int:
    """The tokens of a micro-batch."""
    return MICRO_BATCHES[model] * LENGTH
