"""Begin a run with the weights of another model: `--init_from`.

The model is there, with its decoder matrices in the run's format, before anything is read. Names and shapes are
compared, and what does not fit is refused: nothing is left at random values. Then one tensor after the other is read,
moved to the model's device and stored, rounded to the nearest code where the model's weight is quantized, so that the
host holds one tensor of the source at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from peft_pretraining.checkpoint.weight_source import WeightSource, open_source
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.errors import UserError
from peft_pretraining.methods.adapters import BASE, adapters_of
from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.network import CausalLM, Tables
from peft_pretraining.runtime.world import World
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import QuantizedTensor
from qgalore.layer.stored_weight import store_float_, store_quantized_

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MOST_NAMED = 3


class Quantizes(Protocol):
    """A frozen layer of `methods.frozen`."""

    weight: Tensor

    def store_(self, weight: Tensor) -> None:
        """Replace its weight by float values."""


@dataclass(frozen=True)
class _Target:
    """A weight of the model, or a buffer that is part of its state dict."""

    names: Sequence[str]
    """All names that it has: several where it is tied."""
    shape: tuple[int, ...]
    """As the source has it."""
    holder: Tensor | LowRankLinear | Quantizes


def load_initial_weights(args: ModelArgs, model: CausalLM, world: World) -> str:
    """Give the model the weights of `--init_from`, on every rank the same; returns what they are, in words.

    Raises UserError that names the tensor where they do not fit.
    """
    opened: list[WeightSource] = []

    def open_here() -> str:
        opened.append(open_source(args.init_from))
        return opened[0].commit

    commit = world.from_main(open_here)  # which downloads what the other ranks of this machine then find
    source = opened[0] if opened else open_source(args.init_from, commit, check=False)
    put_weights(source, model, args.model_config)
    return source.words


def put_weights(source: WeightSource, model: CausalLM, model_config: str) -> None:
    """Store the weights of a source in a model; raises UserError before anything is changed if they do not fit."""
    targets = _targets(model)
    source = _with_prefix(source, model, targets)
    chosen = [(target, _found(source, target, model)) for target in targets]
    if problems := _problems(source, model, chosen):
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        if model_config == source.name:
            start, end = "does not hold the model of its own configuration", "Its files are not of one model"
            if isinstance(model, HFCausalLM):
                end += (
                    ", or transformers renames or joins tensors of this class as it reads them, which is not done here"
                )
        else:
            start = f"does not fit --model_config {model_config}"
            end = "Leave --model_config out to take that of --init_from, or give a model of this architecture"
        raise UserError(f"--init_from {source.name} {start}: {'; '.join(problems[:_MOST_NAMED])}{more}. {end}.")
    with torch.no_grad():
        for target, (first, *others) in chosen:
            _store(source, target, first, model.tables)
            for other in others:
                _compare(source, target, first, other, model.tables)


def _targets(model: CausalLM) -> list[_Target]:
    """The weights and persistent buffers of a model, each once."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[tuple[int, ...], Tensor | LowRankLinear | Quantizes]] = {}
    adapters = {adapter.name: adapter for adapter in adapters_of(model)}
    bases = {f"{name}.{BASE}": name for name in adapters}
    own = {factor for adapter in adapters.values() for factor in adapter.factors}  # which begin as they do without
    for path, module in model.named_modules(remove_duplicate=False):
        for key, value in _own_tensors(module).items():
            if value in own:
                continue
            path = bases.get(path, path)
            names.setdefault(id(value), []).append(f"{path}.{key}" if path else key)
            if isinstance(module, LowRankLinear) and key == "weight":
                shape = (module.out_features, module.in_features)
                shapes[id(value)] = (shape[::-1] if module.transposed else shape), module
            elif isinstance(module, nn.Linear) and key == "weight" and not value.is_floating_point():
                shapes[id(value)] = (module.out_features, module.in_features), cast(Quantizes, module)
            else:
                shapes[id(value)] = tuple(value.shape), value
    return [_Target(names[key], *shapes[key]) for key in names]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    buffers = {} if isinstance(module, LowRankLinear) else dict(module.named_buffers(recurse=False))
    if buffers:
        kept = module.state_dict().keys()  # others are made by the model itself, such as tables of positions
        own |= {key: value for key, value in buffers.items() if key in kept}
    return own


