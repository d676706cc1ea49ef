"""What every network ends in: the logits of its hidden states, or the loss of those."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.models.ops.linear_cross_entropy import linear_cross_entropy
from qgalore.config import FLOAT_PRODUCTS

IGNORE_INDEX = -100


class CausalLMOutput(NamedTuple):
    """What a forward gives: logits without labels, the summed loss with them."""

    logits: Tensor | None  # (B, L, vocab_size)
    loss_sum: Tensor | None  # () float32, nats summed over the target tokens


def shifted(labels: Tensor) -> Tensor:
    """The targets (B, L) of labels (B, L): the next label, and none at the end."""
    # Shifting the labels instead of cutting the hidden states saves a copy.
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def head_output(
    hidden: Tensor, lm_head: nn.Linear, labels: Tensor | None, products: int = FLOAT_PRODUCTS, spent: bool = False
) -> CausalLMOutput:
    """Logits of hidden (B, L, hidden_size), or their cross-entropy against the shifted labels (B, L).

    products: in what a loss with gradients is multiplied, as `CausalLM.head_products` says. spent: whether the head's
    weight is there for this call alone, and its memory may be taken; logits then have no gradients.
    """
    if labels is None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not spent):
            return CausalLMOutput(lm_head(hidden), None)
    targets = shifted(labels).flatten()
    loss_sum = linear_cross_entropy(hidden.flatten(0, 1), lm_head.weight, targets, IGNORE_INDEX, products, spent)
    return CausalLMOutput(None, loss_sum)
