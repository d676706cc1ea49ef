"""Sums of gradients over micro-batches in float32, bfloat16 and 8 bits."""

import pytest
import torch

from qgalore.kernels.reference import rows
from qgalore.layer.quantization import QuantizedTensor
from qgalore.update.finite_checks import UpdateChecks
from qgalore.update.gradient_sum import GradientSum, dense, rows_of_gradient, zeros
from tests.kernels.comparison import step_row


def sum_row(seed: int) -> torch.Tensor:
    return step_row(-1.0, 1.0, seed)


def grads(count: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (16, 300)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def total(accumulator: GradientSum, parts: list[torch.Tensor]) -> torch.Tensor:
    for seed, part in enumerate(parts):
        accumulator.add(part.clone(), sum_row(seed))
    return accumulator.take()


def test_float32_sum_is_exact_for_bfloat16_parts() -> None:
    parts = grads(8, torch.bfloat16)
    found = total(GradientSum(torch.float32), parts)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.stack(parts).double().sum(0).float(), rtol=1e-6, atol=1e-6)


def test_bfloat16_sum_is_kept_in_bfloat16() -> None:
    parts = grads(4)
    found = total(GradientSum(torch.bfloat16), parts)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), torch.stack(parts).sum(0), atol=0.06)


def test_int8_sum_is_unbiased() -> None:
    parts = grads(3)
    expected = torch.stack(parts).sum(0)
    errors = []
    for trial in range(100):
        accumulator = GradientSum(torch.int8)
        for number, part in enumerate(parts):
            accumulator.add(part.clone(), sum_row(10 * trial + number))
        errors.append(accumulator.take() - expected)
    step = 12.0 / 255  # the range of a group of sums, about
    stacked = torch.stack(errors)
    assert 0.1 * step < float(stacked.std()) < 2 * step
    assert abs(float(stacked.mean())) < 0.005 * step
    assert float(stacked.mean(0).abs().mean()) < 0.2 * step


def test_int8_keeps_a_byte_a_value() -> None:
    accumulator = GradientSum(torch.int8)
    for part in grads(2):
        accumulator.add(part, sum_row(0))
    stored = accumulator._sum
    assert not isinstance(stored, torch.Tensor) and stored is not None
    assert stored.nbytes < 1.1 * 16 * 300


def test_a_vector_is_summed_exactly_at_int8() -> None:
    parts = grads(3, shape=(50,))
    found = total(GradientSum(torch.int8), parts)
    assert torch.allclose(found, torch.stack(parts).sum(0), atol=1e-6)


def test_a_matrix_without_values_is_summed_at_int8() -> None:
    for shape in ((0, 5), (5, 0)):
        assert total(GradientSum(torch.int8), grads(2, shape=shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_it_is_empty_until_added_to_and_after_taking(dtype: torch.dtype) -> None:
    accumulator = GradientSum(dtype)
    assert accumulator.empty
    accumulator.add(grads(1)[0], sum_row(0))
    assert not accumulator.empty
    accumulator.take()
    assert accumulator.empty
    accumulator.add(grads(1)[0], sum_row(0))
    accumulator.clear()
    assert accumulator.empty


def test_a_gradient_that_comes_alone_is_not_copied() -> None:
    grad = grads(1, torch.bfloat16)[0]
    accumulator = GradientSum(torch.float32)
    accumulator.add(grad, sum_row(0))
    assert accumulator.take() is grad


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32, bfloat16 or int8, not in torch\.float16"):
        GradientSum(torch.float16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_sum_is_checked_and_read_in_rows(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 5 * 300)
    accumulator = GradientSum(getattr(torch, dtype))
    for seed, part in enumerate(grads(3)):
        accumulator.add(part, sum_row(seed))
    whole = dense(accumulator.stored)
    checks = UpdateChecks(2, torch.device("cpu"))
    checks.check({1: accumulator})
    skip, (nothing, squared_norm) = checks.skip, checks.squared_norms
    assert nothing == 0
    assert torch.allclose(squared_norm, whole.float().square().sum(), rtol=1e-5) and not skip
    stored = accumulator.take_stored()
    assert accumulator.empty and isinstance(stored, QuantizedTensor) == (dtype == "int8")
    assert torch.equal(torch.cat([rows_of_gradient(stored, 0, 7), rows_of_gradient(stored, 7, 16)]), whole)


@pytest.mark.parametrize("row", [0, 15])
def test_a_broken_sum_in_int8_is_found_in_any_row(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 5 * 300)
    accumulator = GradientSum(torch.int8)
    (part,) = grads(1)
    part[row, 3] = float("inf")
    accumulator.add(part, sum_row(0))
    checks = UpdateChecks(1, torch.device("cpu"))
    checks.check({0: accumulator})
    assert checks.skip and not checks.squared_norms.isfinite()


@pytest.mark.parametrize("shape", [(16, 300), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_sum_in_a_buffer_has_the_same_bits_and_stays_there(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Also from the second update on, over whatever the first has left there."""
    out = zeros(torch.Size(shape), dtype, torch.device("cpu"))
    fixed = GradientSum(dtype, out)
    for update in range(2):
        parts = [part * (update + 1) for part in grads(3, torch.bfloat16, shape)]
        for seed, part in enumerate(parts):
            fixed.add(part.clone(), sum_row(seed))
        stored = fixed.take_stored()
        assert stored is out and fixed.empty
        assert torch.equal(dense(stored), total(GradientSum(dtype), parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_sum_over_ranks_is_written_over_the_sum(dtype: torch.dtype) -> None:
    out, plain = zeros(torch.Size((16, 300)), dtype, torch.device("cpu")), GradientSum(dtype)
    fixed = GradientSum(dtype, out)
    value, other = grads(2)
    fixed.add(other, sum_row(0))
    for accumulator in (fixed, plain):
        accumulator.replace(value.clone(), sum_row(1))
    assert torch.equal(dense(fixed.stored), dense(plain.stored)) and fixed.take_stored() is out
    # A view of the sum itself, and a gradient of more bits than the buffer has.
    fixed.add(other, sum_row(0))
    sum_itself = dense(fixed.stored)
    before = sum_itself.clone()
    fixed.replace(sum_itself, sum_row(1))
    alone = GradientSum(torch.float32, zeros(torch.Size((16, 300)), torch.bfloat16, torch.device("cpu")))
    alone.replace(value, 0)
    assert torch.equal(alone.take(), value)
    if dtype != torch.int8:
        assert torch.equal(fixed.take(), before)
