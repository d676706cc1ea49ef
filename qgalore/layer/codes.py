"""The parameter that holds the codes of a quantized weight: an integer one that can be frozen and freed like others.

Autograd gives an integer tensor no gradient, so `requires_grad` is False and says nothing of whether the weight trains:
its layer has it trained through a gradient sink. What freezes a float parameter, `requires_grad_(False)` of the
parameter or of any module above it and `requires_grad = False`, sets `frozen` here, and True clears it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Codes(nn.Parameter):
    """Integer codes of a weight, with the mark that they are not to be trained; `requires_grad` always reads False."""

    frozen = False

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Codes:
        """data: integers of any shape; requires_grad is there for who makes copies of parameters, and has no say."""
        return super().__new__(cls, data, False)

    @property
    def requires_grad(self) -> bool:
        """False, as autograd has it; setting it sets `frozen`."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.__dict__.pop("frozen", None)
        if not value:
            self.frozen = True

    def requires_grad_(self, requires_grad: bool = True) -> Codes:
        """Free or freeze the weight."""
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        copied: Codes = super().__deepcopy__(memo)
        return copied.requires_grad_(not self.frozen)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (self.data, self.frozen)


def _restored(data: Tensor, frozen: bool) -> Codes:
    return Codes(data).requires_grad_(not frozen)
