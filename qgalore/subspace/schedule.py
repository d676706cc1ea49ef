"""When a subspace is refreshed: interval, staggering and the lazy layer-wise rule. Plain Python, one object a weight.

Staggering: weight k of N is first refreshed in one of the first updates, eight or more, and then at an offset of k / N
of the interval, so that an update refreshes a few weights and never all: no stall, and no moment at which all full
gradients or sketches exist.

The lazy rule of Q-GaLore (arXiv 2407.08296, section 3.3): when the subspace of a layer has changed little over
`queue_size` refreshes in a row, its interval is multiplied by `gamma`. Change is measured by
`qgalore.subspace.fit.similarity`; the window is emptied after each growth and the interval has a cap.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_LEAST_SPREAD, _MOST_AT_ONCE = 8, 7


def first_refresh_spread(count: int, base_interval: int) -> int:
    """Updates over which the first refreshes of `count` weights are spread.

    Eight, or as many as keep it to one layer of a LLaMA an update: each needs a sketch until the update is made.
    """
    return min(max(_LEAST_SPREAD, -(-count // _MOST_AT_ONCE)), base_interval)


@dataclass
class RefreshSchedule:
    """The refreshes of one weight; all times are update steps, counted from 0."""

    base_interval: int
    """Updates between refreshes at the start (`update_proj_gap`)."""
    index: int
    """Number of the weight among `count`, for the staggering."""
    count: int
    """Weights that share the schedule."""
    lazy: bool = False
    """Apply the lazy rule."""
    threshold: float = 0.4
    """Mean similarity over the window above which the interval grows (`cos_threshold`)."""
    gamma: float = 2.0
    """Factor of the growth (`gamma_proj`)."""
    queue_size: int = 5
    """Refreshes in the window."""
    max_interval: int = 0
    """Cap of the interval; 0 stands for 8 times the base interval."""
    interval: int = 0
    next_refresh: int = 0
    refreshes: int = 0
    saved: int = 0
    """Refreshes that the lazy rule left out, against one every base interval."""
    window: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set what depends on other fields."""
        self.max_interval = self.max_interval or 8 * self.base_interval
        if not self.interval:
            self.interval = self.base_interval
            self.next_refresh = self.index % first_refresh_spread(self.count, self.base_interval)

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
        if self.lazy and similarity is not None:
            self.window = [*self.window, similarity][-self.queue_size :]
            if len(self.window) == self.queue_size and sum(self.window) / self.queue_size > self.threshold:
                self.interval = min(int(self.interval * self.gamma), max(self.max_interval, self.base_interval))
                self.window = []
        self.saved += self.interval // self.base_interval - 1
        self.next_refresh = update_step + self.interval

    def _stagger(self, update_step: int) -> int:
        """Updates until the weight's own place in the interval comes round."""
        place = (self.index * self.base_interval) // max(1, self.count)
        return (place - update_step - 1) % self.base_interval + 1
