"""Build a model: read its config, create it without memory, initialise it, compile its layers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import network_of, read_config
from qgalore.layer.linear import LowRankLinear


def build_on_meta(config_path: str | Path, use_hf_model: bool = False) -> CausalLM:
    """The model without memory for its parameters."""
    if use_hf_model:
        return HFCausalLM(config_path)
    return network_on_meta(read_config(config_path))


def network_on_meta(config: ModelConfig) -> CausalLM:
    """The network of a configuration without memory for its parameters."""
    with torch.device("meta"), _NoInitialValues():
        return network_of(config)


class _NoInitialValues(TorchFunctionMode):
    """Leaves out `torch.nn.init`, whose random numbers on the meta device import PyTorch's compiler: seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        skipped = getattr(func, "__module__", "") == init.__name__
        return kwargs["tensor"] if skipped else func(*args, **kwargs)


def low_rank_names(model: nn.Module) -> list[str]:
    """Dotted names of the decoder's matrices, of LLaMA q, k, v, o, gate, up, down, in the order of the model."""
    if not isinstance(model, CausalLM):
        raise TypeError(f"{type(model).__name__} is no CausalLM: it is not a model of build_model")
    return [name for name, _ in model.named_modules() if model.is_decoder_matrix(name)]


def matrix_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """The shape of each decoder matrix by its dotted name, (out_features, in_features) where it is quantized."""
    found = dict[str, tuple[int, ...]]()
    for name in low_rank_names(model):
        matrix = model.get_submodule(name)
        found[name] = matrix.get_parameter("weight").shape
        if isinstance(matrix, LowRankLinear):  # whose weight may be packed
            found[name] = (matrix.out_features, matrix.in_features)
    return found


def parameter_count(model: nn.Module) -> int:
    """Values in the model's parameters, a tied one counted once (before quantization: packed codes are fewer)."""
    return sum(parameter.numel() for parameter in model.parameters())
