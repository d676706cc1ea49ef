"""Every Triton kernel against its plain PyTorch reference, through the door: bit for bit where a matrix is stored."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update import moments
from qgalore.update.newton_schulz import METHODS
from tests.kernels.comparison import (
    OPERAND_TYPES,
    WIDE_TILES,
    adam_step,
    agreed,
    both,
    copied,
    dequantize,
    each,
    normal,
    quantize,
    same,
    step_row,
    update_float_,
    updated,
    use_tiles,
    whole_numbers,
)

FLOATS = (torch.float32, torch.bfloat16, *([torch.float16] if torch.cuda.is_available() else []))
"""In the interpreter `test_float16_operands` has the rest."""
# Rows, columns, group: whole groups, a ragged last group, groups that are no power of two, odd columns, one column.
SHAPES = [(5, 512, 256), (3, 1376, 256), (9, 85, 64), (4, 301, 256), (2, 97, 40), (3, 1, 128)]
GROUP = 256
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "one_signed": lambda x: x.abs() + 3,
    "huge": lambda x: x * 1e37,
    "tiny": lambda x: x * 1e-37,
    "constant": lambda x: torch.full_like(x, -2.5),
    "mixed": lambda x: (x**7).bfloat16(),
}
Shape = tuple[int, int, int]


def stored(
    rows: int, columns: int, bits: int, group: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.quantize(normal(rows, columns, seed=seed).to(device), bits, group)


# ---- both sides


def operations(side: str) -> dict[str, dict[str, inspect.Signature]]:
    """The operations of each file of a backend, and their arguments."""
    folder = Path(str(kernels.__file__)).parent / side
    files = {path.stem: import_module(f"qgalore.kernels.{side}.{path.stem}") for path in folder.glob("[!_]*.py")}
    helpers = {"tiles", "tile_access", "matrix_groups", "random_bits", "rows"}
    return {
        stem: {name: inspect.signature(getattr(file, name)) for name in file.__all__}
        for stem, file in files.items() if stem not in helpers
    }  # fmt: skip


def test_backends_have_the_same_files_with_the_same_operations() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    reference, triton = operations("reference"), operations("triton")
    assert reference == triton and all(reference.values())
    assert {name for names in reference.values() for name in names} <= set(kernels.__all__)


def test_a_cpu_runs_the_reference() -> None:
    assert not kernels.use_triton(torch.device("cpu"))
    assert not kernels.reads_rows_on_device(torch.device("cpu"), GROUP)


@pytest.mark.parametrize(
    ("group_size", "expected"), [(256, True), (40, True), (12, False), (5464, True), (13824, True), (16392, False)]
)
def test_only_groups_that_fit_a_tile_read_rows_on_the_device(
    group_size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    assert kernels.reads_rows_on_device(torch.device("cpu"), group_size) == expected


# ---- group quantization


@each("seed", (None, 0, 0x299F31D0A4093822, (1 << 64) - 1))
@each("bits", (8, 4))
@each("kind", KINDS)
@each("shape", SHAPES)
def test_quantize(shape: Shape, kind: str, bits: int, seed: int | None, kernel_device: torch.device) -> None:
    x = KINDS[kind](normal(*shape[:2]).to(kernel_device))
    agreed(lambda: quantize(x, bits, shape[2], seed))


def test_quantize_strided(kernel_device: torch.device) -> None:
    agreed(lambda: quantize(normal(300, 7).to(kernel_device).T, 8, GROUP, 5))
    agreed(lambda: quantize(normal(7, 600).to(kernel_device)[:, ::2], 4, GROUP, 5))


@each("bits", (8, 4))
def test_rows_of_a_matrix_are_quantized_as_in_the_whole(bits: int, kernel_device: torch.device) -> None:
    x, row = normal(9, 600).to(kernel_device), kernels.StepScalars(7, -1.0, 1.0).row().to(kernel_device)
    whole = agreed(lambda: kernels.quantize(x, bits, GROUP, row))
    part = agreed(lambda: kernels.quantize(x[4:], bits, GROUP, row, 4))
    assert same(tuple(tensor[4:] for tensor in whole), part)
    assert not same(part, kernels.quantize(x[4:], bits, GROUP, row)), "of rows that begin at 0"


@each("dtype", FLOATS)
@each("bits", (8, 4))
@each("shape", SHAPES)
def test_dequantize(shape: Shape, bits: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    rows, columns, group = shape
    weight = stored(rows, columns, bits, group, kernel_device)
    agreed(lambda: dequantize(*weight, columns, bits, group, dtype))


def test_groups_that_no_kernel_takes_are_dequantized_beside_others(kernel_device: torch.device) -> None:
    sizes = [(256, 8), (12, 8), (64, 4), (13, 4)]
    matrices = [
        kernels.QuantizedMatrix(*stored(5, 300, bits, group, kernel_device, seed=group), 300, bits, group)
        for group, bits in sizes
    ]
    found = agreed(lambda: tuple(kernels.dequantize(matrices, torch.float32)))
    for value, (group, bits) in zip(found, sizes, strict=True):
        assert (value - normal(5, 300, seed=group).to(kernel_device)).abs().max() < (0.02 if bits == 8 else 0.35)


# ---- updates


@each("seed", (None, 7 << 40))
@each("dtype", FLOATS)
@each("bits", (8, 4))
@each("shape", SHAPES)
def test_add_to_quantized(
    shape: Shape, bits: int, dtype: torch.dtype, seed: int | None, kernel_device: torch.device
) -> None:
    rows, columns, group = shape
    start = stored(rows, columns, bits, group, kernel_device)
    add = normal(rows, columns, seed=1).to(kernel_device, dtype)
    agreed(lambda: updated(start, add, None, None, columns, bits, group, 0.01, 0.99, seed))


def test_float16_operands(kernel_device: torch.device) -> None:
    """One small case of each kernel that reads or writes activations, gradients or directions."""
    half, start = torch.float16, stored(5, 85, 8, 64, kernel_device)
    agreed(lambda: dequantize(*start, 85, 8, 64, half))
    agreed(lambda: updated(start, normal(5, 85).to(kernel_device, half), None, None, 85, 8, 64, 0.01, 0.99, 7))
    left, direction = (whole_numbers(3, n, seed=n).to(kernel_device, half) for n in (5, 85))
    agreed(lambda: updated(start, direction, left, None, 85, 8, 64, 0.01, 0.99, 7))
    grads = [normal(40, 30).to(kernel_device, half), torch.full((3, 3), float("inf"), dtype=half, device=kernel_device)]
    for grad in grads:
        agreed(lambda: checked(grad))  # noqa: B023
    weight = stored(8, 16, 8, 16, kernel_device)
    x = normal(3, 16).to(kernel_device, half)
    assert agreed(lambda: kernels.int8_linear(x, *weight, 8)).dtype == half
    exact = whole_numbers(3, 8, seed=2).to(kernel_device, half)
    whole = (weight[0], torch.ones_like(weight[1]), torch.full_like(weight[2], -128))
    assert agreed(lambda: kernels.int8_linear_backward(exact, *whole, 16)).dtype == half
    codes, absmax = torch.empty(2, 300, dtype=torch.uint8, device=kernel_device), torch.empty(3, device=kernel_device)
    kernels.quantize_blocks_(codes, absmax, normal(2, 300).to(kernel_device), True, 256)
    assert agreed(lambda: kernels.dequantize_blocks(codes, absmax, True, 256, half)).dtype == half


def checked(grad: Tensor) -> tuple[Tensor, Tensor]:
    """What `check_gradients_` finds; the norm rounded to what does not depend on the order of the sum."""
    norms, skip = torch.zeros(1, device=grad.device), torch.zeros((), dtype=torch.bool, device=grad.device)
    kernels.check_gradients_([grad], norms, [0], skip)
    return norms.bfloat16(), skip


# Rows of real matrices, each one group, as products in INT8 want them: ragged, and up to the longest.
@each("seed", (None, 11))
@each("columns", (2048, 2736, 4096, 5461, 11008, 13824))
def test_groups_of_a_whole_row(columns: int, seed: int | None, kernel_device: torch.device) -> None:
    group = -(-columns // 8) * 8
    x, add = (normal(2, columns, seed=number).to(kernel_device) for number in (0, 1))
    start = agreed(lambda: quantize(x, 8, group, seed))
    assert start[1].shape == (2, 1)
    weight = agreed(lambda: updated(start, add, None, None, columns, 8, group, 0.01, 0.99, seed))
    agreed(lambda: dequantize(*weight, columns, 8, group, torch.bfloat16))


@each("seed", (None, 11))
@each("dtype", OPERAND_TYPES)
@each("bits", (8, 4))
@each("side", ("left", "right"))
@each("shape", ((65, 300, 5), (16, 256, 64), (130, 97, 130)))
def test_low_rank_update(
    shape: Shape, side: str, bits: int, dtype: torch.dtype, seed: int | None, kernel_device: torch.device
) -> None:
    rows, columns, rank = shape
    basis = whole_numbers(rank, rows if side == "left" else columns, seed=1).to(kernel_device, dtype)
    direction = whole_numbers(*((rank, columns) if side == "left" else (rows, rank)), seed=2).to(kernel_device, dtype)
    bases = (basis, None) if side == "left" else (None, basis)
    start = stored(rows, columns, bits, 128, kernel_device)
    agreed(lambda: updated(start, direction, *bases, columns, bits, 128, 0.01, 0.99, seed))


def test_real_numbers_projected_back_are_rounded_alike_but_for_few(kernel_device: torch.device) -> None:
    """Sums in another order, so a code may differ by one, rarely."""
    dtype = OPERAND_TYPES[-1]
    direction = normal(32, 600).to(kernel_device, dtype)
    basis = (normal(32, 100, seed=1) / 10).to(kernel_device, dtype)
    start = stored(100, 600, 8, GROUP, kernel_device, seed=2)
    expected, found = both(lambda: updated(start, direction, basis, None, 600, 8, GROUP, 0.01, 1.0, 5))
    difference = (expected[0].int() - found[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(expected[1], found[1]) or torch.allclose(expected[1].float(), found[1].float(), rtol=2**-7)


@each("seed", (None, 3))
@each("dtype", (torch.float32, torch.bfloat16, torch.float16))
@each("shape", ((5, 700), (3, 33), (4000,)))
def test_float_update(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int | None, kernel_device: torch.device
) -> None:
    def run() -> object:
        weight = normal(*shape).to(kernel_device, dtype)
        update_float_(weight, normal(*shape, seed=1).to(kernel_device), None, None, 1e-3, 0.99, seed, 2)
        return weight

    agreed(run)


def test_float_update_with_bases_in_chunks_of_rows(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qgalore.kernels.reference.rows._CHUNK_ELEMENTS", 3 * 40)
    left, right, direction = (whole_numbers(4, n, seed=n).to(kernel_device) for n in (9, 40, 4))

    def run() -> object:
        weight = normal(9, 40).to(kernel_device, torch.bfloat16)
        update_float_(weight, direction, left, right, 2.0**-7, 0.99, 5, 2)
        return weight

    agreed(run)


# ---- products in INT8

# Tokens, inputs, outputs: whole tiles, ragged ones, more than one step along the sum, one token, one column.
INT8_SHAPES = [(130, 64, 136), (3, 341, 21), (17, 200, 300), (1, 5461, 3), (5, 1, 4)]


def activations(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """With a row of zeros, a huge and a tiny one, and an outlier."""
    x = normal(tokens, columns).to(device)
    x[0, -1] = 90.0
    if tokens > 4:
        # No subnormal numbers, which the interpreter reads wrongly in bfloat16.
        huge, tiny = (1e2, 1e-4) if dtype == torch.float16 else (1e30, 1e-37)
        x[1], x[2], x[3] = 0.0, x[2] * huge, x[3].sign() * tiny
    return x.to(dtype)


def strided(x: Tensor, wider: int) -> Tensor:
    """x as a view of something wider that holds NaN elsewhere, with its columns far apart."""
    held = torch.full((x.shape[1] + wider, x.shape[0] + 3), float("nan"), dtype=x.dtype, device=x.device).T
    held[: x.shape[0], : x.shape[1]] = x
    return held[: x.shape[0]]


@each("dtype", FLOATS)
@each("shape", INT8_SHAPES)
def test_int8_linear(shape: Shape, dtype: torch.dtype, kernel_device: torch.device) -> None:
    tokens, inputs, outputs = shape
    weight = stored(outputs, inputs, 8, -(-inputs // 8) * 8, kernel_device, seed=1)
    x = activations(tokens, inputs, dtype, kernel_device)
    for width in (outputs + 11, outputs):
        found = agreed(lambda: kernels.int8_linear(x, *weight, width))  # noqa: B023
        assert found.shape == (tokens, width) and found.dtype == dtype
        assert found[:, outputs:].count_nonzero() == 0
    assert same(agreed(lambda: kernels.int8_linear(strided(x, 2), *weight, outputs)), found)


@each("dtype", FLOATS)
@each("shape", INT8_SHAPES)
def test_int8_linear_backward(shape: Shape, dtype: torch.dtype, kernel_device: torch.device) -> None:
    tokens, inputs, outputs = shape
    weight = stored(outputs, inputs, 8, -(-inputs // 8) * 8, kernel_device, seed=1)
    # The sum of float32 numbers is exact where they are whole; offsets become so by their zero points.
    whole = (weight[0], torch.ones_like(weight[1]), weight[2].sign() * 3 - 128)
    x = activations(tokens, outputs, dtype, kernel_device)
    for width in (inputs, inputs + 11):
        expected, found = both(lambda: kernels.int8_linear_backward(strided(x, 2), *weight, width))  # noqa: B023
        assert found.shape == (tokens, width) and found[:, inputs:].count_nonzero() == 0
        # Half a unit of the last place where float32 sums in another order make it round the other way.
        offset = weight[2].float() + 128 * weight[1].float()
        magnitude = (x.float().abs() @ offset.abs()) * 1e-6 + expected.float().abs() * torch.finfo(dtype).eps
        assert ((found.float() - expected.float()).abs() <= magnitude).all()
    exact = whole_numbers(tokens, outputs, seed=2).to(kernel_device, dtype)
    agreed(lambda: kernels.int8_linear_backward(exact, *whole, inputs))


@each("product", ("int8_linear", "int8_linear_backward"))
@each("value", ("inf", "nan"))
def test_int8_products_that_are_not_finite(value: str, product: str, kernel_device: torch.device) -> None:
    weight = stored(40, 30, 8, 32, kernel_device, seed=1)
    columns, width = (30, 40) if product == "int8_linear" else (40, 30)
    x = normal(5, columns).to(kernel_device)
    x[2, 7] = float(value)
    for found in both(lambda: getattr(kernels, product)(x, *weight, width)):
        finite = found.isfinite()
        assert not finite[2].any() and finite.sum() == found.numel() - found.shape[1]


# ---- products in FP8


def same_factor(run: Callable[[], kernels.Fp8Matrix]) -> kernels.Fp8Matrix:
    """What `run` gives with Triton, which has the values and scales of the reference, if not the signs of zeros."""
    expected, found = both(run)
    assert found.codes.dtype == torch.float8_e4m3fn and same(expected.scale, found.scale)
    assert same(expected.codes.float(), found.codes.float())
    return kernels.Fp8Matrix(*found)


@each("factor", (False, True))
@each("dtype", FLOATS)
@each("shape", INT8_SHAPES)
def test_fp8_rows(shape: Shape, dtype: torch.dtype, factor: bool, kernel_device: torch.device) -> None:
    tokens, inputs, _ = shape
    x = activations(tokens, inputs, dtype, kernel_device)
    factors = [normal(inputs + 3, seed=2).abs().to(kernel_device)] if factor else None
    found = same_factor(lambda: kernels.fp8_rows([x], [inputs], factors))
    assert found.codes.shape == (tokens, kernels.fp8_width(inputs))
    far = same_factor(lambda: kernels.fp8_rows([strided(x, 2)], [inputs], factors))
    assert same(far.codes.float(), found.codes.float())


@each("factor", (False, True))
@each("columns", [(64, 40), (21, 48, 300), (512, 16, 16)])
def test_fp8_rows_in_parts(columns: tuple[int, ...], factor: bool, kernel_device: torch.device) -> None:
    parts = [normal(7, count, seed=count).to(kernel_device) * 3**index for index, count in enumerate(columns)]
    factors = [normal(count + 2, seed=1).abs().to(kernel_device) for count in columns] if factor else None
    found = same_factor(lambda: kernels.fp8_rows([strided(part, 1) for part in parts], columns, factors))
    assert found.codes.shape == (7, sum(map(kernels.fp8_width, columns)))
    assert (found.codes.float().abs().amax(dim=1) == 448).all()


@each("value", ("inf", "nan"))
def test_fp8_rows_that_are_not_finite(value: str, kernel_device: torch.device) -> None:
    x = normal(5, 30).to(kernel_device)
    x[2, 7] = float(value)
    for codes, scale in both(lambda: kernels.fp8_rows([x], [30])):
        finite = (codes.float()[:, :30] * scale[:, None]).isfinite()
        assert not finite[2].any() and finite.sum() == 4 * 30


@each("bits", (8, 4))
@each("kind", KINDS)
@each("shape", [(5, 512, 256), (70, 1376, 256), (9, 85, 64), (4, 301, 256), (3, 1, 128), (33, 300, 304), (6, 97, 40)])
def test_fp8_weight(shape: Shape, kind: str, bits: int, kernel_device: torch.device) -> None:
    rows, columns, group = shape
    x = KINDS[kind](normal(rows, columns)).to(kernel_device)
    weight = kernels.QuantizedMatrix(*kernels.quantize(x, bits, group), columns, bits, group)
    found = same_factor(lambda: kernels.fp8_weight(weight))
    assert found.codes.shape == (kernels.fp8_width(rows), kernels.fp8_width(columns))
    turned = same_factor(lambda: kernels.fp8_turned_weights([weight])[0])
    assert same(turned.codes.float(), found.codes.float().T)
    (expected,), (factor,) = both(lambda: kernels.fp8_turned_weights([weight])[1])
    assert same(expected, factor) and same(factor, found.scale)


@each("dtype", FLOATS)
@each("shape", [(70, 85), (16, 512), (9, 21)])
def test_fp8_weight_of_floats(shape: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device) -> None:
    weight = (normal(*shape) * 0.02).to(kernel_device, dtype)
    found = same_factor(lambda: kernels.fp8_weight(weight))
    assert found.codes.shape == (kernels.fp8_width(shape[0]), kernels.fp8_width(shape[1]))
    turned = same_factor(lambda: kernels.fp8_turned_weights([weight, weight])[0])
    assert same(turned.codes.float(), torch.cat([found.codes.float()] * 2).T)


@each("dtype", FLOATS)
@each("shape", INT8_SHAPES)
def test_fp8_columns(shape: Shape, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """As rows of what is turned, of which the last bits do not count."""
    tokens, inputs, _ = shape
    x = activations(tokens, inputs, dtype, kernel_device)
    found = same_factor(lambda: kernels.fp8_columns(strided(x, 2), inputs))
    assert found.codes.shape == (kernels.fp8_width(inputs), kernels.fp8_width(tokens))
    codes, scale = kernels.fp8_rows([x.T], [tokens])
    assert same(codes.float(), found.codes.float()[:inputs]) and same(scale, found.scale[:inputs])
    assert found.codes.float()[inputs:].count_nonzero() == 0 and found.scale[inputs:].count_nonzero() == 0


@each("value", ("inf", "nan"))
def test_fp8_columns_that_are_not_finite(value: str, kernel_device: torch.device) -> None:
    x = normal(40, 30).to(kernel_device)
    x[2, 7] = float(value)
    for codes, scale in both(lambda: kernels.fp8_columns(x, 30)):
        finite = (codes.float()[:30, :40] * scale[:30, None]).isfinite()
        assert not finite[7].any() and finite.sum() == 29 * 40


@each("bits", [(8, 8, 8), (8, 4, 8)])
def test_fp8_weights_of_one_input(bits: tuple[int, ...], kernel_device: torch.device) -> None:
    """One launch for those that are stored alike, each of which has rows of its own in the result."""
    rows = (70, 9, 16)
    made = [kernels.quantize(normal(m, 85, seed=m).to(kernel_device), b, 64) for m, b in zip(rows, bits, strict=True)]
    weights = [kernels.QuantizedMatrix(*each, 85, b, 64) for each, b in zip(made, bits, strict=True)]
    found = same_factor(lambda: kernels.fp8_turned_weights(weights)[0])
    assert found.codes.shape == (96, 80 + 16 + 16)
    for expected, factor in zip(*both(lambda: tuple(kernels.fp8_turned_weights(weights)[1])), strict=True):
        assert same(expected, factor)


@each("shape", [(130, 64, 136), (3, 341, 21), (17, 208, 304), (256, 1024, 512)])
def test_fp8_product(shape: Shape, kernel_device: torch.device) -> None:
    """On a GPU cuBLASLt's, which sums in another order and with fewer bits than float32 has."""
    tokens, inputs, outputs = shape
    x, weight = activations(tokens, inputs, torch.bfloat16, kernel_device), normal(outputs, inputs, seed=1)
    factors = kernels.fp8_rows([x], [inputs]), kernels.fp8_weight(weight.to(kernel_device))
    for width in (outputs, outputs + 11):
        expected, found = both(lambda: kernels.fp8_product(*factors, width, torch.bfloat16))  # noqa: B023
        assert found.shape == (tokens, width) and found[:, outputs:].count_nonzero() == 0
        size = (factors[0].codes.float().abs() @ factors[1].codes.float().abs().T)[:, :outputs]
        size = size * factors[0].scale[:, None] * factors[1].scale[:outputs]
        error = (found.double() - expected.double()).abs()[:, :outputs]
        assert (error <= size.double() * 2.0**-9 + expected.double().abs()[:, :outputs] * 2.0**-8).all()
    again = kernels.fp8_product(*factors, outputs, torch.bfloat16)
    assert torch.equal(again, kernels.fp8_product(*factors, outputs, torch.bfloat16))


