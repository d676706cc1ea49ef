"""Adam's step with one second moment a row: the kernel against its reference, and rows against what is beside them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update.moments import BLOCK_SIZE
from tests.kernels.comparison import OPERAND_TYPES, both, each, normal, same, step_row

BETAS = (0.9, 0.99)
Moments = tuple[Tensor, Tensor | None, Tensor]

# A ragged width of 1B's MLP, one of whole blocks, one as wide as GPT-2's vocabulary, one column, no power of two.
SHAPES = {"ragged": (2, 5461), "blocks": (9, 768), "widest": (1, 50257), "column": (300, 1), "narrow": (70, 24)}


def moments_of(shape: tuple[int, int], bits: int, device: torch.device) -> Moments:
    """A momentum, its absmax at 8 bits, and second moments of rows, as they are after some updates."""
    second = normal(shape[0], seed=9).square().to(device)
    momentum = normal(*shape, seed=8).to(device)
    if bits == 32:
        return momentum, None, second
    codes, absmax = torch.empty_like(momentum, dtype=torch.uint8), second.new_empty(-(-momentum.numel() // BLOCK_SIZE))
    kernels.quantize_blocks_(codes, absmax, momentum, True, BLOCK_SIZE)
    return codes, absmax, second


def step_of(
    grad: Tensor, moments: Moments, factor: float | None = None, dtype: torch.dtype = torch.float32
) -> kernels.AdamStep:
    """A third step, of these moments themselves."""
    momentum, absmax, second = moments
    scale = None if factor is None else torch.tensor(factor, device=grad.device)
    row = step_row(step=3, betas=BETAS, device=grad.device)
    return kernels.AdamStep(grad, momentum, absmax, second, None, row, BETAS, 1e-8, scale, dtype)


def copy_of(moments: Moments) -> Moments:
    momentum, absmax, second = moments
    return momentum.clone(), None if absmax is None else absmax.clone(), second.clone()


def agree(grads: Sequence[Tensor], bits: int, factor: float | None, dtype: torch.dtype, flag: Tensor | None) -> None:
    """Check that both backends give the same momenta to the bit, and the same in all else but for its last bits.

    Where the flag is true, that the moments stay.
    """
    before = [moments_of((len(grad), grad.shape[1]), bits, grad.device) for grad in grads]

    def run() -> tuple[list[Tensor], list[Moments]]:
        moved = [copy_of(each) for each in before]
        steps = [step_of(grad, each, factor, dtype) for grad, each in zip(grads, moved, strict=True)]
        return kernels.row_adam_steps(steps, BLOCK_SIZE, flag), moved

    (expected, moved), (found, moved_too) = both(run)
    for old, one, other in zip(before, moved, moved_too, strict=True):
        of_momentum = slice(0, 2 if bits == 8 else 1)
        assert same(one[of_momentum], other[of_momentum])
        assert torch.allclose(one[2], other[2], rtol=2e-6, atol=0)
        assert torch.equal(other[2], old[2]) == same(other[of_momentum], old[of_momentum]) == bool(flag)
    for grad, one, other in zip(grads, expected, found, strict=True):
        assert other.shape == grad.shape and one.dtype == other.dtype == dtype
        exactness = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert flag or torch.allclose(one.float(), other.float(), rtol=exactness, atol=0)


@each("skip", (None, False, True))
@each("bits", (8, 32))
@each("shape", SHAPES)
def test_a_step(shape: str, bits: int, skip: bool | None, kernel_device: torch.device) -> None:
    flag = None if skip is None else torch.tensor(skip, device=kernel_device)
    agree([normal(*SHAPES[shape]).to(kernel_device)], bits, 0.3, torch.float32, flag)


@each("dtype", (torch.float32, torch.bfloat16))
@each("of_gradient", OPERAND_TYPES)
def test_dtypes_of_gradient_and_direction(
    of_gradient: torch.dtype, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    shapes = [(3, 768), (2, 2063), (40, 1), (70, 24)] + [(5, 20)] * 9
    grads = [normal(*shape, seed=10 + i).to(kernel_device, of_gradient) for i, shape in enumerate(shapes)]
    given = [grad.clone() for grad in grads]
    agree(grads, 8, None, dtype, torch.tensor(False, device=kernel_device))
    assert all(torch.equal(grad, before) for grad, before in zip(grads, given, strict=True)), "a gradient has changed"


@each("columns", (2063, 768, 24))
def test_a_row_is_what_it_is_alone(columns: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: with other rows of its matrix, beside other matrices, and from another address."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    grad, moments = normal(7, columns).to(kernel_device), moments_of((7, columns), 32, kernel_device)
    shifted = torch.empty(4 * columns + 1, device=kernel_device)[1:].view(4, columns).copy_(grad[3:])

    def step(grad: Tensor, rows: slice) -> kernels.AdamStep:
        return step_of(grad, (moments[0][rows].clone(), None, moments[2][rows].clone()))

    whole = step(grad, slice(0, 7))
    other = step_of(normal(5, columns + 16, seed=1).to(kernel_device), moments_of((5, columns + 16), 32, kernel_device))
    parts = [step(grad[3:], slice(3, 7)), step(shifted, slice(3, 7)), step(grad[3:4], slice(3, 4))]
    expected = kernels.row_adam_steps([whole], BLOCK_SIZE)[0][3:]
    found = kernels.row_adam_steps([other, *parts], BLOCK_SIZE)[1:]
    assert whole.exp_avg_sq is not None
    for part, direction in zip(parts, found, strict=True):
        assert torch.equal(direction, expected[: len(direction)])
        assert part.exp_avg_sq is not None
        assert torch.equal(part.exp_avg_sq, whole.exp_avg_sq[3 : 3 + len(direction)])


def test_launches(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for a chunk of rows, or for some small matrices of one kind: the momenta, then all that makes directions."""
    adam, row_adam = (
        pytest.importorskip(f"qgalore.kernels.triton.{name}", reason="Triton is not installed")
        for name in ("adam", "row_adam")
    )
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    launched: list[str] = []
    for file, name in ((adam, "_momentum_kernel"), (row_adam, "_row_adam_kernel")):
        kernel = getattr(file, name)

        class Counted:
            def __getitem__(self, grid: object, kernel: object = kernel, name: str = name) -> object:
                launched.append(name)
                return kernel[grid]  # type: ignore[index]

        monkeypatch.setattr(file, name, Counted())
    for count in (1, 3):
        grads = [normal(20, 256, seed=i).to(kernel_device) for i in range(count)]
        steps = [step_of(grad, moments_of((20, 256), 8, kernel_device), 0.5) for grad in grads]
        launched.clear()
        kernels.row_adam_steps(steps, BLOCK_SIZE, torch.tensor(False, device=kernel_device))
        assert launched == ["_momentum_kernel", "_row_adam_kernel"]


