"""Bytes that an update moves between the host and the device, over the link: layers and hidden states that wait there.

Copies of a pass over the layers are made while it computes, in both directions at once; what a pass takes is the longer
of the two. Moments that `step` updates after the last backward pass have little beside them that computes.
"""

from __future__ import annotations

from typing import NamedTuple

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.speed.passes import GROUP_SIZE, quantized_bytes, side_of
from peft_pretraining.speed.update_passes import Setting, gradient_shapes


class LinkBytes(NamedTuple):
    """Of an update of one rank, in the direction that has more."""

    beside_passes: float
    """While forward and backward passes compute."""
    of_step: float
    """While `step` updates what the backward pass has not."""

    @property
    def total(self) -> float:
        """Of an update."""
        return self.beside_passes + self.of_step


def link_bytes(args: RunArgs, s: Setting) -> LinkBytes:
    """What `--offload` and `--accumulate_by layer` move; s: what decides the passes of the run."""
    offload, layers = args.runtime.offload, s.config.num_hidden_layers
    # A layer's input is read in both passes and written once, the gradient of its output read and that of its input
    # written.
    hidden = 2 * s.config.hidden_size * s.tokens * s.grad_accum * layers if args.by_layer else 0
    if offload == "none":
        return LinkBytes(3 * hidden, 0)
    codes = layers * sum(_stored(s, m, n) for m, n in s.shapes) if offload == "weights" else 0
    bases = layers * sum(_bases(s, m, n) for m, n in s.shapes) if s.rank else 0
    moments = layers * sum(_moments(args, s, m, n) for m, n in gradient_shapes(s))
    passes = 1 if args.by_layer else s.grad_accum
    to_device = float(passes * (2 * codes + bases)) + 3 * hidden
    if args.updates_immediately:  # the backward pass also gets moments, and sends what it has updated
        return LinkBytes(to_device + moments, 0)
    if args.sums_in_momentum:  # both ways with every micro-batch
        to_device += passes * moments
    return LinkBytes(to_device, codes + bases + moments)


def _stored(s: Setting, rows: int, columns: int) -> int:
    return quantized_bytes(rows, columns, s.weight_bits) if s.weight_bits else 2 * rows * columns


def _bases(s: Setting, m: int, n: int) -> int:
    short = side_of(m, n)[1]
    return quantized_bytes(s.rank, short, s.basis_bits) if s.basis_bits else 2 * s.rank * short


def _moments(args: RunArgs, s: Setting, rows: int, columns: int) -> float:
    count = 2 if s.direction == "adam" else 1
    bits_8 = "8bit" in args.optimizer.optimizer
    return count * rows * columns * (1 + 4 / GROUP_SIZE if bits_8 else 4)


def seconds_with_link(args: RunArgs, s: Setting, computing: float, bytes_per_second: float) -> float:
    """The time of an update that computes for so many seconds, with copies beside it."""
    moved = link_bytes(args, s)
    return max(computing, moved.beside_passes / bytes_per_second) + moved.of_step / bytes_per_second
