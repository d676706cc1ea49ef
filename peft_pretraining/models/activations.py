"""Names of the tensors of a decoder layer that its backward pass needs beside the layer's input.

Each is named by what makes it:

    attention  the output of attention and the log-sum-exp of its rows, from queries, keys and values
    residual   the sum of the layer's input and what attention adds to it
    qkv        queries, keys and values, from the layer's input
    mlp        gate and up, from that sum
"""

from __future__ import annotations

from collections.abc import Mapping

ACTIVATIONS = ("attention", "residual", "qkv", "mlp")
"""The names, in the order in which `--recompute` has them."""


def in_flag(counts: Mapping[str, int], layers: int = 0) -> str:
    """Numbers of layers by name as `--recompute` has them: attention,mlp:12; all of `layers` are not told."""
    found = {name: counts[name] for name in ACTIVATIONS if name in counts}
    return ",".join(name if count == layers else f"{name}:{count}" for name, count in found.items())
