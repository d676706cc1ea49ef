"""What a low-rank linear layer hands its weight gradient to during the backward pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientSink(Protocol):
    """What receives the factors of a weight gradient during the backward pass."""

    @property
    def out_features(self) -> int:
        """Rows of the gradient."""

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        """Take grad_output (tokens, out_features) and input (tokens, in_features): the gradient is their product.

        Either may be wider, with columns of zeros (`qgalore.layer.layout`). projected: the input times what
        `input_basis` gave, (tokens, rank), where that has been made already.
        """

    def input_basis(self, input: Tensor) -> Tensor | None:
        """The basis (rank, in_features) that `accumulate` is about to multiply the input with, in its dtype.

        None: with nothing, or not with those of other sinks at once.
        """

    def forms_gradient(self, input: Tensor) -> bool:
        """Whether `accumulate` is about to form the whole gradient (out_features, in_features)."""

    def accumulate_full(self, grad: Tensor) -> None:
        """Take the whole gradient instead of its factors."""
