"""Recipes: options that belong together, for `qgalore.optimizer_for` and the command line of `run_pretrain`.

- paper: the algorithm of Q-GaLore (arXiv 2407.08296): subspaces by SVD, Adam's moments; its rank is a quarter of the
  width, its learning rate that of the official command for LLaMA-7B.
- orthogonal: the streaming subspace and Muon's orthogonalized momentum in it. There is no second moment, so a rank of
  7/16 of the width takes as many bytes as the paper's 1/4. From the study in `docs/quality.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_FULL_RANK_LR, _ITS_UPDATES = 2.0, 800
"""The learning rate of embeddings, head and norms as a multiple of the matrices', in runs of up to 800 updates; in
longer ones it falls with the square root of their number: 2 in 800 and 1 in 3,200, the best measured at both."""
_DECAY, _ITS_TOKENS, _DECAYS_A_RUN = 2.5e-3, 65_536, 8.0
"""At the peak learning rate a matrix decays by 0.0025 in an update of 65,536 tokens or more, in proportion less in
smaller ones, and by at most 8 / updates of the run, so that its memory is an eighth of the run. Measured with 65,536
tokens at 800 and 3,200 updates. In small updates most embeddings would decay without a gradient, and in 150,000 updates
the limit is 5e-5, which is common practice."""
FULL_RANK_DECAY = 2.0
"""The decay of embeddings, head and norms as a multiple of the matrices'."""


@dataclass(frozen=True)
class Recipe:
    """Defaults of a way to train."""

    lr: float
    """Learning rate of the low-rank matrices."""
    rank_of_width: Fraction
    """The rank as a share of the model's width."""
    subspace: Mapping[str, Any]
    """Options of a `qgalore.config.SubspaceConfig`."""
    optimizer: Mapping[str, Any]
    """Arguments of the optimizer."""

    def rank(self, width: int) -> int:
        """Of a model of this width: a multiple of 8 where the width allows one."""
        rank = int(width * self.rank_of_width)
        return rank // 8 * 8 or max(1, rank)


PAPER = Recipe(lr=4e-3, rank_of_width=Fraction(1, 4), subspace={}, optimizer={})
ORTHOGONAL = Recipe(
    lr=1e-2,
    rank_of_width=Fraction(7, 16),
    subspace={"galore_scale": 0.5, "subspace": "streaming", "update_proj_gap": 200, "direction": "orthogonal"},
    optimizer={"norm_growth": 1.01},
)
RECIPES: Mapping[str, Recipe] = {"orthogonal": ORTHOGONAL, "paper": PAPER}
"""By name; the first is the default."""


def full_rank_multiple(updates: int) -> float:
    """The learning rate of embeddings, head and norms over that of the matrices, with the orthogonal recipe.

    updates: of the run.
    """
    return _FULL_RANK_LR * math.sqrt(min(1.0, _ITS_UPDATES / max(1, updates)))


def decay_of_matrices(updates: int, tokens: int) -> float:
    """The share of a matrix that it loses in an update at the peak learning rate, with the orthogonal recipe.

    updates: of the run; tokens: of an update.
    """
    return min(_DECAY, _DECAY * tokens / _ITS_TOKENS, _DECAYS_A_RUN / max(1, updates))
