"""Rotary positions as one operator: what it turns, its gradient, and the kernel against the reference."""

import pytest
import torch

from peft_pretraining.models.ops.rotary import rotary_tables, rotate
from qgalore.layer.layout import as_one_view
from tests.kernels.comparison import both

CASES = {
    "as they come": (2, 9, 3, 3, 8),
    "grouped": (3, 5, 4, 2, 64),
    "one key": (2, 300, 8, 1, 16),
    "no power of two": (2, 7, 3, 3, 24),
    "wide": (1, 33, 2, 2, 128),
}


def heads(batch: int, length: int, count: int, head_dim: int, seed: int, layout: str = "tokens") -> torch.Tensor:
    shape = (batch, length, count, head_dim) if layout == "tokens" else (batch, count, length, head_dim)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values if layout == "tokens" else values.transpose(1, 2)


def complex_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same by multiplying complex numbers, float64."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_turned_by_the_angle_of_their_position(case: str, device: torch.device) -> None:
    batch, length, query_heads, key_heads, head_dim = CASES[case]
    cos, sin = rotary_tables(length, head_dim, 1e4, device)
    query = heads(batch, length, query_heads, head_dim, 0).to(device).requires_grad_()
    key = heads(batch, length, key_heads, head_dim, 1).to(device).requires_grad_()
    turned = rotate(query, key, cos, sin)
    for before, after in zip((query, key), turned, strict=True):
        torch.testing.assert_close(after.double(), complex_rotation(before.detach(), cos, sin), rtol=1e-5, atol=1e-5)
        assert torch.equal(after[:, 0], before[:, 0])
    # The gradient turns back: of |y|² / 2 it is x.
    sum((y.square().sum() for y in turned), torch.zeros((), device=device)).mul(0.5).backward()
    for before in (query, key):
        assert before.grad is not None
        torch.testing.assert_close(before.grad, before.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_triton_kernel_equals_reference(
    case: str, dtype: torch.dtype, layout: str, back: bool, kernel_device: torch.device
) -> None:
    """Bit for bit."""
    batch, length, query_heads, key_heads, head_dim = CASES[case]
    tables = rotary_tables(length, head_dim, 1e4, kernel_device)
    query = heads(batch, length, query_heads, head_dim, 0, layout).to(kernel_device, dtype)
    key = heads(batch, length, key_heads, head_dim, 1, layout).to(kernel_device, dtype)
    found = list(both(lambda: torch.ops.peft_pretraining.rotate(query, key, *tables, back)))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride() and ours.dtype == dtype
        assert ours.is_contiguous() or back
    # Gradients are columns of one matrix.
    assert (as_one_view([x.flatten(2).flatten(0, 1) for x in found[1]], 1) is not None) == back


def test_the_operator_is_what_torch_expects() -> None:
    tables = rotary_tables(5, 8, 1e4, torch.device("cpu"))
    arguments = (heads(2, 5, 3, 8, 0).requires_grad_(), heads(2, 5, 1, 8, 1).requires_grad_(), *tables, False)
    torch.library.opcheck(torch.ops.peft_pretraining.rotate.default, arguments)
