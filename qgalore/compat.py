"""galore-torch and q-galore-torch under their own names, for scripts that were written for them.

`install()` gives `import galore_torch` and `import q_galore_torch` modules of this library. What they have takes the
arguments of the original, in its order and with its defaults, and needs no `attach`: an ordinary loop of `backward`,
`step` and `zero_grad` trains, also with a hook a parameter.

Where the two differ: a rank that is larger than a side is refused, and so is an INT8 weight trained by several
processes; the interval of Q-GaLore's lazy rule grows to eight times its start at the most; a first basis is found in
the first update and used from the second on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from qgalore import optimizer
from qgalore.config import WeightFormat
from qgalore.kernels import StepScalars
from qgalore.layer.conversion import convert_linears
from qgalore.layer.linear import LowRankLinear
from qgalore.optimizer.adafactor import GaLoreAdafactor as _GaLoreAdafactor
from qgalore.update.hooks import Attachment, Ready
from qgalore.update.weight import Weight

_AFTER_DECAY = {
    "adamw": ("correct_bias", "no_deprecation_warning"),
    "adamw8bit": (
        "amsgrad", "optim_bits", "args", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged",
    ),
}  # fmt: skip
"""Names of the arguments that the originals take after weight_decay, by position, too."""

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""What `prepare_model_for_int8_training` has converted: where optimizers look for the layers of their weights."""


