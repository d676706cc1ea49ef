"""Dropout before adapters whose choices are a function of the run's seed, the update, the micro-batch and the layer.

PyTorch's draws from a global generator: a resumed run would drop other values, and so would a layer that is computed
again for its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qgalore.seeding import mix_seed


class SeededDropout(nn.Module):
    """Sets a share of the values of its input to zero in training, and divides the others by what is left."""

    def __init__(self, share: float, seed: int) -> None:
        """seed: of this layer."""
        super().__init__()
        self.share, self.seed, self.pass_seed = share, seed, 0
        """pass_seed: of the micro-batch that goes through the model."""

    def forward(self, x: Tensor) -> Tensor:
        """x (...) to (...)."""
        if not self.training:
            return x
        generator = torch.Generator(x.device).manual_seed(mix_seed(self.seed, self.pass_seed) >> 1)
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.share, generator=generator)
        return x * kept.div_(1 - self.share)


def dropouts_of(model: nn.Module) -> list[SeededDropout]:
    """All of a model."""
    return [module for module in model.modules() if isinstance(module, SeededDropout)]


def begin_pass(layers: list[SeededDropout], *numbers: int) -> None:
    """Let layers draw anew for a micro-batch: numbers are those of the update, of it and of the rank."""
    for layer in layers:
        layer.pass_seed = mix_seed(*numbers)
