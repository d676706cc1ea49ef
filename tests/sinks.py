"""A sink for tests of low-rank layers."""

from __future__ import annotations

from torch import Tensor


class FactorSink:
    """A sink that wants the two factors and nothing else."""

    def forms_gradient(self, input: Tensor) -> bool:
        return False

    def input_basis(self, input: Tensor) -> Tensor | None:
        return None

    def accumulate_full(self, grad: Tensor) -> None:
        raise AssertionError("a gradient that this sink has not asked for")

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        self.grad_output, self.input, self.projected = grad_output, input, projected
