"""SwiGLU over inputs that are kept in INT8: what it rounds, and what gradients it gives."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.models.ops.swiglu import group_size_of, swiglu_through_int8
from tests.test_modeling_llama import built, tokens, write_config


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(x: torch.Tensor, size: int) -> torch.Tensor:
    """The formula of the docstring in float64."""
    groups = x.detach().double().view(-1, size)
    scale = (groups.abs().amax(1, keepdim=True).float() * (1.01 / 127)).bfloat16().double()
    return ((groups / scale).round() * scale).view(x.shape)


@pytest.mark.parametrize(("shape", "size"), [((3, 5, 128), 128), ((4, 24), 32), ((2, 8, 22), 32), ((2, 1376), 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_rounded_inputs(
    shape: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    gate, up = (normal(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    grad = normal(*shape, dtype=dtype, seed=3)
    out = swiglu_through_int8(gate, up)
    found = torch.autograd.grad(out, [gate, up], grad)

    assert group_size_of(gate.numel()) == size
    exact_inputs = [rounded(x, size).requires_grad_() for x in (gate, up)]
    exact = F.silu(exact_inputs[0]) * exact_inputs[1]
    wanted = torch.autograd.grad(exact, exact_inputs, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip((out, *found), (exact, *wanted), strict=True):
        assert ours.dtype == dtype and ours.shape == gate.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
    # It does round, by less than a hundredth of a standard deviation.
    errors = [float((rounded(x, size) - x.detach().double()).std()) for x in (gate, up)]
    assert all(1e-3 < error < 1e-2 for error in errors)


def test_no_code_overflows_whatever_the_scale_was_rounded_to() -> None:
    largest = torch.linspace(1e-3, 1e3, 4001)
    gate = torch.zeros(4001, 128)
    gate[:, 5], gate[:, 9] = largest, -largest
    up = torch.ones_like(gate)
    out = swiglu_through_int8(gate, up)
    torch.testing.assert_close(out[:, 5], F.silu(largest), rtol=1.1e-2, atol=1e-6)
    assert (out[:, 9] <= 0).all()
    assert (out[:, 0] == 0).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    zeros = torch.zeros(2, 64, requires_grad=True)
    swiglu_through_int8(zeros, zeros).sum().backward()
    assert zeros.grad is not None and (zeros.grad == 0).all()
    for bad in (torch.nan, torch.inf):
        gate = normal(2, 64)
        gate[1, 3] = bad
        assert not swiglu_through_int8(gate, normal(2, 64)).isfinite().all()


def test_where_no_group_fits_nothing_is_rounded() -> None:
    gate, up = normal(3, 7), normal(3, 7, seed=1)
    assert group_size_of(gate.numel()) is None
    assert torch.equal(swiglu_through_int8(gate, up), F.silu(gate) * up)


def test_only_training_rounds_and_only_layers_that_are_not_recomputed(tmp_path: Path) -> None:
    def model(**options: bool | int) -> LlamaForCausalLM:
        model = built(write_config(tmp_path), dtype="float32", **options)
        assert isinstance(model, LlamaForCausalLM)
        return model

    def loss(of: LlamaForCausalLM) -> torch.Tensor:
        found = of(tokens(4, 16), tokens(4, 16)).loss_sum
        assert found is not None
        return found

    plain, keeping = model(), model(int8_activations=True)
    recomputing = model(int8_activations=True, activation_checkpointing=True)
    with torch.no_grad():
        assert torch.equal(loss(keeping), loss(plain))
    assert torch.equal(loss(recomputing), loss(plain))
    torch.testing.assert_close(loss(keeping), loss(plain), rtol=1e-3, atol=0)

    def gradients(of: LlamaForCausalLM) -> torch.Tensor:
        loss(of).backward()
        return torch.cat([parameter.grad.flatten() for parameter in of.parameters() if parameter.grad is not None])

    exact, found, again = gradients(plain), gradients(keeping), gradients(recomputing)
    assert torch.equal(again, exact)
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 0.05
