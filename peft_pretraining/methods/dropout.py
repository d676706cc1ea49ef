"""Dropout before adapters whose choices are a function of the run's seed, the update, the micro-batch and the layer.

PyTorch's draws from a global generator: a resumed run would drop other values, and so would a layer that is computed
again for its backward pass. Here a value's choice is a hash of its index and of a key, by the finalizer of MurmurHash3
(Appleby, public domain) with the constants of Wellons' lowbias32, in operations of tensors: a compiler makes one kernel
of them, that keeps no mask, inside a compiled layer as well. The key is a tensor of the device, so that another
micro-batch is no other function to compile.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qgalore.seeding import mix_seed


class SeededDropout(nn.Module):
    """Sets a share of the values of its input to zero in training, and divides the others by what is left."""

    def __init__(self, share: float, seed: int, device: torch.device | str = "cpu") -> None:
        """seed: of this layer, 64 bits; device: that of its inputs."""
        super().__init__()
        self.share = share
        # No buffers: a state dict has nothing of them.
        self.seed = torch.full((), _signed(seed), dtype=torch.int64, device=device)
        self.pass_seed = torch.zeros_like(self.seed)
        """Of the micro-batch that goes through the model."""

    def forward(self, x: Tensor) -> Tensor:
        """x (...) to (...)."""
        if not self.training:
            return x
        drop = _as_one_kernel() if x.is_cuda and not torch.compiler.is_compiling() else dropped
        return drop(x, self.seed, self.pass_seed, self.share)


def dropped(x: Tensor, seed: Tensor, pass_seed: Tensor, share: float) -> Tensor:
    """x (...) without a share of its values; seed and pass_seed: () int64, of the layer and of the micro-batch."""
    key = seed ^ pass_seed
    number = torch.arange(x.numel(), device=x.device).to(torch.int32)
    random = _mixed(_mixed(number ^ key.to(torch.int32)) ^ (key >> 32).to(torch.int32))
    least = round(share * 2**32) - 2**31  # of those that are kept, among -2^31 to 2^31 - 1
    return torch.where((random >= least).view(x.shape), x * (1 / (1 - share)), 0.0)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int32 (...) each bit of whose result depends on all of x; products wrap around."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * (0x846CA68B - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x (...) shifted right, with zeros at the left."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


@functools.cache
def _as_one_kernel() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`dropped` for a layer that is not compiled, on a GPU: compiled where there is Triton."""
    if importlib.util.find_spec("triton") is None:
        return dropped
    return torch.compile(dropped, fullgraph=True, dynamic=False, options={"deterministic": True})


def _signed(number: int) -> int:
    """The int64 with the bits of a whole number of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def dropouts_of(model: nn.Module) -> list[SeededDropout]:
    """All of a model."""
    return [module for module in model.modules() if isinstance(module, SeededDropout)]


def begin_pass(layers: Sequence[SeededDropout], *numbers: int) -> None:
    """Let layers draw anew for a micro-batch: numbers are those of the update, of it and of the rank."""
    if layers:
        # Filled on the device, which nobody waits for.
        pass_seed = torch.full_like(layers[0].seed, _signed(mix_seed(*numbers)))
        for layer in layers:
            layer.pass_seed = pass_seed
