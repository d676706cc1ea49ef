"""Recipes: options that belong together, for `qgalore.optimizer_for` and the command line of `run_pretrain`.

- full_rank: the orthogonalized momentum of whole gradients in 8 bits, in the place of a projection and two moments,
  with rows of one size (NorMuon, arXiv 2510.05491); and one second moment a row of embeddings and head (Adam-mini,
  arXiv 2406.16793). The default of runs.
- orthogonal: the streaming subspace and Muon's orthogonalized momentum in it. There is no second moment, so a rank of
  7/16 of the width takes as many bytes as the paper's 1/4. The default of `qgalore.optimizer_for`, whose speed and
  memory under other trainers were measured with it.
- paper: the algorithm of Q-GaLore (arXiv 2407.08296): subspaces by SVD, Adam's moments; its rank is a quarter of the
  width, its learning rate that of the official command for LLaMA-7B.

The values of the first two are the best of the study in `docs/quality.md`: 60M, 65,536 tokens an update, in 800 updates
and in 3,200, which read its text one and a half times and six and a half. Elsewhere they are a rule through two points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from qgalore.config import FULL

_SHORT, _LONG = 800, 3_200
"""Updates of the runs of the study."""
_ITS_TOKENS = 65_536
"""Tokens of its updates."""
_DECAYS_A_RUN = 8.0
"""A matrix decays by at most 8 / updates of the run, so that its memory is an eighth of the run: measured at both
lengths. In 150,000 updates the limit is 5e-5, which is common practice."""


@dataclass(frozen=True)
class ByLength:
    """What a recipe derives from the length of a run."""

    full_rank_multiple: Callable[[int], float]
    """Of the updates of the run: the learning rate of embeddings, head and norms over that of the matrices."""
    decay: float
    """The share of a matrix that it loses in an update of 65,536 tokens or more at the peak learning rate."""
    full_rank_decay: Callable[[int], float]
    """Of the updates of the run: the decay of embeddings, head and norms as a multiple of the matrices'."""

    def decay_of_matrices(self, updates: int, tokens: int) -> float:
        """The share of a matrix that it loses in an update at the peak learning rate.

        updates: of the run; tokens: of an update. In smaller updates it is less in proportion, since most embeddings
        would decay without a gradient.
        """
        return min(self.decay, self.decay * tokens / _ITS_TOKENS, _DECAYS_A_RUN / max(1, updates))


@dataclass(frozen=True)
class Recipe:
    """Defaults of a way to train."""

    lr: float
    """Learning rate of the low-rank matrices."""
    rank_of_width: Fraction | None
    """The rank as a share of the model's width; None for the whole space."""
    subspace: Mapping[str, Any]
    """Options of a `qgalore.config.SubspaceConfig`."""
    optimizer: Mapping[str, Any]
    """Arguments of the optimizer."""
    by_length: ByLength | None = None
    """None where nothing depends on the length of a run."""

    def rank(self, width: int) -> int | str:
        """Of a model of this width: a multiple of 8 where the width allows one, or `FULL`."""
        if self.rank_of_width is None:
            return FULL
        rank = int(width * self.rank_of_width)
        return rank // 8 * 8 or max(1, rank)


def _falling(updates: int) -> float:
    """2 in up to 800 updates, then with the root of their number: 1 in 3,200, the best measured at both."""
    return 2.0 * math.sqrt(min(1.0, _SHORT / max(1, updates)))


def _falling_faster(updates: int) -> float:
    """4 in up to 800 updates, 1/2 in 3,200, the best measured at both; beyond with the root, as in the other recipe."""
    if updates > _LONG:
        return 0.5 * math.sqrt(_LONG / updates)
    return 4.0 * math.pow(min(1.0, _SHORT / max(1, updates)), 1.5)


def _rising(updates: int) -> float:
    """0 in up to 800 updates, 2 in 3,200 or more, between them in proportion."""
    return 2.0 * min(1.0, max(0.0, (updates - _SHORT) / (_LONG - _SHORT)))


_STREAMING = {"galore_scale": 0.5, "subspace": "streaming", "update_proj_gap": 200}

PAPER = Recipe(lr=4e-3, rank_of_width=Fraction(1, 4), subspace={}, optimizer={})
ORTHOGONAL = Recipe(
    lr=1e-2,
    rank_of_width=Fraction(7, 16),
    subspace={**_STREAMING, "direction": "orthogonal"},
    optimizer={"norm_growth": 1.01},
    by_length=ByLength(_falling, decay=2.5e-3, full_rank_decay=lambda updates: 2.0),
)
FULL_RANK = Recipe(
    lr=1e-2,
    rank_of_width=None,
    subspace={**_STREAMING, "direction": "normuon", "newton_schulz": "auto"},
    optimizer={"second_moment": "row"},
    by_length=ByLength(_falling_faster, decay=4e-3, full_rank_decay=_rising),
)
RECIPES: Mapping[str, Recipe] = {"full_rank": FULL_RANK, "orthogonal": ORTHOGONAL, "paper": PAPER}
"""By name."""
