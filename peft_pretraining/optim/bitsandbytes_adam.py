"""8-bit AdamW whose moments and weights are updated by the kernels of bitsandbytes.

The method is that of Dettmers et al. (arXiv 2110.02861), which bitsandbytes' `AdamW8bit` is the authors' implementation
of. All else is as with this project's own kernels: sums over micro-batches and ranks, clipping, learning rates, weight
decay, updates that are skipped on the device, and the format of the moments, which is the same to the byte: codes of
the same dynamic map in blocks of 256 values, weights of fewer than 4,096 values in float32. So a state of one is a
state of the other.

Not `bitsandbytes.optim.AdamW8bit` itself, but the two functions that it calls: its `step` waits for the device after
every weight, and leaves out no update without the host's knowing. What differs from the own kernels: bitsandbytes
rounds a bfloat16 weight to the nearest, where the own ones round stochastically, and takes gradients in the data type
of the weights. Its kernels for updates take no stream and run in CUDA's default one, whatever PyTorch's current stream
is, so the whole update runs there, and the current one, in which a run trains, waits for it on the device.

Arguments are given by keyword: since 0.50 some stand in another order than before, and no error tells.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.methods.default_stream import in_default_stream
from qgalore import GaLoreAdamW8bit, kernels
from qgalore.update.directions import DIRECTIONS, Direction, RowsOfWeight
from qgalore.update.weight import Weight


def why_not(device: torch.device) -> str:
    """Why bitsandbytes cannot update weights on this device, as the end of a sentence; "" if it can."""
    try:
        from bitsandbytes import cextension
    except ModuleNotFoundError as error:
        return f"is not installed (no module {error.name})"
    except (ImportError, OSError, RuntimeError) as error:
        return f"cannot be loaded ({error})"
    if device.type == "cuda" and not getattr(cextension.lib, "compiled_with_cuda", False):
        return f"has no library for CUDA {torch.version.cuda} (python -m bitsandbytes says more)"
    return ""


class _Weight(Weight):
    """One parameter that bitsandbytes updates."""

    def _direction(self) -> Direction:
        return _BY_BITSANDBYTES

    def check(self) -> None:
        """See `Weight`."""
        super().check()
        group = self.param_group
        if self.config is not None or group["cautious_decay"] or group["second_moment"] != "value":
            raise ValueError(
                f"parameter {self.name} is under projection, cautious_decay or a second moment of rows, which "
                "bitsandbytes does not have: use GaLoreAdamW8bit"
            )


class BitsandbytesAdamW8bit(GaLoreAdamW8bit):
    """AdamW with block-wise 8-bit states by bitsandbytes, for float weights in param groups without a rank."""

    weight_type = _Weight


def _update(parts: Sequence[RowsOfWeight], skip: Tensor | None) -> None:
    """Move moments and weights of all parts; where the flag `skip`, a bool () on the device, is true, none of them."""
    for values, step, group, number in parts:
        assert isinstance(step, kernels.AdamStep)
        moments = [step.exp_avg, step.exp_avg_sq, step.exp_avg_absmax, step.exp_avg_sq_absmax]
        with in_default_stream(values.device):
            grad = (step.grad if step.factor is None else kernels.scaled(step.grad, step.factor)).to(values.dtype)
            with _kept_if(skip, [values, *(moment for moment in moments if moment is not None)]):
                _update_one(values, grad.contiguous(), moments, group, number)


def _update_one(
    values: Tensor, grad: Tensor, moments: Sequence[Tensor | None], group: dict[str, Any], number: int
) -> None:
    from bitsandbytes import functional

    first, second, first_absmax, second_absmax = moments
    common: dict[str, Any] = {"optimizer_name": "adam", "g": grad, "p": values, "state1": first, "state2": second}
    common |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "beta3": 0.0, "alpha": 0.0, "eps": group["eps"]}
    common |= {"step": number, "lr": float(group["lr"]), "weight_decay": group["weight_decay"], "gnorm_scale": 1.0}
    if first_absmax is None:
        functional.optimizer_update_32bit(**common)
        return
    maps = {"qmap1": _dynamic_map(True, values.device), "qmap2": _dynamic_map(False, values.device)}
    functional.optimizer_update_8bit_blockwise(**common, **maps, absmax1=first_absmax, absmax2=second_absmax)


_BY_BITSANDBYTES = DIRECTIONS["adam"]._replace(update=_update)


@functools.cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The values of the 256 codes, as bitsandbytes makes them."""
    from bitsandbytes import functional

    values: Tensor = functional.create_dynamic_map(signed=signed)
    return values.to(device)


@contextlib.contextmanager
def _kept_if(skip: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let the body write to tensors, and undo it on the device where the flag is true; None stands for false."""
    if skip is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(skip, old, tensor, out=tensor)
