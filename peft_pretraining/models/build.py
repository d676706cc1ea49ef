"""Build a model: read its config, create it without memory, initialise it, compile its layers."""

from pathlib import Path

import torch
from torch import nn

from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import network_of, read_config


def build_on_meta(config_path: str | Path, use_hf_model: bool = False) -> CausalLM:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        if use_hf_model:
            return HFCausalLM(config_path)
        return network_of(read_config(config_path))


def low_rank_names(model: nn.Module) -> list[str]:
    """Dotted names of the decoder's matrices, of LLaMA q, k, v, o, gate, up, down, in the order of the model."""
    if not isinstance(model, CausalLM):
        raise TypeError(f"{type(model).__name__} is no CausalLM: it is not a model of build_model")
    return [name for name, _ in model.named_modules() if model.is_decoder_matrix(name)]


def parameter_count(model: nn.Module) -> int:
    """Values in the model's parameters, a tied one counted once (before quantization: packed codes are fewer)."""
    return sum(parameter.numel() for parameter in model.parameters())
