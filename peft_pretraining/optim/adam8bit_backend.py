"""Whose kernels make the updates of `--optimizer adam8bit`: `--adam8bit_backend`."""

from __future__ import annotations

import dataclasses

import torch

from peft_pretraining.config.checks import needs_own_adam8bit
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.optim.bitsandbytes_adam import why_not


def backend_of(args: RunArgs, device: torch.device) -> str:
    """The backend on this device: bitsandbytes or own; of another optimizer the flag as it is.

    Raises UserError where the flag asks for bitsandbytes and it does not work.
    """
    asked = args.optimizer.adam8bit_backend
    if args.optimizer.optimizer != "adam8bit" or asked == "own":
        return asked
    if asked == "auto":
        works = device.type == "cuda" and not needs_own_adam8bit(args) and not why_not(device)
        return "bitsandbytes" if works else "own"
    if reason := why_not(device):
        raise UserError(
            f"--adam8bit_backend bitsandbytes: the package bitsandbytes {reason}; give --adam8bit_backend own, which "
            "goes on from the states of either, or install it: pip install 'qgalore[train]'"
        )
    return asked


def with_backend(args: RunArgs, backend: str) -> RunArgs:
    """`args` with a backend."""
    return dataclasses.replace(args, optimizer=dataclasses.replace(args.optimizer, adam8bit_backend=backend))


def rounds_zeros_up(args: RunArgs, device: torch.device) -> str | None:
    """A warning of bitsandbytes' quantizer for the CPU; None where it is not used."""
    if args.optimizer.by_bitsandbytes and device.type == "cpu":
        return (
            "--adam8bit_backend bitsandbytes on a CPU: its quantizer there turns moments of zero into 1.56e-5 of the "
            "largest of their 256, so that weights without a gradient move; --adam8bit_backend own does not"
        )
    return None
