"""Ragged matrices padded for the tensor cores: the same numbers, also through a chain that keeps the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat
from qgalore.layer.layout import padded_width, with_padded_columns


def test_only_what_the_tensor_cores_refuse_is_padded() -> None:
    assert [padded_width(n) for n in (8, 24, 1376, 2048, 5461, 1)] == [8, 24, 1376, 2048, 5472, 16]
    x = torch.randn(3, 21)
    padded = with_padded_columns(x)
    assert padded.shape == (3, 32) and torch.equal(padded[:, :21], x) and padded[:, 21:].count_nonzero() == 0
    even = torch.randn(3, 24)
    assert with_padded_columns(even) is even


def trained(pads: bool, format: WeightFormat, rank: int | None, proj_type: str) -> tuple[Tensor, ...]:
    """Output, input gradient and weights of a ragged pair of layers after some updates inside the backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((21, 24), (24, 21))
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    first, second = LowRankLinear(matrices[0], None, format, pads), LowRankLinear(matrices[1], None, format)
    low_rank = {"rank": rank, "subspace": "streaming", "update_proj_gap": 2, "proj_type": proj_type} if rank else {}
    optimizer = QGaLoreAdamW8bit([{"params": [first.weight, second.weight]} | low_rank], lr=1e-2)
    model = nn.Sequential(first, nn.SiLU(), second)
    optimizer.attach(model, update_in_backward=True)
    x = torch.randn(2, 8, 24, generator=generator, requires_grad=True)
    for _ in range(5):
        x.grad = None
        y = model(x)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert x.grad is not None
    return y.detach(), x.grad, *(layer.dequantized_weight(torch.float32).detach() for layer in (first, second))


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize(
    "format",
    [WeightFormat(bits=8), WeightFormat(bits=4), WeightFormat(), WeightFormat(bits=8, int8_products=True)],
    ids=["8", "4", "float", "int8 products"],
)
def test_padding_between_two_layers_changes_nothing(format: WeightFormat, rank: int | None, proj_type: str) -> None:
    for plain, padded in zip(*(trained(p, format, rank, proj_type) for p in (False, True)), strict=True):
        assert plain.shape == padded.shape
        assert torch.allclose(plain, padded, atol=1e-5)


def test_a_layer_that_pads_gives_zeros_and_takes_them() -> None:
    generator = torch.Generator().manual_seed(1)
    arguments = (torch.randn(21, 24, generator=generator), nn.Parameter(torch.ones(21)), WeightFormat(bits=8))
    x = torch.randn(5, 24, generator=generator)
    narrow, wide = LowRankLinear(*arguments)(x), LowRankLinear(*arguments, pads_output=True)(x)
    assert wide.shape == (5, 32) and torch.equal(wide[:, :21], narrow) and wide[:, 21:].count_nonzero() == 0
    back = LowRankLinear(torch.randn(24, 21, generator=generator), None, WeightFormat(bits=8))
    assert torch.allclose(back(wide), back(narrow), atol=1e-5)
