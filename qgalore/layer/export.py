"""Quantized layers back to floats: in the model itself, in a state dict, and in what `save_pretrained` writes.

A dequantized weight is code * scale + zero_point, which is what the quantized layer multiplies with, so the float model
computes the same. Its dtype is that of the layer's bias, or else of the model's first float parameter.

transformers' `save_pretrained` takes `model.state_dict()`, and its Trainer loads the file that it writes back with
`model.load_state_dict`. So that file needs both: the floats for `from_pretrained`, and the codes for a run that goes
on to the bit, under their own names (`qgalore.layer.codes_state_dict`), which `from_pretrained` lists as unexpected and
ignores. It must be one file, since a float weight without its codes is refused by a quantized layer, and it must have
the model's own names: a Trainer leaves what transformers saves in its "original format", such as Mixtral's experts, at
their initial values when it resumes. Who wants a file of floats alone gives `state_dict=float_state_dict(model)`, or
dequantizes the model before.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qgalore.layer.codes_state_dict import CODES, PARTS, SCALE, WEIGHT, ZERO_POINT
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import QuantizedTensor, row_bytes


def dequantize_linears(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace each `LowRankLinear` of a model by an `nn.Linear`, or the `Conv1D` that it was, in place.

    dtype: of the weights that were quantized; None: that of the layer's bias, or else of the model's first float
    parameter. Each layer's codes are freed before the next layer is dequantized, if no optimizer holds them. Weights
    that are float already and biases stay the same parameters; what was frozen, or one weight in several places, stays
    so. An attached optimizer loses the layers: a warning names those whose weight is a new parameter, which it does not
    train. Raises ValueError where the model is such a layer itself: there is nothing to replace it in.
    """
    if isinstance(model, LowRankLinear):
        raise ValueError(
            "dequantize_linears got a LowRankLinear: it replaces layers inside a model; give the model that has it, or "
            "take layer.dequantized_weight(dtype)"
        )
    default = _dtype_of_floats(model)
    layers: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
    weights = WeakIdKeyDictionary()
    lost: list[str] = []
    for name, key in _layer_keys(model):
        parent = model.get_submodule(name)
        layer = parent._modules[key]
        assert isinstance(layer, LowRankLinear)
        if layer not in layers:
            if layer.weight not in weights:
                weights[layer.weight] = _float_parameter(layer, dtype or _dtype_of(layer, default))
            if layer.sink is not None:
                if weights[layer.weight] is not layer.weight and not layer.frozen:
                    lost.append(f"{name}.{key}".lstrip("."))
                layer.attach(None)
            layers[layer] = _float_layer(layer, weights[layer.weight])
        setattr(parent, key, layers[layer])
        del layer
    for module in model.modules():
        if isinstance(module.__dict__.get("save_pretrained"), _SavesFloatsToo):
            del module.save_pretrained
    if lost:
        warnings.warn(
            f"dequantize_linears has given {len(lost)} layers, such as {lost[0]}, a new float weight, which the "
            "attached optimizer does not train: call its detach() before, and make another one for further training",
            stacklevel=2,
        )


def float_state_dict(
    model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """The state dict that a model would have with `nn.Linear` in the place of `LowRankLinear`: its names and shapes.

    The model stays as it is, and one layer after the other is dequantized. dtype: of the weights that are quantized;
    None: that of the layer's bias, or else of the model's first float parameter. device: for these weights; None: where
    their codes are. "cpu" takes no more memory of a GPU than one layer. All other entries are those of
    `model.state_dict()`, which shares their memory.
    """
    state = model.state_dict()
    entries = dict(state)
    state.clear()  # and not a new dict: a state dict has the versions of its modules as an attribute
    state.update(float_entries(model, entries, dtype, device))
    return state


def save_floats_too(model: nn.Module) -> None:
    """Let `save_pretrained` of a model, and of its parts, write quantized weights as floats beside their codes.

    What it writes is read by `from_pretrained` as a float model and by a Trainer that resumes to the bit; for that
    `max_shard_size` and `save_original_format` are those of one file with the model's own names unless they are given.
    A given `state_dict` without codes, such as `float_state_dict` gives, is written as it is. As long as there are
    quantized weights, a `save_pretrained` whose class takes no `state_dict` raises RuntimeError.
    """
    for module in model.modules():
        if callable(getattr(module, "save_pretrained", None)):
            module.save_pretrained = _SavesFloatsToo(module)  # type: ignore[assignment]


class SaveMethod:
    """`save_pretrained` of one model; a copy of the model, pickled or deep, has one of its own."""

    def __init__(self, model: nn.Module) -> None:
        # A strong reference would be a circle, which keeps weights in memory until Python looks for circles.
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])

    def parts(self) -> tuple[nn.Module, Callable[..., Any]]:
        """The model and what its class has. Raises RuntimeError where the model is gone."""
        model = self._model()
        if model is None:
            raise RuntimeError("save_pretrained of a model that is gone: keep the model, and not its method alone")
        return model, getattr(type(model), "save_pretrained")  # noqa: B009, no attribute of every module


