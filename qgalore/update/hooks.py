"""What an optimizer hangs on a model to take each gradient as soon as the backward pass has it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qgalore.layer.linear import LowRankLinear
from qgalore.update.weight import Weight

Ready = Callable[[Sequence[Weight]], None]
"""What is called with weights to whose gradients a backward pass has added all that it has."""


def _layers_of(model: nn.Module, weights: Mapping[Tensor, Weight]) -> dict[str, LowRankLinear]:
    """The layers that hold one of `weights`, by name.

    Raises ValueError where another module holds the same weight, and for a model in `DistributedDataParallel`.
    """
    layers: dict[str, LowRankLinear] = {}
    holders: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            # It would sum the gradients that autograd gives alone, and overwrite scales by those of the first rank.
            raise ValueError(
                "DistributedDataParallel does not see the gradients that an attached optimizer takes: leave it out and "
                "call attach(model, all_reduce=...)"
            )
        for key, param in module.named_parameters(recurse=False):
            holders.setdefault(param, []).append(f"{name}.{key}".lstrip("."))
        if isinstance(module, LowRankLinear) and module.weight in weights:
            layers[name] = module
    for layer in layers.values():
        # A gradient sink each, or one and autograd, would give it several gradients, each as the whole.
        if len(holders[layer.weight]) > 1:
            raise ValueError(
                f"{' and '.join(holders[layer.weight])} are one parameter: a LowRankLinear cannot share its weight "
                "with another module; use one layer in both places"
            )
    return layers


class Attachment:
    """Gradient sinks of layers and hooks on parameters, until `remove`.

    Python's garbage collector does not see what holds a hook: one that held its optimizer would keep it, and with it
    every weight, for as long as the process lives. So nothing here holds more than a weak reference.
    """

    def __init__(self, model: nn.Module, weights: Mapping[Tensor, Weight], ready: weakref.WeakMethod[Ready]) -> None:
        """Attach a sink to each layer that holds one of `weights`, and a hook to every other one.

        Raises ValueError for a weight of a layer that another module holds, too.
        """
        self._ready = ready
        self._sinks: list[tuple[weakref.ref[LowRankLinear], weakref.ref[Weight]]] = []
        self._hooks: list[RemovableHandle] = []
        for name, layer in _layers_of(model, weights).items():
            weight = weights[layer.weight]
            weight.attach_to(layer, name)
            layer.attach(weight).register_post_accumulate_grad_hook(self._hook(weight))
            self._sinks.append((weakref.ref(layer), weakref.ref(weight)))
        names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        for param, weight in weights.items():
            if weight.layer is None:
                weight.name = names.get(param, weight.name)
                if param.requires_grad:
                    self._hooks.append(param.register_post_accumulate_grad_hook(self._hook(weight)))

    def remove(self) -> None:
        """Let gradients arrive in `.grad` again; sinks that another optimizer has attached since stay."""
        for layer_reference, weight_reference in self._sinks:
            layer, weight = layer_reference(), weight_reference()
            if layer is not None and layer.sink is weight:
                layer.attach(None)
            if weight is not None:
                weight.layer = None
        self._sinks.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, weight: Weight) -> Callable[[Tensor], None]:
        """For the proxy leaf of a layer, or for a parameter that autograd gives its gradient."""
        optimizer_is_ready, watched = self._ready, weakref.ref(weight)

        def hook(tensor: Tensor) -> None:
            ready, weight = optimizer_is_ready(), watched()
            if ready is None or weight is None:
                return
            grad, tensor.grad = tensor.grad, None
            if weight.layer is None:
                if grad is None:
                    raise RuntimeError(
                        f"another optimizer has taken the gradient of {weight.name}: call its detach() before another "
                        "one is attached to the model"
                    )
                with torch.no_grad():
                    weight.accumulate_full(grad)
            ready([weight])

        return hook
