"""CUDA graphs on a CPU: the operations that a capture records, done again on the same tensors when it is replayed.

As on a GPU no Python of the project runs in a replay: every number of the host is that of the capture, tensors stay
where they were, and only what lies in memory is new. Kernels (`qgalore.kernels`) are one operation each, since those
that run on a GPU read their step rows on the device. A value that the host asks for in a capture is an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qgalore import kernels
from qgalore.graphs.captured import CapturedStack
from qgalore.graphs.eager import Work
from qgalore.layer import autograd_op

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]
"""function, arguments, keyword arguments, and the tensors that it gave at the capture."""

_ASKED_BY_THE_HOST = (
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default,
)  # fmt: skip


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of a nest of lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def aliases(value: Any) -> Any:
    """A nest with all tensors by aliases: autograd does not see what is written to them, as on a GPU."""
    if isinstance(value, Tensor):
        return value.data
    if isinstance(value, list | tuple):
        parts = [aliases(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class RecordedGraph(TorchDispatchMode):
    """The operations of one capture."""

    recording: RecordedGraph | None = None

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qgalore":  # our own Python, in which operations are launched
            with self:
                return getattr(autograd_op, OPERATORS[func._opname])(*args, **(kwargs or {}))
        given = list(tensors_in(args))
        if given and all(tensor.dtype == torch.int64 and not tensor.dim() for tensor in given):
            return func(*args, **(kwargs or {}))  # the count of updates, which is on the host
        assert func not in _ASKED_BY_THE_HOST, f"{func} waits for the device in a capture"
        return self.done(func, args, kwargs or {})

    def done(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation and record it."""
        found = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, list(tensors_in(found))))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Do all again; the first time they have been done, by the capture."""
        self.replays += 1
        for function, args, kwargs, found in self.operations if self.replays > 1 else ():
            given = {key: aliases(value) for key, value in kwargs.items()}
            for old, new in zip(found, tensors_in(function(*aliases(args), **given)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.data.copy_(new)


OPERATORS = {
    "grouped_linear": "_forward",
    "grouped_linear_accumulate": "_accumulate",
    "grouped_linear_input_gradient": "_input_gradient",
}
"""Our operators, and the functions that they are."""


def record(work: Callable[[], None]) -> RecordedGraph:
    """The graph of what `work` does, which is done once."""
    graph = RecordedGraph()
    RecordedGraph.recording = graph
    try:
        with graph:
            work()
    finally:
        RecordedGraph.recording = None
    return graph


class RecordedStack(CapturedStack):
    """The stack of graphs on a CPU."""

    in_pool = False
    """Whether what is allocated lies where a replay may write over it."""

    def _capture(self, work: Callable[[], None]) -> Any:
        return record(work)

    def _replay(self, work: Work, index: int) -> None:
        assert not any(weight.subspace.due for weight in self._weights[index]), "a graph refreshes nothing"
        super()._replay(work, index)

    @contextlib.contextmanager
    def graph_pool(self) -> Iterator[None]:
        RecordedStack.in_pool = True
        yield
        RecordedStack.in_pool = False


def record_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each function of `qgalore.kernels` be one operation of the graph that is recorded."""
    for name in kernels.__all__:
        function = getattr(kernels, name)
        if callable(function) and not isinstance(function, type):
            monkeypatch.setattr(kernels, name, functools.partial(_kernel, function))


def _kernel(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    graph, RecordedGraph.recording = RecordedGraph.recording, None
    args, kwargs = aliases(args), {key: aliases(value) for key, value in kwargs.items()}
    try:
        if graph is None:
            return function(*args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            return graph.done(function, args, kwargs)
    finally:
        RecordedGraph.recording = graph