class _SavesFloatsToo(SaveMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class of the model has it."""
        model, save = self.parts()
        if not _quantized_layers(model):
            return save(model, *args, **kwargs)
        signature = _signature_with_state_dict(type(model))
        bound = signature.bind(model, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        if given.get("is_main_process", True):  # elsewhere nothing is written
            state = given.get("state_dict")
            state = model.state_dict() if state is None else dict(state)
            if any(key.endswith(CODES) for key in state):
                state = dict(float_entries(model, state, device="cpu", keeps_codes=True))
                size = 1 + sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
                for name, default in {"max_shard_size": size, "save_original_format": False}.items():
                    if name in signature.parameters:
                        given.setdefault(name, default)
            given["state_dict"] = state
        return save(model, **given)


def _signature_with_state_dict(kind: type) -> inspect.Signature:
    """Of the first `save_pretrained` among the classes of a model that takes a state dict.

    Raises RuntimeError where there is none, as in huggingface_hub's mixin.
    """
    for each in kind.__mro__:
        if "save_pretrained" in vars(each):
            signature = inspect.signature(vars(each)["save_pretrained"])
            if "state_dict" in signature.parameters:
                return signature
    raise RuntimeError(
        f"save_pretrained of a {kind.__name__} with quantized weights takes no state_dict, so it would write codes "
        "instead of weights. Call qgalore.dequantize_linears(model) before, on a copy if it is to be trained further, "
        "or save qgalore.float_state_dict(model)"
    )


# ---- one layer


def _quantized_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers with codes by every name that they have."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        name: module
        for name, module in modules
        if isinstance(module, LowRankLinear) and module.quantized_weight is not None
    }


def _layer_keys(model: nn.Module) -> list[tuple[str, str]]:
    """Where a model holds low-rank layers, each as the name of the parent and the key there; they are not kept."""
    return [
        (name, key)
        for name, module in model.named_modules()
        for key, child in module._modules.items()
        if isinstance(child, LowRankLinear)
    ]


def _dtype_of_floats(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _dtype_of(layer: LowRankLinear, default: torch.dtype) -> torch.dtype:
    return default if layer.bias is None else layer.bias.dtype


def _transposed(layer: LowRankLinear) -> bool:
    """Whether the float layer has its weight as (in_features, out_features)."""
    return bool(getattr(layer, "transposed", False))


def _float_parameter(layer: LowRankLinear, dtype: torch.dtype) -> nn.Parameter:
    """The weight as the float layer has it: the layer's own parameter where that is it."""
    if layer.quantized_weight is None and not _transposed(layer):
        return layer.weight
    weight = layer.weight.detach() if layer.quantized_weight is None else layer.dequantized_weight(dtype)
    return nn.Parameter(weight.T.contiguous() if _transposed(layer) else weight, not layer.frozen)


def _float_layer(layer: LowRankLinear, weight: nn.Parameter) -> nn.Module:
    sizes = (layer.in_features, layer.out_features)
    made: Any
    with torch.device("meta"):  # its own weight is not wanted
        if _transposed(layer):
            from transformers.pytorch_utils import Conv1D

            made = Conv1D(nf=sizes[1], nx=sizes[0])
        else:
            made = nn.Linear(*sizes, bias=layer.bias is not None)
    made.weight, made.bias = weight, layer.bias
    float_layer: nn.Module = made.train(layer.training)
    return float_layer


# ---- state dicts


def float_entries(
    model: nn.Module,
    state: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keeps_codes: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a state dict with dequantized weights instead of the codes, or beside them.

    model: what the state dict is of; of its quantized layers only shapes and formats are read, so that it may be on the
    meta device. dtype, device: as in `float_state_dict`. A weight is dequantized when it is its turn, and kept no
    longer than the caller does, if it has one name. Raises ValueError for codes that do not fit the model.
    """
    layers, default = _quantized_layers(model), _dtype_of_floats(model)
    names = Counter(layer.weight for layer in layers.values())
    shared: dict[Tensor, Tensor] = {}
    found: set[str] = set()
    for key, value in state.items():
        prefix, dot, part = key.rpartition(".")
        layer = layers.get(prefix) or layers.get(_without_wrappers(prefix))
        if layer is None:
            if part == CODES:
                raise ValueError(
                    f"the state dict has codes of {prefix}, and {type(model).__name__} has no quantized layer of that "
                    "name: give a state dict of this model"
                )
            yield key, value
            continue
        if prefix not in found:
            found.add(prefix)
            weight = shared.get(layer.weight)
            if weight is None:
                stored = _stored_weight(layer, state, f"{prefix}{dot}").dequantize(dtype or _dtype_of(layer, default))
                weight = (stored.T.contiguous() if _transposed(layer) else stored).to(device)
                if names[layer.weight] > 1:
                    shared[layer.weight] = weight
                del stored
            yield f"{prefix}{dot}{WEIGHT}", weight
            del weight
        if part != WEIGHT and (keeps_codes or part not in PARTS):
            yield key, value


def _stored_weight(layer: LowRankLinear, entries: Mapping[str, Tensor], prefix: str) -> QuantizedTensor:
    names = [f"{prefix}{part}" for part in (CODES, SCALE, ZERO_POINT)]
    missing = [name for name in names if name not in entries]
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(missing)}: codes are floats only with scale and zero point")
    codes, scale, zero_point = (entries[name] for name in names)
    here = layer.quantized_weight
    assert here is not None
    rows, columns, stored_bytes = *here.shape, row_bytes(here.columns, here.bits)
    if codes.shape != (rows, stored_bytes) or scale.shape != here.scale.shape or zero_point.shape != here.scale.shape:
        raise ValueError(
            f"{names[0]} of shape {tuple(codes.shape)}, with scales of shape {tuple(scale.shape)} and zero points of "
            f"shape {tuple(zero_point.shape)}, do not fit {rows} x {columns} codes in groups of {here.group_size}, as "
            "the model has them"
        )
    return QuantizedTensor(codes, scale, zero_point, columns, here.bits, here.group_size).with_aligned_rows()


def _without_wrappers(name: str) -> str:
    """Without what `DistributedDataParallel` puts before the names of a state dict, and `torch.compile` into them."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
