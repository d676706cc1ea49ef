"""Build a LLaMA: read its config, create it without memory, initialise it, compile its layers."""

from pathlib import Path

import torch
from torch import nn

from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.llama.modeling import LlamaForCausalLM

CausalLM = LlamaForCausalLM | HFCausalLM


def build_on_meta(config_path: str | Path, use_hf_model: bool = False) -> CausalLM:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        if use_hf_model:
            return HFCausalLM(config_path)
        return LlamaForCausalLM(LlamaConfig.from_json(config_path))


def low_rank_names(model: nn.Module) -> list[str]:
    """Dotted names of the decoder's linear layers (q, k, v, o, gate, up, down), in the order of the model."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise TypeError(f"{type(model).__name__} has no model.layers: it is not a LLaMA built by build_model")
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{name}" for name, _ in layers.named_modules() if name.rpartition(".")[2] in matrices]


def parameter_count(model: nn.Module) -> int:
    """Values in the model's parameters, a tied one counted once (before quantization: packed codes are fewer)."""
    return sum(parameter.numel() for parameter in model.parameters())
