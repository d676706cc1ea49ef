"""Initialise a model that has no memory yet, parameter by parameter.

A model is created on the meta device and materialised one module at a time, so that a caller can turn each matrix into
its quantized form before the next one exists: a 7B model then never holds more than one matrix in bfloat16.

Each parameter has its own generator, seeded from (seed, name), and is drawn in float32 on the CPU: its values depend
neither on the device, nor on the dtype of the run, nor on which other parameters exist. Drawing on the accelerator
would be faster, but CUDA and CPU generators give different numbers, and a run moved between machines should start from
the same weights; a few threads draw ahead, about 100 M values a second and core.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from peft_pretraining.models.network import CausalLM

OnModule = Callable[[CausalLM, str], None]

_DRAW_THREADS = min(8, os.cpu_count() or 1)


def materialize(
    model: CausalLM,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    on_module: OnModule | None = None,
    std: float = 0.02,
    draws: bool = True,
) -> None:
    """Replace the meta parameters of `model` in place by initialised ones of `dtype` on `device`.

    Their values are those of `CausalLM.initial_value`, matrices with standard deviation `std`. Buffers keep their
    dtype. `on_module(model, name)` runs as soon as the parameters of the module `name` exist and before
    those of the next one do; it may replace that module. A tied parameter is drawn once, under its first name. draws:
    False for zeros instead, where the values are to come from elsewhere.
    """
    modules = deque(model.named_modules())
    uses: dict[nn.Parameter, list[str]] = {}
    for name, module in modules:
        for key, parameter in _own_parameters(module):
            uses.setdefault(parameter, []).append(f"{name}.{key}" if name else key)
    shapes = [(names[0], parameter.shape) for parameter, names in uses.items()]
    zeros = (torch.zeros(shape, dtype=dtype) for _, shape in shapes)
    drawn = _draw_ahead(model, shapes, dtype, seed, std) if draws else zeros
    tied: dict[nn.Parameter, nn.Parameter] = {}
    while modules:
        # Any reference left here would keep a float matrix alive beside its quantized form: hence a queue, not a list.
        name, module = modules.popleft()
        own = _own_parameters(module)
        for key, parameter in own:
            real = tied.get(parameter)
            if real is None:
                real = nn.Parameter(next(drawn).to(device), requires_grad=parameter.requires_grad)
            if len(uses[parameter]) > 1:
                tied[parameter] = real
            setattr(module, key, real)
            del real
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))
        if on_module is not None and own:
            on_module(model, name)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _draw_ahead(
    model: CausalLM, shapes: list[tuple[str, torch.Size]], dtype: torch.dtype, seed: int, std: float
) -> Iterator[Tensor]:
    """Initial values in the order of `shapes`; a few threads work ahead of the caller, which bounds the memory."""
    with ThreadPoolExecutor(_DRAW_THREADS) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for name, shape in shapes:
            waiting.append(pool.submit(_initial_value, model, name, shape, dtype, seed, std))
            if len(waiting) > _DRAW_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _initial_value(model: CausalLM, name: str, shape: torch.Size, dtype: torch.dtype, seed: int, std: float) -> Tensor:
    return model.initial_value(name, shape, generator_of(seed, name), std).to(dtype)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for the values of a run's parameter of this name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
