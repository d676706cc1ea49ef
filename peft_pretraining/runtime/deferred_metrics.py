"""Metrics that are copied to the host asynchronously and read one update later.

Reading a value with `.item()` makes the host wait until the device has done all queued work, the next update included.
An asynchronous copy into pinned memory and an event wait only for the update that computed the value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class DeferredMetrics:
    """Keeps the metrics of one update until the next one has been launched."""

    def __init__(self) -> None:
        """Start without metrics."""
        self._pending: tuple[int, dict[str, float], list[str], Tensor, torch.cuda.Event | None] | None = None

    def put(self, update_step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Store an update's metrics, host floats and 0-dim device tensors; `take` the stored ones first."""
        assert self._pending is None, f"the metrics of update {self._pending[0]} have not been taken"
        names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
        floats = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        tensors = [value.float() for value in metrics.values() if isinstance(value, Tensor)]
        values, event = torch.stack(tensors) if tensors else torch.empty(0), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, event = host.copy_(values, non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending = update_step, floats, names, values, event

    def take(self) -> tuple[int, dict[str, float]] | None:
        """Remove and return (update_step, metrics as floats), after waiting for them; None if there are none."""
        if self._pending is None:
            return None
        update_step, floats, names, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return update_step, floats | dict(zip(names, values.tolist(), strict=True))
