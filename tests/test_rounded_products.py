"""Layers that multiply in INT8 or FP8: what both do with tokens, padding and the weight.

How far their products are from float ones is in `test_int8_products.py` and `test_fp8_products.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qgalore import LowRankLinear, WeightFormat, kernels
from tests.sinks import FactorSink

FORMATS = {"int8": WeightFormat(8, int8_products=True), "fp8": WeightFormat(8, fp8_products=True)}
pytestmark = pytest.mark.parametrize("format", FORMATS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def layer(format: str, inputs: int, outputs: int, bias: bool = False, pads_output: bool = False) -> LowRankLinear:
    torch.manual_seed(3)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return LowRankLinear.from_linear(linear, FORMATS[format], pads_output=pads_output)


@pytest.mark.parametrize("shape", [(21,), (4, 21), (2, 3, 21)])
def test_tokens_of_any_shape_are_rounded_one_by_one(format: str, shape: tuple[int, ...]) -> None:
    module, x = layer(format, 21, 10, bias=True), normal(*shape)
    one_by_one = torch.stack([module(token) for token in x.reshape(-1, 21)])
    assert torch.equal(module(x), one_by_one.view(*shape[:-1], 10))
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module(x.unsqueeze(0)[:0]).shape == (0, *shape[:-1], 10)


def test_no_weight_is_dequantized(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(format, 24, 16)
    module.attach(FactorSink())
    monkeypatch.setattr(kernels, "dequantize", lambda *args: pytest.fail("a weight was dequantized"))
    module(normal(4, 24).requires_grad_()).sum().backward()


def test_padding_is_never_read_and_comes_back_as_zeros(format: str) -> None:
    x, back = normal(5, 24), layer(format, 21, 24)
    narrow, wide = layer(format, 24, 21)(x), layer(format, 24, 21, pads_output=True)(x)
    assert wide.shape == (5, 32) and torch.equal(wide[:, :21], narrow) and wide[:, 21:].count_nonzero() == 0
    assert torch.equal(back(wide), back(narrow))
    back.attach(FactorSink())
    wide = wide.detach().requires_grad_()
    back(wide).square().sum().backward()
    assert wide.grad is not None and wide.grad.shape == (5, 32)
    assert wide.grad[:, 21:].count_nonzero() == 0 and wide.grad[:, :21].count_nonzero() > 0
