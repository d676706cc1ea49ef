"""Give the decoder's matrices the form of `--method`, one after the other as a model is built."""

from __future__ import annotations

from torch import nn

from peft_pretraining.config.flag_groups import MethodArgs
from peft_pretraining.errors import UserError
from peft_pretraining.methods.adapters import add_adapter
from peft_pretraining.methods.factored import factored
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.models.config import too_high_for_factors
from peft_pretraining.models.init import OnModule
from peft_pretraining.models.network import CausalLM
from qgalore.layer.linear_names import is_conv1d


def matrix_converter(method: MethodArgs, rank: int | str, seed: int, source: str) -> OnModule:
    """A callback for `build_model` that puts factors or an adapter in the place of each decoder matrix.

    method: not full; source: what the configuration is from. The callback raises UserError for a matrix that cannot
    have the rank, or is no nn.Linear.
    """
    assert isinstance(rank, int)

    def convert(model: CausalLM, name: str) -> None:
        if not model.is_decoder_matrix(name):
            return
        linear = model.get_submodule(name)
        if is_conv1d(linear):
            raise UserError(
                f"--method {method.method}: {name} of {source} is a Conv1D of transformers, as GPT-2 has them, and "
                "takes no factors here: use --method full."
            )
        assert isinstance(linear, nn.Linear)
        if rank >= min(linear.weight.shape):
            raise UserError(too_high_for_factors(rank, name, source, linear.weight.shape))
        if method.method == "low_rank":
            made: nn.Module = factored(linear, name, rank, seed, model.config.initializer_range)
        else:
            made = add_adapter(linear, name, method, rank, seed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)

    return convert


def trained_matrix_names(model: CausalLM) -> list[str]:
    """Names of decoder matrices whose weight is trained, or of the factors and adapters in their place."""
    names = []
    for name in low_rank_names(model):
        layer = model.get_submodule(name)
        if "weight" in layer._parameters:
            names.append(name)
        else:
            own = layer.named_parameters()
            names += [f"{name}.{key}" for key, param in own if param.requires_grad and param.dim() > 1]
    return names
