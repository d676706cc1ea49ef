"""Micro-batches of token ids with their labels.

A row is a sequence of ids of known length, padded on the right. Padding needs no attention mask, because in a causal
model no token attends to the right, and no special token, because labels are masked by length: any id will do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, on the CPU. The model shifts the labels."""

    input_ids: torch.Tensor  # (batch_size, max_length) int64
    labels: torch.Tensor  # (batch_size, max_length) int64, IGNORED_LABEL where there is padding
    target_tokens: int
    """Labels that count: those after the first column (nothing predicts a row's first token) that are not ignored."""
    tokens: int
    """Ids that are not padding."""


@dataclass(frozen=True)
class Update:
    """One rank's part of the global batch of one update step."""

    micro_batches: list[MicroBatch]
    target_tokens: int
    """The targets of all its micro-batches; the loss is divided by their sum over the ranks."""
    tokens: int
    """Ids without padding."""


def make_micro_batch(rows: NDArray[np.int32], lengths: NDArray[np.int64]) -> MicroBatch:
    """Build a micro-batch of `rows` (batch_size, max_length), of which the first `lengths` (batch_size,) ids count."""
    # In numpy: torch would start threads for it, which would compete with those of the loader.
    input_ids = rows.astype(np.int64)
    labels = np.where(np.arange(rows.shape[1]) < lengths[:, None], input_ids, IGNORED_LABEL)
    target_tokens = int(np.maximum(lengths - 1, 0).sum())
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), target_tokens, int(lengths.sum()))
