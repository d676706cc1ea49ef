"""Stacks of matrices in one 3-D parameter, as transformers stores the experts of a layer, split into their matrices.

An optimizer then sees one parameter a matrix, each with a subspace of its own. The model computes as before: a
parametrization gives it the stack, a view of the memory that the matrices share, and state dicts have the stack under
its own name. The weights stay float: the model's code reads the stack itself, so codes would be dequantized as a whole
and kept in float for the backward pass, and nothing would be saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qgalore.layer.layout import as_one_view


def stack_names(model: nn.Module) -> Iterator[str]:
    """Dotted names of the 3-D float parameters that hold several matrices each, split ones too, in the model's order.

    Weights of convolutions and buffers are none.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | parametrize.ParametrizationList):
            continue
        keys = [key for key, param in module.named_parameters(recurse=False) if _is_stack(param)]
        for key in [*keys, *_split_keys(module)]:
            yield f"{path}.{key}".lstrip(".")


def matrices_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The matrices of a stack by name, once `split_stacks` has split it; empty where it has not."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key not in _split_keys(module):
        return {}
    start = f"{path}.parametrizations.{key}".lstrip(".")
    return {f"{start}.{each}": param for each, param in module.parametrizations[key].named_parameters()}  # type: ignore[index, union-attr]


def split_stacks(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Split the named 3-D parameters into their matrices, in place and without a copy; returns the matrices' names.

    A frozen stack gives frozen matrices. One that is split already stays as it is. A module with split stacks cannot be
    pickled as a whole (`torch.nn.utils.parametrize`): save its state dict.
    """
    found: list[str] = []
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key not in _split_keys(module):
            # Not checked by computing: it would copy the stack.
            parametrize.register_parametrization(module, key, Stack(), unsafe=True)
            module.register_state_dict_post_hook(functools.partial(_join_in_state_dict, key))
            module.register_load_state_dict_pre_hook(functools.partial(_split_in_state_dict, key))
        found += matrices_of(model, name)
    return found


class Stack(nn.Module):
    """Makes a stack (count, rows, columns) of its matrices: the parametrization of a parameter that was split."""

    def forward(self, *matrices: Tensor) -> Tensor:
        """count matrices (rows, columns) -> (count, rows, columns), a view of their memory."""
        whole: Tensor = _AsStack.apply(*matrices)
        return whole

    def right_inverse(self, stack: Tensor) -> tuple[Tensor, ...]:
        """The matrices of a stack, which share its memory."""
        return stack.detach().contiguous().unbind(0)


class _AsStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        whole = as_one_view([matrix.data for matrix in matrices], 0)
        if whole is None:  # `.to()` has moved each on its own
            packed = torch.stack([matrix.data for matrix in matrices])
            for matrix, part in zip(matrices, packed, strict=True):
                matrix.data = part
            return packed
        return whole.view(len(matrices), *matrices[0].shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        return grad_output.contiguous().unbind(0)


def _is_stack(param: Tensor) -> bool:
    return param.dim() == 3 and len(param) > 1 and min(param.shape[1:]) > 1 and param.is_floating_point()


def _split_keys(module: nn.Module) -> list[str]:
    found = getattr(module, "parametrizations", None)
    if not isinstance(found, nn.ModuleDict):
        return []
    return [key for key, each in found.items() if isinstance(each, nn.ModuleList) and isinstance(each[0], Stack)]


def _join_in_state_dict(key: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `state_dict`: the stack under its own name instead of its matrices."""
    matrices = []
    for index in range(_count(module, key)):
        matrices.append(state_dict.pop(f"{prefix}parametrizations.{key}.original{index}"))
    whole = as_one_view([matrix.data for matrix in matrices], 0)
    stack = torch.stack(matrices) if whole is None else whole.view(len(matrices), *matrices[0].shape)
    state_dict[f"{prefix}{key}"] = stack.detach()


def _split_in_state_dict(key: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: the reverse."""
    stack = state_dict.get(f"{prefix}{key}")
    if isinstance(stack, Tensor) and stack.dim() == 3 and len(stack) == _count(module, key):
        del state_dict[f"{prefix}{key}"]
        for index, matrix in enumerate(stack.unbind(0)):
            state_dict[f"{prefix}parametrizations.{key}.original{index}"] = matrix


def _count(module: nn.Module, key: str) -> int:
    return len(list(module.parametrizations[key].parameters()))  # type: ignore[index, union-attr]
