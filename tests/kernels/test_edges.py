"""Every operation by Triton's kernels on matrices without rows, of one row, of one column and of no multiple of a tile.

On a GPU, and in the interpreter, which says as much as it can of a kernel without one. What it cannot say:

- products of bfloat16 or FP8, whose bits it multiplies as integers: float32 here, `test_agreement.py` on a GPU;
- casts to bfloat16 and e4m3, which it makes otherwise: `tiles.to_float` and `float8_bits` spell them out there alone;
- subnormal numbers of bfloat16, which it reads wrongly: `test_agreement.py` on a GPU;
- `F.scaled_mm`, which is no kernel of ours: the rules of its operands below, its sums on a GPU;
- registers, shared memory and instructions: `test_compiles.py` compiles every kernel for cards that are not there;
- races, since its programs run one after another: atomics are maxima of integers alone, which have no order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_pretraining.models.ops.rotary  # noqa: F401 - whose operator is called
from peft_pretraining.models.ops.linear_cross_entropy import scale_, softmax_gradient_
from qgalore import kernels
from tests.kernels import comparison
from tests.kernels.comparison import both, copied, each, same

GROUP, BLOCK = 64, 256
SHAPES = [(0, 1), (0, 17), (1, 1), (1, 2), (3, 1), (3, 17), (65, 67)]
Shape = tuple[int, int]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return comparison.normal(*shape, seed=seed).to(torch.get_default_device())


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return comparison.whole_numbers(*shape, seed=seed).to(torch.get_default_device())


def step_row(step_size: float = 1.0, seed: int = 0) -> Tensor:
    return comparison.step_row(step_size, seed=seed).to(torch.get_default_device())


@pytest.fixture
def here(kernel_device: torch.device) -> Iterator[None]:
    """Let new tensors be on the device of the kernels."""
    with kernel_device:
        yield


def matrix(shape: Shape, bits: int) -> kernels.QuantizedMatrix:
    return kernels.QuantizedMatrix(*kernels.quantize(normal(*shape), bits, GROUP), shape[1], bits, GROUP)


def floats(*factors: kernels.Fp8Matrix) -> tuple[Tensor, ...]:
    """Codes have no equality of their own."""
    return tuple(tensor.float() for factor in factors for tensor in factor)


def update(shape: Shape, bits: int, side: str) -> tuple[Tensor, ...]:
    """A weight after an update with a direction of rank 2, or of full rank."""
    (rows, columns), stored = shape, copied(matrix(shape, bits)[:3])
    left, right = (
        whole_numbers(2, size, seed=1) if side == name else None
        for name, size in zip(("left", "right"), shape, strict=True)
    )
    sizes = (2 if left is not None else rows, 2 if right is not None else columns)
    row = step_row(step_size=0.125, seed=3)
    kernels.update_quantized_(
        [kernels.QuantizedUpdate(*stored, whole_numbers(*sizes, seed=2), left, right, columns, bits, GROUP, row)]
    )
    return stored


def float_update(shape: Shape) -> Tensor:
    weight = normal(*shape).bfloat16()
    kernels.update_float_([kernels.FloatUpdate(weight, normal(*shape, seed=1), None, None, step_row(0.125, seed=3))])
    return weight


def momentum(shape: Shape) -> tuple[Tensor, ...]:
    state = torch.zeros(shape, dtype=torch.uint8), torch.zeros(-(-normal(*shape).numel() // BLOCK))
    step = kernels.AdamStep(normal(*shape), *state, None, None, step_row(), (0.9, 0.99), 1e-8)
    return (*kernels.momentum_steps([step], BLOCK), *state)


def blocks(shape: Shape) -> tuple[Tensor, ...]:
    codes, absmax = torch.zeros(shape, dtype=torch.uint8), torch.zeros(-(-normal(*shape).numel() // BLOCK))
    kernels.quantize_blocks_(codes, absmax, normal(*shape), True, BLOCK)
    return codes, absmax, kernels.dequantize_blocks(codes, absmax, True, BLOCK)


def rotated(shape: Shape) -> tuple[Tensor, ...]:
    rows, columns = shape
    heads = normal(1, rows, 3, 2 * columns), normal(1, rows, 1, 2 * columns)
    turned: tuple[Tensor, ...] = torch.ops.peft_pretraining.rotate(*heads, normal(*shape), normal(*shape), False)
    return turned


def scaled(shape: Shape) -> Tensor:
    values = normal(*shape)
    scale_(values, torch.tensor(1 / 61_234))
    return values


EXACT: dict[str, Callable[[Shape], object]] = {
    "quantize": lambda shape: kernels.quantize(normal(*shape), 8, GROUP, step_row(seed=3)),
    "quantize to 4 bits": lambda shape: kernels.quantize(normal(*shape), 4, GROUP, step_row(seed=3)),
    "dequantize": lambda shape: kernels.dequantize([matrix(shape, 8)], torch.float32)[0],
    "dequantize 4 bits": lambda shape: kernels.dequantize([matrix(shape, 4)], torch.float32)[0],
    "update": lambda shape: update(shape, 8, "none"),
    "update projected from the left": lambda shape: update(shape, 8, "left"),
    "update projected from the right": lambda shape: update(shape, 4, "right"),
    "update of floats": float_update,
    "momentum": momentum,
    "blocks": blocks,
    "rotate": rotated,
    "scale": scaled,
    "FP8 rows": lambda shape: floats(kernels.fp8_rows([normal(*shape)], [shape[1]])),
    "FP8 rows in parts": lambda shape: floats(
        kernels.fp8_rows([normal(*shape), normal(*shape, seed=1)], [shape[1]] * 2, [normal(shape[1]).abs()] * 2)
    ),
    "FP8 columns": lambda shape: floats(kernels.fp8_columns(normal(*shape), shape[1])),
    "FP8 weight": lambda shape: floats(kernels.fp8_weight(matrix(shape, 8))),
    "FP8 weight in 4 bits": lambda shape: floats(kernels.fp8_weight(matrix(shape, 4))),
    "FP8 float weight": lambda shape: floats(kernels.fp8_weight(normal(*shape))),
    "FP8 turned weight": lambda shape: floats(kernels.fp8_turned_weights([matrix(shape, 8)])[0]),
}  # fmt: skip


@pytest.fixture
def unwritten_memory_shows(here: None) -> Iterator[None]:
    """Let new tensors hold NaN, and the largest numbers, until something is written."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@each("shape", SHAPES)