# ---- moments

MOMENT_SHAPES = [(64, 128), (37, 131), (5,), (4099,)]


@each("factor", (None, 0.3))
@each("bits", (8, 32))
@each("shape", MOMENT_SHAPES)
def test_adam(shape: tuple[int, ...], bits: int, factor: float | None, kernel_device: torch.device) -> None:
    scale = None if factor is None else torch.tensor(factor, device=kernel_device)

    def run() -> object:
        state: dict[str, Tensor] = {}
        moments.init_moments(state, torch.Size(shape), bits, kernel_device)
        for step in range(1, 4):
            # Over many orders of magnitude: every part of the 8-bit map is used.
            grad = (normal(*shape, seed=step) ** 5).to(kernel_device)
            direction = adam_step(state, grad, step, (0.9, 0.99), 1e-8, factor=scale)
        return direction, *(state[key] for key in sorted(state))

    (expected, *states), (found, *found_states) = both(run)
    assert same(tuple(states), tuple(found_states))
    # Neither the kernel's square root nor PyTorch's own on a CPU is always the nearest.
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@each("factor", (None, 0.3))
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (32, torch.float32)], ids=["bits8", "bits32"])
@each("shape", MOMENT_SHAPES)
def test_momentum(
    shape: tuple[int, ...], bits: int, dtype: torch.dtype, factor: float | None, kernel_device: torch.device
) -> None:
    scale = None if factor is None else torch.tensor(factor, device=kernel_device)
    row = torch.zeros(8, dtype=torch.int32, device=kernel_device)

    def run() -> object:
        state: dict[str, Tensor] = {}
        moments.init_moments(state, torch.Size(shape), bits, kernel_device, ("exp_avg",))
        for step in range(1, 4):
            grad = (normal(*shape, seed=step) ** 5).to(kernel_device)
            momentum = state["exp_avg"], state.get("exp_avg_absmax"), None, None
            argument = kernels.AdamStep(grad, *momentum, row, (0.9, 0.99), 0.0, scale, dtype)
            two = [argument, argument._replace(exp_avg=torch.zeros_like(grad), exp_avg_absmax=None)]
            ahead, other = kernels.momentum_steps(two, 256)
        return ahead, other, *(state[key] for key in sorted(state))

    agreed(run)


