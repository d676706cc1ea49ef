"""Low-rank training: a matrix that is the product of two factors from the start.

W = B A with B (out_features, rank) and A (rank, in_features), of which both are trained and W is never formed: the
baseline "Low-Rank" of GaLore (arXiv 2403.03507), after Kamalakara et al. (arXiv 2209.13569). Both factors begin with
independent normal values, of such a standard deviation that the entries of their product have that of the matrix in
whose place they are. Kamalakara et al. begin with a singular value decomposition of that matrix instead, which takes
most of an hour of a 7B model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.models.init import generator_of

FACTORS = ("factor_A", "factor_B")


class FactoredLinear(nn.Module):
    """A linear layer whose weight is factor_B factor_A."""

    def __init__(self, factor_A: Tensor, factor_B: Tensor, bias: nn.Parameter | None) -> None:
        """factor_A (rank, in_features), factor_B (out_features, rank); bias (out_features,)."""
        super().__init__()
        self.factor_A, self.factor_B = nn.Parameter(factor_A), nn.Parameter(factor_B)
        self.bias = bias
        self.in_features, self.out_features = factor_A.shape[1], factor_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        return F.linear(F.linear(x, self.factor_A), self.factor_B, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear has them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.factor_A)}"


def factored(linear: nn.Linear, name: str, rank: int, seed: int, std: float) -> FactoredLinear:
    """A `FactoredLinear` in the place of a layer; name: its own; std: of the entries of the product at the start."""
    sizes = {FACTORS[0]: (rank, linear.in_features), FACTORS[1]: (linear.out_features, rank)}
    each = (std / rank**0.5) ** 0.5  # an entry of the product has the variance rank * each^4
    made = [
        torch.empty(shape).normal_(0.0, each, generator=generator_of(seed, f"{name}.{key}")).to(linear.weight)
        for key, shape in sizes.items()
    ]
    return FactoredLinear(made[0], made[1], linear.bias)
