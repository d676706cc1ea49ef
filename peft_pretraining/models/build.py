"""Build a model: read its config, create it without memory, initialise it, compile its layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from peft_pretraining.errors import UserError
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


def check_ranks_of(
    model: CausalLM, source: str, ranks: Sequence[int | str], mlp_ranks: Sequence[int | str] | None = None
) -> None:
    """Refuse ranks of which one exceeds the smaller side of a decoder matrix: UserError. A word is no such rank.

    For models of transformers; of our own, `peft_pretraining.models.config.check_ranks` sees it before anything is
    built. source: the file of the configuration; mlp_ranks: of matrices in a module called mlp, None for the same.
    """
    for name in low_rank_names(model):
        of_mlp = mlp_ranks is not None and ".mlp." in name
        matrix, flag = model.get_submodule(name), "mlp_rank" if of_mlp else "rank"
        shape: tuple[int, ...] = matrix.get_parameter("weight").shape
        if isinstance(matrix, LowRankLinear):  # whose weight may be packed
            shape = (matrix.out_features, matrix.in_features)
        for given in mlp_ranks if of_mlp and mlp_ranks is not None else ranks:
            if isinstance(given, int) and given > min(shape):
                size = " x ".join(map(str, shape))
                raise UserError(f"--{flag} is {given}, but {name} of {source} is {size}: give at most {min(shape)}.")


def parameter_count(model: nn.Module) -> int:
    """Values in the model's parameters, a tied one counted once (before quantization: packed codes are fewer)."""
    return sum(parameter.numel() for parameter in model.parameters())
