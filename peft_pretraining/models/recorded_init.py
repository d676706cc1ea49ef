"""Initial values of a model that initialises itself, without the memory of its parameters.

Each of transformers' classes has rules of its own: norms of 1 + w start at zero, GPT-2 scales the last matrices of a
residual branch by the depth. So its constructor runs on the CPU, with parameters that are moved to the meta device as
soon as a module registers them, and what is written to them then is noted instead of done. Buffers are made in full.
Later a parameter is drawn by writing the same to a float32 tensor, from a generator of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qgalore.torch_internals import internal

_WRITES_ALL = ("normal_", "uniform_", "fill_", "zero_", "copy_")
"""Operations after which nothing is left of what was there before."""


class UnreadableInitError(Exception):
    """What a parameter starts with is computed from other parameters, which have no values yet."""


@dataclass(frozen=True)
class Write:
    """An operation on a parameter in place, or on a part of it: strides and offset are those of its view."""

    operation: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def covers(self, values: int) -> bool:
        """Whether it writes to all of so many values, whatever they were."""
        name: str = self.operation._schema.name.removeprefix("aten::")
        return name in _WRITES_ALL and torch.Size(self.size).numel() == values

    def apply(self, whole: Tensor, generator: torch.Generator) -> None:
        """Write to a contiguous parameter."""
        kwargs = self.kwargs
        if any(argument.name == "generator" for argument in self.operation._schema.arguments):
            kwargs = kwargs | {"generator": generator}
        self.operation(whole.as_strided(self.size, self.stride, self.offset), *self.args, **kwargs)


@dataclass(frozen=True)
class InitialValue:
    """How a parameter is initialised."""

    shape: torch.Size
    writes: tuple[Write, ...]

    def draw(self, generator: torch.Generator) -> Tensor:
        """The float32 values, on the CPU."""
        whole = torch.empty(self.shape)
        with torch.no_grad():
            for write in self.writes:
                write.apply(whole, generator)
        return whole


_DispatchMode: Any = internal("torch.utils._python_dispatch.TorchDispatchMode")


class InitRecorder(_DispatchMode):
    """In its context modules are made with parameters on the meta device, whose initialisation is noted."""

    def __init__(self) -> None:
        super().__init__()
        # Of each storage of a parameter; it is kept, so that none that is made later has its address.
        self._writes: dict[int, tuple[torch.UntypedStorage, list[Write | None]]] = {}
        self._first: dict[nn.Parameter, int] = {}
        """The storage that a parameter had at first; to tie a head with a bias, transformers gives it another."""

    def __enter__(self) -> Self:
        """Begin to note."""
        hook: Any = self._without_memory  # whose result takes the parameter's place, unlike torch's annotation says
        self._hook = register_module_parameter_registration_hook(hook)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it."""
        self._hook.remove()
        super().__exit__(kind, error, traceback)

    def _without_memory(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # None keeps the parameter that is registered
            return None
        # The values that it has: often none yet, and then forgotten at once, by the layer's own initialisation.
        values = parameter.detach()
        moved = nn.Parameter(torch.empty_like(values, device="meta"), requires_grad=parameter.requires_grad)
        self._first[moved] = moved.untyped_storage()._cdata
        self._note(moved, torch.ops.aten.copy_.default, (values,), {})
        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note what writes to a tensor on the meta device; everything else is done."""
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("meta") and not any(isinstance(x, Tensor) for x in args):
            kwargs = kwargs | {"device": torch.device("cpu")}  # a constant, made where the parameter is
        target = args[0] if args else None
        if not (isinstance(target, Tensor) and target.is_meta and _writes_to_first(func)):
            return func(*args, **kwargs)
        self._note(target, func, args[1:], kwargs)
        return target

    def _note(self, target: Tensor, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        storage = target.untyped_storage()
        _, writes = self._writes.setdefault(storage._cdata, (storage, []))
        write = Write(operation, tuple(target.shape), target.stride(), int(target.storage_offset()), args, kwargs)
        if write.covers(storage.nbytes() // target.element_size()):
            writes.clear()
        unknown = any(isinstance(x, Tensor) and x.is_meta for x in (*args, *kwargs.values()))
        writes.append(None if unknown else write)

    def initial_value(self, parameter: nn.Parameter, whole: bool = False) -> InitialValue:
        """How a parameter was initialised; whole: without what was written to parts of it, such as rows of zeros.

        Raises UnreadableInitError.
        """
        now, first = parameter.untyped_storage()._cdata, self._first.get(parameter, 0)
        _, writes = self._writes.get(now) or self._writes.get(first) or (None, [None])
        known = [write for write in writes if write is not None]
        if len(known) < len(writes):
            raise UnreadableInitError
        kept = [write for write in known if not whole or write.covers(parameter.numel())]
        return InitialValue(parameter.shape, tuple(kept))


def _writes_to_first(operation: Any) -> bool:
    arguments = operation._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
