"""A pretrained model made ready for one of the five methods, and the bytes of its weights and optimizer states.

All methods train the same matrices, the linear layers of the blocks: full, galore and q_galore train them themselves
and the rest of the model with them, lora and qlora train adapters beside them. Layers are quantized one after the
other, so that a device never holds the float weights of a model whose INT8 weights fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.errors import UserError, missing_package
from peft_pretraining.finetune.flags import MethodArgs
from qgalore import GaLoreAdamW, QGaLoreAdamW8bit, WeightFormat, convert_linears, linear_names, optimizer_for, summary
from qgalore.integrations import QGaLoreCallback
from qgalore.optimizer import LowRankAdamW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Trainee:
    """A model with what trains it, on its device."""

    model: nn.Module
    optimizer: LowRankAdamW | None = None
    """None: AdamW of the Trainer."""
    callbacks: list[Any] = field(default_factory=list)
    """Of the Trainer."""

    def trained_values(self) -> int:
        """Values that are trained, in the adapters where there are any."""
        if self.optimizer is not None:
            counted = summary(self.model, self.optimizer)
            return counted.low_rank_values + counted.full_rank_values
        return sum(param.numel() for param in self.model.parameters() if param.requires_grad)

    def weight_bytes(self) -> int:
        """Of all weights, with the scales of quantized ones."""
        if self.optimizer is not None:
            return summary(self.model, self.optimizer).weight_bytes
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *_scales(self.model)])

    def state_bytes(self) -> int:
        """Of the optimizer from the first update on: AdamW has two moments in the dtype of the weights."""
        if self.optimizer is not None:
            return summary(self.model, self.optimizer).state_bytes
        return sum(2 * param.nbytes for param in self.model.parameters() if param.requires_grad)


def make_trainee(model: nn.Module, method: MethodArgs, lr: float, seed: int, device: torch.device) -> Trainee:
    """Make a model ready for a method, in place, and move it to a device.

    model: of transformers, on the CPU or the device. lr: peak learning rate, for galore and q_galore. The adapters come
    from torch's generator. Raises UserError for a rank that no matrix has, and where a package is missing.
    """
    names = matrix_names(model)
    if method.method in ("lora", "qlora"):
        return Trainee(_with_adapters(model, names, method, device))
    if method.embeddings == "frozen":
        freeze_embeddings(model)
    if method.method == "full":
        return Trainee(model.to(device))
    bits = 8 if method.method == "q_galore" else None
    if bits is not None:
        for name in names:
            model.get_submodule(name).to(device)
            convert_linears(model, [name], WeightFormat(bits=bits))
    try:
        optimizer = optimizer_for(
            model.to(device),
            method.rank,
            weight_bits=bits,
            recipe="paper",
            optimizer_class=GaLoreAdamW if bits is None else QGaLoreAdamW8bit,
            lr=lr,
            seed=seed,
            galore_scale=method.galore_scale,
            update_proj_gap=method.update_proj_gap,
            svd_method=method.svd_method,
        )
    except ValueError as error:
        raise UserError(f"--method {method.method}: {error}") from error
    return Trainee(model, optimizer, [QGaLoreCallback(optimizer)])


def matrix_names(model: nn.Module) -> list[str]:
    """The linear layers of a model's blocks, which every method trains. Raises UserError for a model without any."""
    try:
        return linear_names(model)
    except ValueError as error:
        raise UserError(f"--init_from: {error}") from error


def freeze_embeddings(model: nn.Module) -> None:
    """Freeze the embeddings of a model of transformers, all in its embedding module, and the head of a language model.

    A classifier is no head in this sense: it is new, and has to be trained.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    ask: Any = getattr(model, "get_output_embeddings", lambda: None)
    if isinstance(head := ask(), nn.Module):
        head.requires_grad_(False)


def _with_adapters(model: nn.Module, names: list[str], method: MethodArgs, device: torch.device) -> nn.Module:
    """LoRA (arXiv 2106.09685) by peft; for qlora on weights in 8 bits, as in the tables of Q-GaLore's paper."""
    peft = _package("peft", method.method)
    quantized = method.method == "qlora"
    if quantized:
        _quantize_frozen(model, names, _package("bitsandbytes", method.method), device)
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=names,
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )
    adapted: nn.Module = peft.get_peft_model(model.to(device), config)
    return adapted.to(device)


def _quantize_frozen(model: nn.Module, names: list[str], bitsandbytes: Any, device: torch.device) -> None:
    """Replace linear layers by those of bitsandbytes in 8 bits, in place; all weights are frozen.

    What bitsandbytes does with a weight on its way from the CPU to another device: a scale for each row.
    """
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"--method qlora: {name} is a {type(layer).__name__}, and bitsandbytes holds nn.Linear alone in 8 "
                "bits; choose another method or model"
            )
        stored = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False, device="meta"
        )
        weight = bitsandbytes.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        stored.weight, stored.bias = weight.to(device), layer.bias
        path, _, child = name.rpartition(".")
        setattr(model.get_submodule(path), child, stored)
    # What peft and the Trainer ask for.
    model.is_loaded_in_8bit = True  # type: ignore[assignment]


def _package(name: str, method: str) -> Any:
    """An optional package; raises UserError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--method {method} {missing_package(error) or error}") from error


def _scales(model: nn.Module) -> Iterator[Tensor]:
    """The scales of the rows that bitsandbytes keeps beside a weight, from the first forward pass on in its layer."""
    for module in model.modules():
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                yield scale