def test_a_direction_takes_the_place_of_its_momentum(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a chunk of an embedding takes four bytes a value, as memory is planned, and the state keeps its momentum."""
    row_adam = pytest.importorskip("qgalore.kernels.triton.row_adam", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    made: list[Tensor] = []
    moves = row_adam.momentum_steps
    monkeypatch.setattr(row_adam, "momentum_steps", lambda *given: made.extend(moves(*given)) or list(made))
    moments = moments_of((4, 24), 32, kernel_device)
    found = kernels.row_adam_steps([step_of(normal(4, 24).to(kernel_device), moments)], BLOCK_SIZE)
    assert found[0].data_ptr() == made[0].data_ptr() != moments[0].data_ptr()


def test_a_row_of_zeros(kernel_device: torch.device) -> None:
    """A token that no text has had yet stays where it is."""
    grad = normal(3, 40).to(kernel_device)
    grad[1] = 0

    def run() -> Tensor:
        moments = torch.zeros_like(grad), None, torch.zeros(3, device=kernel_device)
        return kernels.row_adam_steps([step_of(grad, moments)], BLOCK_SIZE)[0]

    for found in both(run):
        assert found.isfinite().all() and not found[1].any() and found[0].all()


def test_what_does_not_fit_is_refused() -> None:
    grad, (momentum, _, second) = normal(3, 4), moments_of((3, 4), 32, torch.device("cpu"))
    for wrong in (step_of(grad, (momentum, None, second[:2])), step_of(grad, (momentum, None, second))):
        wrong = wrong if len(wrong.exp_avg_sq) < 3 else wrong._replace(exp_avg_sq=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"exp_avg_sq must be \(3,\), one number a row, not (\(2,\)|None)"):
            kernels.row_adam_steps([wrong], BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"grad must be a matrix, not of shape \(3,\)"):
        kernels.row_adam_steps([step_of(second, (second, None, second))], BLOCK_SIZE)
