"""When a subspace is refreshed: interval, staggering and the lazy layer-wise rule. Plain Python, one object a weight.

Staggering: weight k of N is first refreshed in one of the first updates, eight or more, and then at an offset of k / N
of the interval, so that an update refreshes a few weights and never all: no stall, and no moment at which all full
gradients or sketches exist.

The first refresh counts only if there was a gradient: behind a layer that begins at zero there is none at first, nor
in the update that torch's `get_optimizer_state_dict` makes. Else the subspace would be a random one for an interval.
Nor does any refresh count of an update that was skipped: it stays due.

The lazy rule of Q-GaLore (arXiv 2407.08296, section 3.3): when the subspace of a layer has changed little over
`queue_size` refreshes in a row, its interval is multiplied by `gamma_proj`. Change is measured by
`qgalore.subspace.fit.similarity`; the window is emptied after each growth and the interval has a cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qgalore.config import SubspaceConfig

_LEAST_SPREAD, _MOST_AT_ONCE = 8, 7


def first_refresh_spread(count: int, base_interval: int) -> int:
    """Updates over which the first refreshes of `count` weights are spread.

    Eight, or as many as keep it to one layer of a LLaMA an update: each needs a sketch until the update is made.
    """
    return min(max(_LEAST_SPREAD, -(-count // _MOST_AT_ONCE)), base_interval)


@dataclass
class RefreshSchedule:
    """The refreshes of one weight; all times are update steps, counted from 0."""

    options: SubspaceConfig
    """The interval at the start, and the lazy rule, which holds for subspaces by SVD alone."""
    index: int
    """Number of the weight among `count`, for the staggering."""
    count: int
    """Weights that share the schedule."""
    interval: int = 0
    next_refresh: int = 0
    refreshes: int = 0
    saved: int = 0
    """Refreshes that the lazy rule left out, against one every base interval."""
    window: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set what depends on other fields."""
        if not self.interval:
            self.interval = self.options.update_proj_gap
            self.next_refresh = self.index % first_refresh_spread(self.count, self.interval)

    KEYS: ClassVar = ("schedule", "similarities")
    """What `save` puts into a state."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `save` has put into a weight's optimizer state; nothing where there is none."""
        if "schedule" in state:
            self.interval, self.next_refresh, self.refreshes, self.saved = state["schedule"].tolist()
            # No more than `record` would keep: a state may be of a longer queue.
            self.window = state["similarities"].tolist()[-self.options.queue_size :]

    def save(self, state: dict[str, Tensor]) -> None:
        """Put the schedule into a weight's optimizer state, as tensors on the CPU."""
        counters = [self.interval, self.next_refresh, self.refreshes, self.saved]
        state["schedule"] = torch.tensor(counters, dtype=torch.int64, device="cpu")
        state["similarities"] = torch.tensor(self.window, dtype=torch.float64, device="cpu")

    @property
    def lazy(self) -> bool:
        """Whether the interval grows where a subspace changes little."""
        return self.options.subspace == "svd" and self.options.gamma_proj > 1

    def due(self, update_step: int) -> bool:
        """Whether the weight is refreshed in this update."""
        return update_step >= self.next_refresh

    def record(self, update_step: int, similarity: float | None) -> None:
        """Count a refresh made in this update, whose basis had this similarity with the one before (None: unknown)."""
        first = self.refreshes == 0
        self.refreshes += 1
        if first:
            self.next_refresh = update_step + self._stagger(update_step)
            return
        options = self.options
        if self.lazy and similarity is not None:
            self.window = [*self.window, similarity][-options.queue_size :]
            mean = sum(self.window) / options.queue_size
            if len(self.window) == options.queue_size and mean > options.cos_threshold:
                self.interval = min(int(self.interval * options.gamma_proj), options.longest_interval)
                self.window = []
        self.saved += self.interval // options.update_proj_gap - 1
        self.next_refresh = update_step + self.interval

    def put_off(self, update_step: int) -> None:
        """Try a first refresh again that found no gradient in this update: in the next one, later from time to time."""
        self.next_refresh = update_step + min(update_step + 1, self.options.update_proj_gap)

    def _stagger(self, update_step: int) -> int:
        """Updates until the weight's own offset in the interval comes round."""
        interval = self.options.update_proj_gap
        offset = (self.index * interval) // max(1, self.count)
        return (offset - update_step - 1) % interval + 1