def test_a_step_of_adam_needs_a_second_moment() -> None:
    step = kernels.AdamStep(torch.ones(3), torch.zeros(3), None, None, None, torch.zeros(8), (0.9, 0.99), 1e-8)
    with pytest.raises(ValueError, match="a step of Adam needs exp_avg_sq"):
        kernels.adam_steps([step], 256)


@each("skip", (None, True, False))
@each("kind", ("signed", "unsigned", "transposed"))
@each("dtype", FLOATS)
@each("shape", MOMENT_SHAPES)
def test_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, skip: bool | None, kernel_device: torch.device
) -> None:
    """Values over many orders of magnitude, zero and tiny blocks among them, whose rows may have any stride."""
    x, signed = (normal(*shape) ** 5).to(kernel_device, dtype), kind != "unsigned"
    # The interpreter does not convert denormal numbers of bfloat16.
    x.view(-1)[256:512], x.view(-1)[512:768] = 0.0, 1e-39 if dtype == torch.float32 else 1e-37
    value = {"signed": x, "unsigned": x.abs(), "transposed": x.mT.contiguous().mT if x.dim() == 2 else x}[kind]
    flag = None if skip is None else torch.tensor(skip, device=kernel_device)

    def run() -> object:
        codes = torch.full(value.shape, 9, dtype=torch.uint8, device=kernel_device)
        absmax = torch.full((-(-value.numel() // 256),), 7.0, device=kernel_device)
        kernels.quantize_blocks_(codes, absmax, value, signed, 256, flag)
        return codes, absmax, kernels.dequantize_blocks(codes, absmax, signed, 256, dtype)

    codes, absmax, _ = agreed(run)
    assert bool((codes == 9).all() and (absmax == 7).all()) == (skip is True)


@each("signed", (False, True))
def test_values_at_the_borders_of_codes(signed: bool, kernel_device: torch.device) -> None:
    """All borders, the two numbers beside each, and a few more steps of every power of two."""
    codes = torch.arange(256, dtype=torch.uint8, device=kernel_device)
    values = kernels.dequantize_blocks(codes, torch.ones(1, device=kernel_device), signed, 256)
    border = (values[:-1] + values[1:]) / 2
    beside = [border.view(torch.int32) + step for step in (-1, 0, 1)]
    powers = torch.arange(0x33000000, 0x3F800000, 0x40001, dtype=torch.int32, device=kernel_device)
    x = torch.cat([*beside, powers]).view(torch.float32)
    x = torch.cat((x, -x)) if signed else x.clamp(min=0.0)
    whole = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    whole = torch.cat((torch.ones_like(whole[:, :1]), whole), dim=1)  # so that nothing is scaled

    def run() -> tuple[Tensor, Tensor]:
        found = torch.empty_like(whole, dtype=torch.uint8), torch.empty(len(whole), device=kernel_device)
        kernels.quantize_blocks_(*found, whole, signed, 256)
        return found

    assert bool((agreed(run)[1] == 1.0).all())


SHORTER_SIDES = {"one": [(24, 40)], "three": [(70, 24), (24, 24), (24, 130)], "nine": [(40, 56)] * 9}
FP8_SIDES = SHORTER_SIDES | ({"a layer": [(512, 512)] * 4 + [(1376, 512)] * 2} if torch.cuda.is_available() else {})


NEWTON_SCHULZ = [(count, ()) for count in SHORTER_SIDES] + [("one", (1, 1, 1)), ("three", (1, 2)), ("three", (3,))]


@pytest.mark.parametrize(("count", "segments"), NEWTON_SCHULZ)
def test_newton_schulz(
    count: str, segments: tuple[int, ...], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bits of the dtype; and what a matrix becomes does not depend on its neighbours."""
    dtype = OPERAND_TYPES[-1]
    polynomials = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51), (1.875, -1.25, 0.375)]
    # Steps on one Gram matrix multiply its last bits, those of 24 bits by 100.
    tolerance = (1e-4 if segments == (3,) else 1e-5) if dtype == torch.float32 else 0.05
    matrices = [
        (normal(*shape, seed=i) * 10.0 ** (i - 2)).to(kernel_device, dtype)
        for i, shape in enumerate(SHORTER_SIDES[count])
    ]
    expected, found = both(lambda: kernels.orthogonalize(matrices, polynomials, segments or None))
    for matrix, one, other in zip(matrices, expected, found, strict=True):
        assert one.shape == other.shape == matrix.shape
        assert (one.float() - other.float()).norm() <= tolerance * one.float().norm()
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    assert torch.equal(kernels.orthogonalize(matrices[-1:], polynomials, segments or None)[0], found[-1])


IN_FP8 = [(count, tiles, norm) for count in FP8_SIDES for tiles in ("default", "wide") for norm in (False, True)]
"""Of nine matrices, which take two launches, no more than one case is tried."""


@pytest.mark.parametrize(
    ("count", "tiles", "schatten_norm"),
    [case for case in IN_FP8 if case[0] != "nine" or case[1:] == ("default", False)],
)
def test_newton_schulz_in_fp8(
    count: str, tiles: str, schatten_norm: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the last bits on a GPU, whose sums of products in FP8 have 14: what rounds the other way then differs by
    3 %. But both are as far from the result without FP8."""
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8", reason="Triton is not installed")
    if tiles != "default":
        use_tiles(monkeypatch, triton, WIDE_TILES)
    matrices = [
        (normal(*shape, seed=i) * 10.0 ** (i - 2)).to(kernel_device, OPERAND_TYPES[-1])
        for i, shape in enumerate(FP8_SIDES[count])
    ]
    polynomials = METHODS["muon4_fp8"].polynomials  # each step has its own
    run = partial(kernels.orthogonalize_fp8, polynomials=polynomials, schatten_norm=schatten_norm)
    expected, found = both(lambda: run(matrices))
    form = (1,) * len(polynomials) if schatten_norm else None
    for matrix, one, other in zip(matrices, expected, found, strict=True):
        assert one.shape == other.shape == matrix.shape and one.dtype == other.dtype == matrix.dtype
        (exact,) = kernels.orthogonalize([matrix.float()], polynomials, form)
        errors = [(x.float() - exact).norm() / exact.norm() for x in (one, other)]
        assert errors[1] < 1.5 * errors[0] < 0.4 and (one.float() - other.float()).norm() <= 0.3 * exact.norm()
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    assert torch.equal(run(matrices[-1:])[0], found[-1])


def test_the_schatten_norm_is_of_each_matrix(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all shares that the largest singular value has of |M|, and of zeros, in one group; by several tiles a row."""
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8", reason="Triton is not installed")
    monkeypatch.setattr(triton, "_SCALED", (8, 32))
    use_tiles(monkeypatch, triton, WIDE_TILES)
    flat = torch.linalg.qr(normal(49, 40))[0]
    spiked = [flat.T + share * torch.outer(normal(40), normal(49)) for share in (0.02, 0.1, 1.0)]
    matrices = [x.to(kernel_device, OPERAND_TYPES[-1]) for x in (*spiked, torch.zeros(40, 49), flat)]
    run = partial(kernels.orthogonalize_fp8, polynomials=METHODS["muon4_fp8"].polynomials, schatten_norm=True)
    expected, found = both(lambda: run(matrices))
    for one, other in zip(expected, found, strict=True):
        assert (one.float() - other.float()).norm() <= 0.1 * one.float().norm()
    assert not found[3].any() and all(x.any() for x in found[:3])
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    assert all(torch.equal(run([matrix])[0], other) for matrix, other in zip(matrices, found, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be asked to compile wrongly")
def test_newton_schulz_in_fp8_is_checked_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8", reason="Triton is not installed")
    tiles, cpu, are_whole = triton.TILES[768], torch.device("cpu"), triton.are_whole
    assert triton.fault_of_compiled(tiles, 72, cpu) == ""
    squared = triton._Group._square
    monkeypatch.setattr(triton._Group, "_square", lambda self, *how: (squared(self, *how), self._even8.zero_())[0])
    fault = triton.fault_of_compiled(tiles, 72, cpu)
    assert "is compiled to wrong values by Triton" in fault
    monkeypatch.setattr(triton, "_fault", lambda *given: fault)
    with pytest.raises(RuntimeError, match=r"compiled to wrong values by Triton .*: choose newton_schulz muon"):
        triton.orthogonalize_fp8([torch.ones(4, 8)], [(1.0, 1.0, 1.0)])
    with pytest.warns(UserWarning, match="compiled to wrong values by Triton .*: steps are made in bfloat16 instead"):
        assert not triton.runs_in_fp8(24, cpu)
    checked = [triton._checked_rows(tiles, rows) for rows in (24, 768, 1000, 4096)]
    assert checked == [392, 400, 392, 400], "as divisible, since that is compiled otherwise"
    for whole in triton.WHOLE_TILES.values():
        rows = triton._checked_rows(whole, 768)
        assert whole.whole and are_whole(whole, rows) and rows >= 3 * whole.square.columns


def test_a_graph_has_the_steps_of_the_updates_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton compiles wrongly, which is known from an update without a graph."""
    matrix_groups = pytest.importorskip("qgalore.kernels.triton.matrix_groups", reason="Triton is not installed")
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8", reason="Triton is not installed")
    gpu, capturing = torch.device("cuda", 7), [True]
    monkeypatch.setattr(triton, "_FAULTS", {})
    wrong = triton.WHOLE_TILES[768]
    monkeypatch.setattr(matrix_groups, "takes_descriptors", lambda dtype, device: True)
    monkeypatch.setattr(triton, "fault_of_compiled", lambda tiles, *_: "wrong" if tiles == wrong else "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert triton.runs_in_fp8(768, gpu), "not compared yet, which a capture cannot wait for"
    capturing[0] = False
    with pytest.warns(UserWarning, match="wrong: steps are made in bfloat16 instead"):
        assert not triton.runs_in_fp8(768, gpu)
    assert triton.runs_in_fp8(1024, gpu) and triton.runs_in_fp8(700, gpu), "by other tiles, and with masks"
    capturing[0] = True
    with pytest.warns(UserWarning, match="wrong"):
        assert [triton.runs_in_fp8(rows, gpu) for rows in (512, 768, 1024, 700)] == [False, False, True, True]


def test_newton_schulz_by_other_tiles(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are wider than high reach over the diagonal; within bfloat16 values are float16."""
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz", reason="Triton is not installed")
    # On a GPU tensor cores round float32 to TF32, so that it says no more than bfloat16.
    dtype = OPERAND_TYPES[-1]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    use_tiles(monkeypatch, triton, WIDE_TILES)
    polynomials = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51), (1.875, -1.25, 0.375)]
    matrices = [normal(*shape, seed=i).to(kernel_device, dtype) for i, shape in enumerate([(40, 70), (50, 40)])]
    expected, found = both(lambda: kernels.orthogonalize(matrices, polynomials, (1, 2)))
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        assert (one.float() - other.float()).norm() <= tolerance * one.float().norm()


def test_buffers_of_newton_schulz_are_freed_at_once(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the garbage collector, which may be minutes late: the buffers of dozens of groups waited for it."""
    triton = pytest.importorskip("qgalore.kernels.triton.newton_schulz", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    gc.collect()
    gc.disable()
    try:
        for segments in (None, (1, 1)):
            kernels.orthogonalize([normal(24, 40).to(kernel_device)], [(3.4445, -4.7750, 2.0315)] * 2, segments)
        assert not [x for x in gc.get_objects() if type(x) is triton._Group]
    finally:
        gc.enable()


def test_tables_of_codes_ignore_the_default_device(kernel_device: torch.device) -> None:
    adam = pytest.importorskip("qgalore.kernels.triton.adam", reason="Triton is not installed")
    adam._tables.cache_clear()
    with torch.device("meta"):
        tables = adam._tables(True, kernel_device)
    assert all(table.device.type == kernel_device.type for table in tables)


@each("segments", [(), (1, 2)])
def test_newton_schulz_of_zeros(segments: tuple[int, ...], kernel_device: torch.device) -> None:
    """A weight without a gradient has a momentum of zeros, and so has its direction."""
    matrices = [torch.zeros(24, 40, device=kernel_device), normal(24, 40).to(kernel_device)]
    polynomials = [(3.4445, -4.7750, 2.0315)] * 3
    for found in both(lambda: kernels.orthogonalize(matrices, polynomials, segments or None)):
        assert not found[0].any() and found[1].isfinite().all()


ROWS = {"one": [(5, 9)], "tall and wide": [(70, 24), (24, 24), (24, 1300), (3, 1)], "nine": [(72, 80)] * 9}


@each("buffer", (False, True))
@each("turned", (False, True))
@each("skip", (None, False, True))
@each("count", ROWS)
def test_normalized_rows(
    count: str, skip: bool | None, turned: bool, buffer: bool, kernel_device: torch.device
) -> None:
    """To the last bits; turned: as a tall matrix is orthogonalised; buffer: of which it is a part."""
    dtype, flag = OPERAND_TYPES[-1], None if skip is None else torch.tensor(skip, device=kernel_device)
    row = step_row(step=3, device=kernel_device)
    directions = [(normal(*shape, seed=i) * (i + 1)).to(kernel_device, dtype) for i, shape in enumerate(ROWS[count])]
    seconds = [normal(shape[0], seed=9).square().to(kernel_device) for shape in ROWS[count]]

    def run() -> tuple[list[Tensor], list[Tensor]]:
        moved = [second.clone() for second in seconds]
        laid = [x.T if turned else x for x in directions]
        held = [torch.full((x.shape[0], x.shape[1] + 16 * buffer), torch.nan).to(x) for x in laid]
        views = [wide[:, : x.shape[1]].copy_(x) for wide, x in zip(held, laid, strict=True)]
        given = [x.T if turned else x for x in views]
        parts = [
            kernels.RowNormalization(x, 0.2 + x.shape[1], v, row, 0.9, 1e-8) for x, v in zip(given, moved, strict=True)
        ]
        found = kernels.normalize_rows(parts, flag)
        assert all(bool(wide[:, x.shape[1] :].isnan().all()) for wide, x in zip(held, views, strict=True))
        return found, moved

    (expected, moved), (found, moved_too) = both(run)
    # The reference rounds the directions once more on the way.
    exactness = 1e-5 if dtype == torch.float32 else 5e-3
    for before, one, other in zip(seconds, moved, moved_too, strict=True):
        assert torch.allclose(one, other, rtol=exactness) and torch.equal(other, before) == (skip is True)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        assert skip or (one.float() - other.float()).norm() <= 2 * exactness * one.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each("segments", [(), (1, 2), (3,), "fp8", "fp8, Schatten norm"])
def test_neighbours_change_no_bits(segments: tuple[int, ...] | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole directions: an interpreter adds up in one order, but on a GPU that may depend on addresses and sizes."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    shapes = [(1024, 2731), (2736, 1024), (1024, 1024), (1500, 1024), (1024, 1029)]
    momenta = [normal(*shape, seed=i).to("cuda", torch.bfloat16) for i, shape in enumerate(shapes)]
    polynomials, row = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51), (1.875, -1.25, 0.375)], step_row(step=3)

    def directions(chosen: Sequence[Tensor]) -> list[list[Tensor]]:
        if isinstance(segments, str):
            found = kernels.orthogonalize_fp8(chosen, polynomials, schatten_norm="Schatten" in segments)
        else:
            found = kernels.orthogonalize(chosen, polynomials, segments or None)
        seconds = [torch.ones(len(x), device="cuda") for x in chosen]
        parts = [
            kernels.RowNormalization(x, 0.2, v, row.cuda(), 0.9, 1e-8) for x, v in zip(found, seconds, strict=True)
        ]
        return [[x.clone() for x in found], kernels.normalize_rows(parts), seconds]

    together = directions(momenta)
    for index, momentum in enumerate(momenta):
        for alone, among in zip(directions([momentum]), together, strict=True):
            assert torch.equal(alone[0], among[index])


def test_rows_of_zeros_are_normalized(kernel_device: torch.device) -> None:
    """A weight without a gradient has a direction of zeros, and so has a row of one that has another."""
    row, some = step_row(device=kernel_device), normal(4, 6).to(kernel_device)
    some[1] = 0

    def run() -> list[Tensor]:
        given = some.clone(), torch.zeros(3, 5, device=kernel_device)
        parts = [kernels.RowNormalization(x, 1.0, x.new_zeros(len(x)), row, 0.9, 1e-8) for x in given]
        return kernels.normalize_rows(parts)

    for found in both(run):
        assert all(x.isfinite().all() for x in found) and not found[0][1].any() and not found[1].any()


# ---- the flag that skips an update, and the check that raises it


@each("implementation", ("reference", "triton"))
@each("skip", (True, False))
@each("operation", ("quantized", "float", "momentum"))
def test_skipping(
    operation: str, skip: bool, implementation: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGALORE_KERNELS", implementation)
    flag, full = torch.tensor(skip, device=kernel_device), normal(20, 300, seed=1).to(kernel_device)
    weight, row = stored(20, 300, 8, GROUP, kernel_device), torch.zeros(8, dtype=torch.int32, device=kernel_device)
    if operation == "quantized":
        assert same(updated(weight, full, None, None, 300, 8, GROUP, 0.1, 1.0, 1, flag), weight) == skip
    elif operation == "float":
        moved = full.clone()
        update_float_(moved, full, None, None, 0.1, 1.0, 1, skip=flag)
        assert same(moved, full) == skip
    else:
        codes = torch.full_like(full, 127, dtype=torch.uint8), torch.zeros(24, device=kernel_device)
        momentum = copied(codes)
        kernels.momentum_steps([kernels.AdamStep(full, *momentum, None, None, row, (0.9, 0.99), 0.0)], 256, flag)
        assert same(momentum, codes) == skip


@each("skip", (True, False))
@each("broken", ("finite", "inf", "nan"))
def test_gradient_norms(broken: str, skip: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [normal(*shape, seed=i) for i, shape in enumerate([(3,), (300, 500), (64, 9000), (2, 3)])]
    grads += [normal(40, 30, seed=9).bfloat16(), normal(700, seed=8)] * 9
    grads = [grad.to(kernel_device) for grad in grads]
    if broken != "finite":
        grads[1].view(-1)[-1] = float(broken)

    def run(limit: int) -> tuple[Tensor, Tensor]:
        norms = torch.full((len(grads) + 2,), 7.0, device=kernel_device)
        flag = torch.tensor(skip, device=kernel_device)
        for start in range(0, len(grads), limit):
            part = slice(start, start + limit)
            kernels.check_gradients_(grads[part], norms, range(len(grads), 0, -1)[part], flag)
        return norms, flag

    (norms, flag), (found, found_flag) = both(lambda: run(99))
    assert bool(found_flag) == bool(flag) == (broken != "finite" or skip)
    assert found[0] == found[-1] == 7
    assert torch.allclose(found, norms, rtol=1e-5, equal_nan=True)
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    assert same(found.nan_to_num(), run(1)[0].nan_to_num())