def _named(kind: str, given: Sequence[Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments after weight_decay by name. Raises TypeError for too many, or one that is given twice."""
    names = _AFTER_DECAY[kind]
    if len(given) > len(names):
        raise TypeError(f"{len(given)} arguments after weight_decay, of at most {len(names)}: {', '.join(names)}")
    named = dict(zip(names, given, strict=False))
    if twice := named.keys() & others.keys():
        raise TypeError(f"{', '.join(sorted(twice))} is given twice, by position and by name")
    return named | dict(others)


class _FixedInterval(optimizer.LowRankAdamW):
    """Leaves out the lazy rule, which GaLore does not have, where a param group does not ask for it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `qgalore.optimizer.LowRankAdamW`."""
        if param_group.get("rank") is not None:
            param_group.setdefault("gamma_proj", 1)
        super().add_param_group(param_group)


class _AdamWWeight(Weight):
    """A parameter whose moments are not corrected for their bias where its group has `correct_bias=False`."""

    def update_scalars(self) -> StepScalars:
        """See `Weight`."""
        scalars = super().update_scalars()
        if self.param_group.get("correct_bias", True):
            return scalars
        return scalars._replace(inverse_correction1=1.0, inverse_correction2=1.0)


class GaLoreAdamW(_FixedInterval, optimizer.GaLoreAdamW):
    """`galore_torch.GaLoreAdamW`."""

    weight_type = _AdamWWeight

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *others: Any,
        **named: Any,
    ) -> None:
        """others: correct_bias, no_deprecation_warning; named: these, and those of `qgalore.GaLoreAdamW`."""
        options = _named("adamw", others, named)
        corrects = bool(options.pop("correct_bias", True))
        super().__init__(params, lr, betas, eps, weight_decay, **options)
        if not corrects:
            self.defaults["correct_bias"] = False
            for group in self.param_groups:
                group.setdefault("correct_bias", False)


class GaLoreAdamW8bit(_FixedInterval, optimizer.GaLoreAdamW8bit):
    """`galore_torch.GaLoreAdamW8bit`, whose weight_decay is 0.01 where none is given."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *others: Any,
        **named: Any,
    ) -> None:
        """others: amsgrad and what follows it there; named: these, and those of `qgalore.GaLoreAdamW8bit`."""
        super().__init__(params, lr, betas, eps, weight_decay, **_named("adamw8bit", others, named))


class GaLoreAdafactor(_FixedInterval, _GaLoreAdafactor):
    """`galore_torch.GaLoreAdafactor`."""


class QGaLoreAdamW8bit(optimizer.QGaLoreAdamW8bit):
    """`q_galore_torch.QGaLoreAdamW8bit`: trains the INT8 weights of `prepare_model_for_int8_training`.

    Their gradients are summed until `step`. A callable `weight.backward_hook` is called with the weight as soon as a
    backward pass has its gradient, `weight.float_grad` is there from then on (as None: the gradient is kept projected).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *others: Any,
        **named: Any,
    ) -> None:
        """others: amsgrad and what follows it there; named: these, and those of `qgalore.QGaLoreAdamW8bit`.

        Raises ValueError where there are INT8 weights and several processes.
        """
        super().__init__(params, lr, betas, eps, weight_decay, **_named("adamw8bit", others, named))
        self._attach_quantized()

    def attach(self, *arguments: Any, **named: Any) -> None:
        """See `qgalore.QGaLoreAdamW8bit`: from then on `is_last_micro_batch` counts, and all gradients are taken."""
        self.is_last_micro_batch = True
        super().attach(*arguments, **named)

    def _attach_quantized(self) -> None:
        """Attach the layers of quantized weights alone: the gradients of all others stay in `.grad`."""
        self.detach()
        weights: dict[Tensor, Weight] = {
            param: weight for param, weight in self._weights.items() if not param.is_floating_point()
        }
        if not weights:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "INT8 weights of several processes: a script of q-galore-torch cannot say how gradients are summed; "
                "use qgalore.QGaLoreAdamW8bit and its attach(model, all_reduce=...)"
            )
        ready: weakref.WeakMethod[Ready] = weakref.WeakMethod(self._gradients_ready)
        attached = [Attachment(model, weights, ready) for model in _models_of(weights)]
        self.is_last_micro_batch = False  # nobody says which one is: `step` takes the sums
        self._detach = weakref.finalize(self, _remove, attached)
        self._detach.atexit = False

    @torch.no_grad()
    def _gradients_ready(self, weights: Sequence[Weight]) -> None:
        """As of `UpdateCycle`; calls the weights' own hooks."""
        self.cycle.gradients_ready(weights)
        for weight in weights:
            hook: Callable[[Tensor], object] | None = getattr(weight.param, "backward_hook", None)
            weight.param.float_grad = None  # type: ignore[attr-defined]
            if hook is not None:
                hook(weight.param)


class QGaLoreAdamW8bit_simulate(QGaLoreAdamW8bit):  # noqa: N801 (its name there)
    """`q_galore_torch.QGaLoreAdamW8bit_simulate`: rounds the weights of `prepare_..._simulation` to their grid.

    Their gradients are those of autograd, in `.grad`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient; those of simulated layers are rounded."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        simulated = {layer.weight: layer for model in _models_of(self._weights) for layer in _layers(model)}
        ours = {param: layer for param, layer in simulated.items() if param in self._weights}
        for param, layer in ours.items():
            self._weights[param].layer = layer
        try:
            super().step()
        finally:
            for param in ours:
                if param.is_floating_point():
                    self._weights[param].layer = None
        return loss


def _layers(model: nn.Module) -> list[LowRankLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]


def _models_of(weights: Iterable[Tensor]) -> list[nn.Module]:
    """The prepared models that have one of `weights`."""
    wanted = set(weights)
    return [model for model in _models if any(layer.weight in wanted for layer in _layers(model))]


def _remove(attached: Iterable[Attachment]) -> None:
    for each in attached:
        each.remove()


# ---- layers


def prepare_model_for_int8_training(model: nn.Module, args: Any, target_module: Iterable[str]) -> nn.Module:
    """Convert the linear layers with a name, the last part of their path, in `target_module` to INT8 ones in place.

    args has weight_bits, weight_group_size and stochastic_round. Returns the model.
    """
    return _prepare(model, args, target_module, simulate=False)


def prepare_model_for_int8_training_simulation(model: nn.Module, args: Any, target_module: Iterable[str]) -> nn.Module:
    """The same with float weights whose values are those of INT8 ones."""
    return _prepare(model, args, target_module, simulate=True)


def _prepare(model: nn.Module, args: Any, target_module: Iterable[str], simulate: bool) -> nn.Module:
    targets = {target_module} if isinstance(target_module, str) else set(target_module)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if name.rpartition(".")[2] in targets]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear called {' or '.join(sorted(targets))}; it has "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linears})) or 'none'}"
        )
    format = WeightFormat(args.weight_bits, args.weight_group_size, args.stochastic_round, simulate)
    convert_linears(model, names, format)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        # What scripts of q-galore-torch read of a weight.
        found: dict[str, Any] = {"group_size": layer.group_size, "stochastic_round": format.stochastic_rounding}
        if layer.quantized_weight is not None:
            found |= {
                "scales": layer.weight_scale, "zeros": layer.weight_zero_point, "saved_data_dtype": layer.weight.dtype,
            }  # fmt: skip
        for key, value in found.items():
            setattr(layer.weight, key, value)
    _models.add(model)
    return model


def saving_model_weight(model: nn.Module, path: str) -> None:
    """Write the state dict of a model, codes of INT8 weights included."""
    torch.save(model.state_dict(), path)


def load_model_weight(model: nn.Module, path: str) -> nn.Module:
    """Load what `saving_model_weight` has written into a model whose layers are of the same format; returns it."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


# ---- modules

_NAMES: dict[str, dict[str, Any]] = {
    "galore_torch": {
        "GaLoreAdafactor": GaLoreAdafactor, "GaLoreAdamW": GaLoreAdamW, "GaLoreAdamW8bit": GaLoreAdamW8bit,
    },
    "galore_torch.adafactor": {"Adafactor": GaLoreAdafactor},
    "galore_torch.adamw": {"AdamW": GaLoreAdamW},
    "galore_torch.adamw8bit": {"AdamW8bit": GaLoreAdamW8bit},
    "q_galore_torch": {
        "QGaLoreAdamW8bit": QGaLoreAdamW8bit, "QGaLoreAdamW8bit_simulate": QGaLoreAdamW8bit_simulate,
    },
    "q_galore_torch.q_galore_adamw8bit": {"AdamW8bit": QGaLoreAdamW8bit},
    "q_galore_torch.q_galore_adamw8bit_simulate": {"AdamW8bit": QGaLoreAdamW8bit_simulate},
    "q_galore_torch.utils": {},
    "q_galore_torch.utils.quantization": {
        "QGaLoreLinear": LowRankLinear, "prepare_model_for_int8_training": prepare_model_for_int8_training,
    },
    "q_galore_torch.utils.setup": {
        "load_model_weight": load_model_weight, "saving_model_weight": saving_model_weight,
    },
    "q_galore_torch.utils.simulate_quantization": {
        "QLinear": LowRankLinear,
        "prepare_model_for_int8_training_simulation": prepare_model_for_int8_training_simulation,
    },
}  # fmt: skip
"""What stands where. Not here: the projectors, and the constructors of the layers, which are `LowRankLinear`s."""


def install(shadow: bool = False) -> list[str]:
    """Let `import galore_torch` and `import q_galore_torch` give modules of this library.

    Also of their modules of optimizers and of INT8 layers, but not of projectors.

    A package that is really installed stays, and a warning names it, unless `shadow`. Call it before what imports
    them. Returns the packages that are provided.
    """
    provided = []
    for package in ("galore_torch", "q_galore_torch"):
        if not shadow and not _is_ours(package) and importlib.util.find_spec(package) is not None:
            warnings.warn(
                f"{package} is installed and stays what it is: install(shadow=True) puts this library in its place",
                stacklevel=2,
            )
            continue
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            if not _is_ours(name):
                del sys.modules[name]
        for name in _NAMES:
            if name == package or name.startswith(f"{package}."):
                _provide(name)
        provided.append(package)
    return provided


def _is_ours(name: str) -> bool:
    return getattr(sys.modules.get(name), "__loader__", None) is _loader


class _Loader(importlib.abc.Loader):
    """Marks the modules that `install` has made."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its names."""
        names = _NAMES[module.__name__]
        module.__dict__.update(names, __all__=sorted(names), __doc__=__doc__)


_loader = _Loader()


def _provide(name: str) -> None:
    if _is_ours(name):
        return
    is_package = any(other.startswith(f"{name}.") for other in _NAMES)
    spec = importlib.machinery.ModuleSpec(name, _loader, origin="qgalore.compat", is_package=is_package)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    _loader.exec_module(sys.modules[name])
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, sys.modules[name])