def _with_prefix(source: WeightSource, model: CausalLM, targets: Sequence[_Target]) -> WeightSource:
    """A source that was saved without its head, as transformers' base models are, has names without the first part."""
    first = f"{model.layers_name.partition('.')[0]}."
    wanted = {name for target in targets for name in target.names}
    if (
        not any(name.startswith(first) for name in source.names)
        and {f"{first}{name}" for name in source.names} <= wanted
    ):
        return source.renamed(first)
    return source


def _found(source: WeightSource, target: _Target, model: CausalLM) -> list[str]:
    """The names that the source has for a weight; that of the embeddings for a head that is tied there alone."""
    there = set(source.names)
    found = [name for name in target.names if name in there]
    embeddings, head = model.table_names
    if not found and source.tied and head in target.names and embeddings in there:
        return [embeddings]
    return found


def _problems(source: WeightSource, model: CausalLM, chosen: Sequence[tuple[_Target, list[str]]]) -> list[str]:
    problems = [f"{target.names[0]} is missing there" for target, found in chosen if not found]
    used = {name for _, found in chosen for name in found}
    ignored = [re.compile(pattern) for pattern in model.ignored_names]
    extra = [name for name in source.names if name not in used]
    problems += [f"{name} is not in this model" for name in extra if not any(each.search(name) for each in ignored)]
    for target, found in chosen:
        for name in found:
            if name not in source.stored:  # codes alone: (out_features, bytes), which are compared when they are read
                rows, here = source.stored[f"{name}_qdata"].shape[0], _rows_of_codes(target)
                there = f"{rows} rows of codes"
                if rows != here or len(target.shape) != 2:
                    problems.append(f"{name} is {there} there and {_in_words(target.shape)} here")
                continue
            dtype, shape = source.stored[name].dtype, source.stored[name].shape
            if shape != target.shape:
                problems.append(f"{name} is {_in_words(shape)} there and {_in_words(target.shape)} here")
            elif dtype not in _FLOATS and not (isinstance(target.holder, Tensor) and dtype == target.holder.dtype):
                problems.append(f"{name} is {str(dtype).removeprefix('torch.')} there, and no float")
    return problems


def _rows_of_codes(target: _Target) -> int:
    return target.holder.out_features if isinstance(target.holder, LowRankLinear) else target.shape[0]


def _store(source: WeightSource, target: _Target, name: str, tables: Tables) -> None:
    """Read a weight and put it into its place."""
    layer = target.holder if isinstance(target.holder, LowRankLinear) else None
    if source.is_quantized(name) and (layer is not None or name not in source.stored):
        columns = layer.in_features if layer is not None else target.shape[1]
        codes = source.read_codes(name, columns)
        if layer is not None:
            return store_quantized_(layer, _on(codes, layer.weight.device))
        return _store_floats(target, _on(codes, _device_of(target)).dequantize(torch.float32), tables)
    value = source.read(name)
    if layer is None:
        return _store_floats(target, value, tables)
    value = value.to(layer.weight.device)
    value = value if value.dtype in (torch.bfloat16, torch.float32) else value.float()  # those that kernels take
    return store_float_(layer, value.T.contiguous() if layer.transposed else value)


def _store_floats(target: _Target, value: Tensor, tables: Tables) -> None:
    """Put floats into a tensor, or into a frozen layer that quantizes them."""
    if isinstance(target.holder, Tensor):
        if not tables.store(target.holder, value):
            target.holder.copy_(value)
    else:
        assert not isinstance(target.holder, LowRankLinear)
        target.holder.store_(value.to(_device_of(target)))


def _device_of(target: _Target) -> torch.device:
    return target.holder.device if isinstance(target.holder, Tensor) else target.holder.weight.device


def _compare(source: WeightSource, target: _Target, first: str, other: str, tables: Tables) -> None:
    """Refuse a source that has two different tensors where the model has one."""
    if source.stored.get(first) is source.stored.get(other) or not isinstance(target.holder, Tensor):
        return
    with tables.whole(target.holder):
        same = torch.equal(source.read(other).to(target.holder), target.holder)
    if not same:
        raise UserError(
            f"--init_from {source.name}: {first} and {other} differ there, and are one tensor in this model; set "
            "tie_word_embeddings of its configuration to false."
        )


def _on(codes: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    parts = (codes.qdata.to(device), codes.scale.to(device), codes.zero_point.to(device))
    return QuantizedTensor(*parts, codes.columns, codes.bits, codes.group_size)


def _in_words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
