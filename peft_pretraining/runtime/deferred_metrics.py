"""Metrics whose values are still being computed: copied to the host behind the device's back, read one update later.

Reading a value with `.item()` makes the host wait until the device has done all that is queued, the next update
included. A copy into pinned memory and an event wait only for the update that made the value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class DeferredMetrics:
    """Holds the metrics of one update until the next one is under way."""

    def __init__(self) -> None:
        """Empty."""
        self._pending: tuple[int, dict[str, float], list[str], Tensor, torch.cuda.Event | None] | None = None

    def put(self, update_step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Hand in an update's metrics, host floats and 0-dim device tensors; those handed in before have been taken."""
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
        """The metrics handed in last, as floats; waits for them. None if there are none."""
        if self._pending is None:
            return None
        update_step, floats, names, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return update_step, floats | dict(zip(names, values.tolist(), strict=True))