@pytest.mark.parametrize("operation", EXACT)
@pytest.mark.usefixtures("unwritten_memory_shows")
def test_the_same_bits_at_the_edges(operation: str, shape: Shape) -> None:
    expected, found = both(lambda: EXACT[operation](shape))
    assert same(expected, found)


def softmax(shape: Shape) -> tuple[Tensor, ...]:
    logits, losses = torch.zeros(shape[0], 192), torch.zeros(shape[0])
    logits[:, : shape[1]] = normal(*shape)
    softmax_gradient_(logits, shape[1], torch.zeros(shape[0], dtype=torch.int64), -100, losses, True)
    return logits[:, : shape[1]], losses


def norm(shape: Shape) -> tuple[Tensor, ...]:
    norms, skip = torch.zeros(2), torch.zeros((), dtype=torch.bool)
    kernels.check_gradients_([normal(*shape)], norms, [1], skip)
    return norms, skip.float()


def adam(shape: Shape) -> tuple[Tensor, ...]:
    state = normal(*shape), normal(*shape).square()
    step = kernels.AdamStep(normal(*shape), state[0], None, state[1], None, step_row(), (0.9, 0.99), 1e-8)
    return (*kernels.adam_steps([step], BLOCK), *state)


def int8_products(shape: Shape) -> tuple[Tensor, ...]:
    rows, columns = shape
    weight = kernels.quantize(normal(5, columns), 8, -(-columns // 8) * 8)
    forward = kernels.int8_linear(normal(*shape), *weight, 5)
    return forward, kernels.int8_linear_backward(normal(rows, 5), *weight, columns)


SUMS: dict[str, Callable[[Shape], tuple[Tensor, ...]]] = {
    "softmax": softmax, "norm": norm, "Adam": adam, "INT8 products": int8_products,
}  # fmt: skip


@each("shape", SHAPES)
@pytest.mark.parametrize("operation", SUMS)
@pytest.mark.usefixtures("unwritten_memory_shows")
def test_sums_in_another_order_at_the_edges(operation: str, shape: Shape) -> None:
    expected, found = both(lambda: SUMS[operation](shape))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each("shape", [shape for shape in SHAPES if shape[0]])
@pytest.mark.parametrize("segments", [None, (1, 2)])
@pytest.mark.usefixtures("here")
def test_orthogonalized_at_the_edges(
    shape: Shape, segments: tuple[int, ...] | None, kernel_device: torch.device
) -> None:
    steps = [(1.5, -0.5, 0.0)] * 3
    (expected,), (found,) = both(lambda: tuple(kernels.orthogonalize([normal(*shape)], steps, segments)))
    # A GPU's tensor cores round float32 to TF32, 10 bits.
    tolerances = (1e-4, 1e-5) if kernel_device.type == "cpu" else (0.02, 0.02)
    torch.testing.assert_close(expected, found, rtol=tolerances[0], atol=tolerances[1])


# ---- long rows, and the library's product


@each("factor", (False, True))
@each("columns", [16385, 32000, 50257])
@pytest.mark.usefixtures("here")
def test_rows_as_long_as_a_vocabulary(columns: int, factor: bool) -> None:
    """The largest magnitude of each is in another block of columns."""
    x = torch.full((3, columns + 5), float("nan"))
    x[:, :columns] = normal(3, columns)
    x[torch.arange(3), torch.tensor([0, columns // 2, columns - 1])] = 9.0
    factors = [normal(columns, seed=1).abs() + 0.5] if factor else None
    expected, found = both(lambda: floats(kernels.fp8_rows([x], [columns], factors)))
    assert same(expected, found)
    codes, _ = found
    assert codes.shape == (3, kernels.fp8_width(columns)) and (codes.abs().amax(1) == 448).all()


@each("stored", [0, 5, 11, 40])
@each("tile", [(2, 16, 1, True), (1, 32, 1, False), (4, 16, 2, False, 64), (8, 128, 4, True)])
def test_any_tile_of_rows_gives_the_same_bits(
    tile: tuple[Any, ...], stored: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two parts, with so many columns of no numbers behind them, which may be read together with the last ones."""
    fp8_matmul = pytest.importorskip("qgalore.kernels.triton.fp8_matmul", reason="Triton is not installed")
    monkeypatch.setattr(fp8_matmul, "rows_tile", lambda columns: fp8_matmul.RowsTile(*tile))
    columns = [37, 48]
    parts = [
        torch.nn.functional.pad(normal(6, count, seed=count), (0, stored), value=float("nan")) for count in columns
    ]
    factors = [normal(count + stored, seed=1).abs() for count in columns]
    given = [part.to(kernel_device) for part in parts], columns, [factor.to(kernel_device) for factor in factors]
    for count, scaled in itertools.product((1, 2), (False, True)):
        some = given[0][:count], columns[:count], given[2][:count] if scaled else None
        expected, found = both(lambda: floats(kernels.fp8_rows(*some)))  # noqa: B023
        assert same(expected, found)
        assert found[0][:, 37:48].count_nonzero() == 0 and found[0].isfinite().all()


@each("shape", [(1, 17), (17, 1), (1, 1), (0, 1), (2, 0), (2, 17)])
@pytest.mark.usefixtures("here")
def test_factors_with_a_side_of_one_are_left_to_the_reference(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton masks all lanes of such a side but one, and codes that ptxas made of them were no zeros."""
    fp8_matmul = pytest.importorskip("qgalore.kernels.triton.fp8_matmul", reason="Triton is not installed")
    chosen: list[str] = []
    names = ("fp8_rows", "fp8_columns", "fp8_weight", "fp8_turned_weights")
    for name in names:
        monkeypatch.setattr(fp8_matmul, name, lambda *_, name=name: chosen.append(name))
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    x, other = normal(*shape), normal(5, shape[1])
    kernels.fp8_rows([x, x], [shape[1]] * 2)
    kernels.fp8_columns(x, shape[1])
    kernels.fp8_weight(x)
    kernels.fp8_turned_weights([other, x])
    assert chosen == ([] if 1 in shape or not shape[1] else list(names))


@each("bits", (8, 4))
@each("shape", [(16, 64), (9, 85)])
@each("tile", [(16, 16, 1, 1), (8, 64, 3, 2), (4, 32, 2, 1)])
def test_any_tile_of_a_weight_gives_the_same_bits(
    tile: tuple[int, int, int, int], shape: Shape, bits: int, kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Blocks that are a group, a part of one, or several, and end where the weight does or beyond."""
    fp8_matmul = pytest.importorskip("qgalore.kernels.triton.fp8_matmul", reason="Triton is not installed")
    for name in ("WEIGHT", "TURNED_WEIGHT"):
        monkeypatch.setattr(fp8_matmul, name, {99: fp8_matmul.WeightTile(*tile)})
    monkeypatch.setattr(fp8_matmul, "_LEAST_BLOCK", 16)
    for group in (32, 40):
        made = kernels.quantize(normal(*shape).to(kernel_device), bits, group)
        weight = kernels.QuantizedMatrix(*made, shape[1], bits, group)
        expected, found = both(lambda: floats(kernels.fp8_weight(weight), kernels.fp8_turned_weights([weight])[0]))  # noqa: B023
        assert same(expected, found) and same(found[0].T, found[2])


@each("tiles", [((16, 16, 1), (32, 8, 1)), ((64, 32, 2), (16, 64, 4))])
@each("stored", [0, 3, 30])
def test_any_tile_of_columns_gives_the_same_bits(
    tiles: tuple[tuple[int, int, int], ...], stored: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_matmul = pytest.importorskip("qgalore.kernels.triton.fp8_matmul", reason="Triton is not installed")
    monkeypatch.setattr(fp8_matmul, "COLUMN_MAXIMA", tiles[0])
    monkeypatch.setattr(fp8_matmul, "COLUMNS", tiles[1])
    x = torch.nn.functional.pad(normal(45, 37), (0, stored), value=float("nan")).to(kernel_device)
    expected, found = both(lambda: floats(kernels.fp8_columns(x, 37)))
    assert same(expected, found) and found[0].isfinite().all() and found[1][37:].count_nonzero() == 0


def test_the_library_multiplies_what_the_reference_does(kernel_device: torch.device) -> None:
    """Operands, scales and their order, as `F.scaled_mm` of PyTorch's CPU has them."""
    from qgalore.kernels.triton import fp8_matmul

    x, weight = normal(9, 85) * torch.logspace(-3, 3, 9)[:, None], normal(21, 85) * torch.logspace(-2, 2, 21)[:, None]
    factors = kernels.fp8_rows([x.to(kernel_device)], [85]), kernels.fp8_weight(weight.to(kernel_device))
    expected = kernels.fp8_product(*factors, 32, torch.float32)
    for exact in (False, True):
        found = fp8_matmul.by_library(*factors, exact)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2.0**-7, atol=1e-6)


@each("tokens", (0, 1, 9))
def test_operands_keep_the_rules_of_the_library(tokens: int, kernel_device: torch.device) -> None:
    """Those that PyTorch checks on its meta device, as on a GPU: multiples of 16 and one order of each factor."""
    from qgalore.kernels.triton import fp8_matmul

    rows, weight = kernels.fp8_rows([normal(tokens, 85)], [85]), kernels.fp8_weight(normal(21, 85))
    turned, (scale,) = kernels.fp8_turned_weights([normal(21, 85)])
    grads = kernels.fp8_rows([normal(tokens, 21)], [21], [scale])
    of_tokens = kernels.fp8_columns(normal(tokens, 21), 21), kernels.fp8_columns(normal(tokens, 85), 85)
    for pair in ((rows, weight), (grads, turned), of_tokens):
        a, b = (kernels.Fp8Matrix(*(tensor.to("meta") for tensor in factor)) for factor in pair)
        assert fp8_matmul.by_library(a, b, True).shape == (len(a.codes), len(b.codes))
    with pytest.raises(RuntimeError, match="divisible by 16"):
        narrow = kernels.Fp8Matrix(rows.codes[:, :24].to("meta"), rows.scale.to("meta"))
        fp8_matmul.by_library(narrow, narrow, True)
