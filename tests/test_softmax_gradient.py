"""The Triton kernel of the softmax gradient against plain PyTorch, and what both must hold to."""

import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from peft_pretraining.models.ops.linear_cross_entropy import scale_, softmax_gradient_

IGNORE_INDEX = -100
# Rows, columns, width: one value, less than a block, odd sizes, a whole block, one more, several blocks, padded or not.
CASES = [(1, 1, 1), (3, 2, 64), (7, 33, 64), (9, 257, 257), (2, 8192, 8192), (3, 8193, 8256), (4, 20000, 20032)]
# Float64 and float32 sums differ in their order alone. A bfloat16 value is a float32 one rounded: two that differ by
# 1e-6 can fall on neighbours, 2^-7 apart; those of float16 are 2^-10 of a value apart, and 6e-8 at the least.
TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-5, 1e-7), torch.bfloat16: (2**-7, 1e-7)}
TOLERANCES[torch.float16] = 2**-10, 1e-7


def problem(
    rows: int, columns: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits with infinity in the padding; targets of which one in four is ignored, with the first and last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((rows, width), torch.inf, dtype=torch.float64)
    logits[:, :columns] = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[1::4] = IGNORE_INDEX
    targets[0] = columns - 1
    if rows > 2:
        targets[2] = 0
    return logits.to(dtype).to(device), targets.to(device)


def computed(
    implementation: str, logits: Tensor, columns: int, targets: Tensor, write_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """The losses and what stands in the logits afterwards, without the padding."""
    logits = logits.clone()
    losses = torch.empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
        softmax_gradient_(logits, columns, targets, IGNORE_INDEX, losses, write_gradient)
    return losses, logits[:, :columns]


@pytest.mark.parametrize(("rows", "columns", "width"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_triton_kernel_equals_reference(
    dtype: torch.dtype, rows: int, columns: int, width: int, kernel_device: torch.device
) -> None:
    rtol, atol = TOLERANCES[dtype]
    logits, targets = problem(rows, columns, width, dtype, kernel_device)
    expected_losses, expected = computed("reference", logits, columns, targets)
    losses, gradient = computed("triton", logits, columns, targets)
    # Losses are differences of logits of size 10, so their error is that of a number of this size.
    loss_error = 10 * torch.finfo(losses.dtype).eps
    torch.testing.assert_close(losses, expected_losses, rtol=loss_error, atol=loss_error)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)
    assert not gradient[targets == IGNORE_INDEX].any() and not losses[targets == IGNORE_INDEX].any()
    alone, untouched = computed("triton", logits, columns, targets, write_gradient=False)
    assert torch.equal(alone, losses) and torch.equal(untouched, logits[:, :columns])


@pytest.mark.parametrize(("rows", "columns", "width"), CASES)
def test_the_gradient_in_fp8(rows: int, columns: int, width: int, kernel_device: torch.device) -> None:
    """Codes of the gradient, with zeros at the end; of two that differ by 1e-7 the codes may be neighbours."""
    logits, targets = problem(rows, columns, width, torch.bfloat16, kernel_device)
    depth, found = -(-columns // 16) * 16, {}
    for implementation in ("reference", "triton"):
        codes = torch.full((rows, depth), 77, dtype=torch.uint8, device=kernel_device).view(torch.float8_e4m3fn)
        written, losses = logits.clone(), torch.empty(rows, device=kernel_device)
        with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
            softmax_gradient_(written, columns, targets, IGNORE_INDEX, losses, True, codes)
        values = codes.float()
        assert values[:, columns:].count_nonzero() == 0 and not values[targets == IGNORE_INDEX].any()
        # Half a step of e4m3, 2^-4 of a value or 2^-10 at least, and that of bfloat16.
        exact = written[:, :columns].float() * 448
        assert ((values[:, :columns] - exact).abs() <= exact.abs() * (2**-4 + 2**-8) + 2**-10).all()
        assert torch.equal(written[:, :columns], computed(implementation, logits, columns, targets)[1])
        found[implementation] = values
    assert (found["reference"] != found["triton"]).float().mean() < 1e-2
    assert not (found["reference"] - found["triton"]).abs().gt(found["reference"].abs() / 8 + 2**-9).any()


def test_a_gradient_that_is_not_finite_shows_in_fp8(kernel_device: torch.device) -> None:
    for implementation in ("reference", "triton"):
        logits, targets = problem(7, 33, 64, torch.bfloat16, kernel_device)
        logits[2, 3] = torch.nan
        codes = torch.empty(7, 48, dtype=torch.float8_e4m3fn, device=kernel_device)
        with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
            softmax_gradient_(logits, 33, targets, IGNORE_INDEX, torch.empty(7, device=kernel_device), True, codes)
        assert not codes.float()[2].isfinite().all() and codes.float()[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 683), (7, 2048), (129, 257)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_kernel_scales_to_the_bits_of_torch(
    dtype: torch.dtype, shape: tuple[int, int], kernel_device: torch.device
) -> None:
    """In the wider dtype, rounded once; what is not finite stays so."""
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        dtype = torch.float16  # as Triton's interpreter rounds to bfloat16 otherwise
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[-1, -1] = torch.inf
    values = values.to(dtype).to(kernel_device)
    factor = torch.tensor(1 / 61_234, dtype=torch.promote_types(dtype, torch.float32), device=kernel_device)
    expected = (values.to(factor.dtype) * factor).to(dtype)
    for implementation in ("reference", "triton"):
        found = values.clone()
        with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
            scale_(found, factor)
        assert torch.equal(found, expected), implementation


def check_values_that_are_not_finite(implementation: str, device: torch.device) -> None:
    rows, columns, width, target = 8, 8300, 8320, 5
    targets = torch.full((rows,), target, device=device)
    targets[7] = IGNORE_INDEX
    for value in (torch.nan, torch.inf, -torch.inf):
        logits, _ = problem(rows, columns, width, torch.bfloat16, device)
        for row, column in enumerate((0, target, 8191, 8192, columns - 1)):
            logits[row, column] = value
        logits[5, :columns] = value
        logits[7, 3] = value
        losses, gradient = computed(implementation, logits, columns, targets)
        assert not losses[:6].isfinite().any(), (value, losses)
        assert not gradient[:6].isfinite().all(1).any(), value
        assert losses[6].isfinite() and gradient[6].isfinite().all()
        assert losses[7] == 0 and not gradient[7].any()
    # Huge values are finite: their loss is, too.
    logits[:, :columns] = -1e38
    logits[:, 8250] = 1e38
    losses, gradient = computed(implementation, logits, columns, targets)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert (gradient[0, 8250], gradient[0, target]) == (1, -1)


def test_kernel_shows_values_that_are_not_finite(kernel_device: torch.device) -> None:
    check_values_that_are_not_finite("triton", kernel_device)


def test_reference_shows_values_that_are_not_finite(device: torch.device) -> None:
    check_values_that_are_not_finite("reference", device)


def test_reference_is_the_derivative_of_the_loss(device: torch.device) -> None:
    logits, targets = problem(9, 33, 64, torch.float64, device)
    losses, gradient = computed("reference", logits, 33, targets)
    x = logits[:, :33].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, targets, ignore_index=IGNORE_INDEX, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_kernel_reaches_beyond_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    rows, columns = 67200, 32000
    assert (rows - 2) * columns > 1 << 31
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    last, targets = problem(2, columns, columns, torch.bfloat16, logits.device)
    logits[-2:] = last
    all_targets = torch.full((rows,), IGNORE_INDEX, device="cuda")
    all_targets[-2:] = targets
    losses = torch.empty(rows, device="cuda")
    softmax_gradient_(logits, columns, all_targets, IGNORE_INDEX, losses, True)
    expected_losses, expected = computed("triton", last, columns, targets)
    assert torch.equal(losses[-2:], expected_losses) and torch.equal(logits[-2:], expected)
    assert not losses[:-2].any() and not logits[:-2].any()
