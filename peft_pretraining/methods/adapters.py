"""LoRA adapters beside frozen matrices, by peft: W x + (alpha / rank) B A x with A (rank, in) and B (out, rank).

Hu et al., arXiv 2106.09685. A begins as peft has it (Kaiming uniform) and B with zeros, so that a run begins with the
model that the same run without adapters would begin with. The values of A are a function of the run's seed and the
layer's name, and adapters have the data type of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.config.flag_groups import MethodArgs
from peft_pretraining.methods.dropout import SeededDropout
from peft_pretraining.models.init import generator_of

_NAME = "default"
"""peft's name for a layer's only adapter."""
BASE, A, B = "base_layer", f"lora_A.{_NAME}.weight", f"lora_B.{_NAME}.weight"
"""Where peft's layer has the frozen one, and the two factors."""


@dataclass(frozen=True)
class Adapter:
    """A layer of peft as it is used here."""

    name: str
    """Of the matrix."""
    layer: Any

    @property
    def base(self) -> nn.Linear:
        """The frozen layer."""
        base: nn.Linear = self.layer.base_layer
        return base

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (rank, in_features) and B (out_features, rank)."""
        return self.layer.lora_A[_NAME].weight, self.layer.lora_B[_NAME].weight

    @property
    def scaling(self) -> float:
        """What the adapter is multiplied by."""
        return float(self.layer.scaling[_NAME])


def add_adapter(linear: nn.Linear, name: str, method: MethodArgs, rank: int, seed: int) -> nn.Module:
    """peft's layer around a frozen linear one, float or of `methods.frozen`; name: that of the matrix in the model.

    The bias of the layer is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    dtype = linear.weight.dtype
    if method.method == "qlora":
        from peft_pretraining.methods.frozen import frozen

        linear = frozen(linear, method.qlora_bits)
    holder: Any = nn.Module()
    holder.matrix = linear
    # By these attributes, which transformers sets, peft sees what it may take for bitsandbytes' layers.
    holder.is_loaded_in_4bit = method.method == "qlora" and method.qlora_bits == 4
    holder.is_loaded_in_8bit = method.method == "qlora" and method.qlora_bits == 8
    config = LoraConfig(r=rank, lora_alpha=method.lora_alpha, target_modules=["matrix"])
    inject_adapter_in_model(config, holder, low_cpu_mem_usage=True)  # factors without memory
    adapter = Adapter(name, holder.matrix)
    start = first_factors(adapter, seed)
    for part, value in zip((adapter.layer.lora_A, adapter.layer.lora_B), start, strict=True):
        part[_NAME].weight = nn.Parameter(value.to(linear.weight.device, dtype))
    if method.lora_dropout:
        own_seed = generator_of(seed, f"{name}.dropout").initial_seed()
        adapter.layer.lora_dropout[_NAME] = SeededDropout(method.lora_dropout, own_seed, linear.weight.device)
    if linear.bias is not None:
        linear.bias.requires_grad_(True)
    layer: nn.Module = holder.matrix
    return layer


def first_factors(adapter: Adapter, seed: int, restart: int = 0) -> tuple[Tensor, Tensor]:
    """A and B in float32 on the CPU before their first update, and after a restart of this number, with another A."""
    (rank, columns), (rows, _) = (factor.shape for factor in adapter.factors)
    generator = generator_of(seed, f"{adapter.name}.{A}" + (f"/{restart}" if restart else ""))
    values = torch.empty(rank, columns)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values, torch.zeros(rows, rank)


def adapters_of(model: nn.Module) -> Iterator[Adapter]:
    """All of a model, in its order."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield Adapter(name, module)
