"""Every Triton kernel against its plain PyTorch reference, through the door: bit for bit where a matrix is stored.

On a GPU the checks run as they are. Without one they run in Triton's interpreter, in processes of their own, since
Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update import moments
from tests.kernels import padded_rows, several_weights
from tests.kernels.comparison import (
    adam_step,
    both,
    normal,
    operand_types,
    quantize,
    same,
    update_float_,
    update_quantized_,
    whole_numbers,
)

SEEDS = (None, 0, 0x299F31D0A4093822, (1 << 64) - 1)
# Rows, columns, group: whole groups, a ragged last group, groups that are no power of two, odd columns, one column.
SHAPES = [(5, 512, 256), (3, 1376, 256), (9, 85, 64), (4, 301, 256), (2, 97, 40), (3, 1, 128)]
GROUP = 256


def matrices(rows: int, columns: int, device: torch.device) -> Iterator[Tensor]:
    """Ordinary, one-signed, huge, tiny, constant and mixed groups."""
    x = normal(rows, columns).to(device)
    yield x
    yield x.abs() + 3
    yield x * 1e37
    yield x * 1e-37
    yield torch.full_like(x, -2.5)
    yield (x**7).bfloat16()


def check_quantize(device: torch.device) -> None:
    for rows, columns, group in SHAPES:
        for x in matrices(rows, columns, device):
            for bits in (8, 4):
                for seed in SEEDS:
                    expected, found = both(lambda: quantize(x, bits, group, seed))  # noqa: B023
                    assert same(expected, found), (rows, columns, group, bits, seed)


def check_quantize_strided(device: torch.device) -> None:
    x = normal(300, 7).to(device).T
    expected, found = both(lambda: quantize(x, 8, GROUP, 5))
    assert same(expected, found)
    x = normal(7, 600).to(device)[:, ::2]
    expected, found = both(lambda: quantize(x, 4, GROUP, 5))
    assert same(expected, found)


def check_dequantize(device: torch.device) -> None:
    for rows, columns, group in SHAPES:
        for bits in (8, 4):
            stored = kernels.quantize(normal(rows, columns).to(device), bits, group)
            for dtype in (torch.float32, torch.bfloat16):
                expected, found = both(lambda: kernels.dequantize(*stored, columns, bits, group, dtype))  # noqa: B023
                assert same(expected, found), (rows, columns, group, bits, dtype)


def check_add_to_quantized(device: torch.device) -> None:
    for rows, columns, group in SHAPES:
        for bits in (8, 4):
            for dtype in (torch.float32, torch.bfloat16):
                for seed in (None, 7 << 40):
                    stored = kernels.quantize(normal(rows, columns).to(device), bits, group)
                    add = normal(rows, columns, seed=1).to(device, dtype)

                    def run() -> object:
                        weight = tuple(tensor.clone() for tensor in stored)  # noqa: B023
                        update_quantized_(*weight, add, None, None, columns, bits, group, 0.01, 0.99, seed)  # noqa: B023 # fmt: skip
                        return weight

                    expected, found = both(run)
                    assert same(expected, found), (rows, columns, group, bits, dtype, seed)


# Rows of real matrices, each one group, as products in INT8 want them: ragged, and up to the longest.
LONG_ROWS = (2048, 2736, 4096, 5461, 11008, 13824)


def check_groups_of_a_whole_row(device: torch.device) -> None:
    for columns in LONG_ROWS:
        group, x, add = -(-columns // 8) * 8, normal(2, columns).to(device), normal(2, columns, seed=1).to(device)
        for seed in (None, 11):
            expected, found = both(lambda: quantize(x, 8, group, seed))  # noqa: B023
            assert same(expected, found), (columns, seed)
            assert isinstance(found, tuple) and found[1].shape == (2, 1)

            def run() -> object:
                weight = tuple(tensor.clone() for tensor in found)  # noqa: B023
                update_quantized_(*weight, add, None, None, columns, 8, group, 0.01, 0.99, seed)  # noqa: B023 # fmt: skip
                return *weight, kernels.dequantize(*weight, columns, 8, group, torch.bfloat16)  # noqa: B023

            assert same(*both(run)), (columns, seed)


def check_low_rank_update(device: torch.device) -> None:
    for rows, columns, rank in ((65, 300, 5), (16, 256, 64), (130, 97, 130)):
        for side in ("left", "right"):
            for bits in (8, 4):
                for dtype in operand_types(device):
                    basis = whole_numbers(rank, rows if side == "left" else columns, seed=1).to(device, dtype)
                    shape = (rank, columns) if side == "left" else (rows, rank)
                    direction = whole_numbers(*shape, seed=2).to(device, dtype)
                    bases = (basis, None) if side == "left" else (None, basis)
                    stored = kernels.quantize(normal(rows, columns).to(device), bits, 128)
                    for seed in (None, 11):

                        def run() -> object:
                            weight = tuple(tensor.clone() for tensor in stored)  # noqa: B023
                            update_quantized_(*weight, direction, *bases, columns, bits, 128, 0.01, 0.99, seed)  # noqa: B023 # fmt: skip
                            return weight

                        expected, found = both(run)
                        assert same(expected, found), (rows, columns, rank, side, bits, dtype, seed)


def check_float_update(device: torch.device) -> None:
    for shape in ((5, 700), (3, 33), (4000,)):
        for dtype in (torch.bfloat16, torch.float32):
            for seed in (None, 3):

                def run() -> object:
                    weight = normal(*shape).to(device, dtype)  # noqa: B023
                    update_float_(weight, normal(*shape, seed=1).to(device), None, None, 1e-3, 0.99, seed, 2)  # noqa: B023 # fmt: skip
                    return weight

                expected, found = both(run)
                assert same(expected, found), (shape, dtype, seed)


# Tokens, inputs, outputs: whole tiles, ragged ones, more than one step along the sum, one token, one column.
INT8_SHAPES = [(130, 64, 136), (3, 341, 21), (17, 200, 300), (1, 5461, 3), (5, 1, 4)]


def activations(tokens: int, columns: int, device: torch.device) -> Iterator[Tensor]:
    """Ordinary ones and rounded ones, with a row of zeros, a huge and a tiny one, and an outlier."""
    x = normal(tokens, columns).to(device)
    x[0, -1] = 90.0
    if tokens > 4:
        # No subnormal numbers, which the interpreter reads wrongly in bfloat16.
        x[1], x[2], x[3] = 0.0, x[2] * 1e30, x[3].sign() * 1e-37
    yield x
    yield x.bfloat16()


def strided(x: Tensor, wider: int) -> Tensor:
    """x as a view of something wider that holds NaN elsewhere, with its columns far apart."""
    held = torch.full((x.shape[1] + wider, x.shape[0] + 3), float("nan"), dtype=x.dtype, device=x.device).T
    held[: x.shape[0], : x.shape[1]] = x
    return held[: x.shape[0]]


def check_int8_linear(device: torch.device) -> None:
    for tokens, inputs, outputs in INT8_SHAPES:
        stored = kernels.quantize(normal(outputs, inputs, seed=1).to(device), 8, -(-inputs // 8) * 8)
        for x in activations(tokens, inputs, device):
            for width in (outputs, outputs + 11):
                expected, found = both(lambda: kernels.int8_linear(x, *stored, width))  # noqa: B023
                assert isinstance(found, Tensor) and found.shape == (tokens, width) and found.dtype == x.dtype
                assert same(expected, found), (tokens, inputs, outputs, width, x.dtype)
                assert found[:, outputs:].count_nonzero() == 0
            again, found = both(lambda: kernels.int8_linear(strided(x, 2), *stored, outputs))  # noqa: B023
            assert same(again, found) and same(again, expected[:, :outputs].contiguous())  # type: ignore[index]


def check_int8_linear_backward(device: torch.device) -> None:
    for tokens, inputs, outputs in INT8_SHAPES:
        stored = kernels.quantize(normal(outputs, inputs, seed=1).to(device), 8, -(-inputs // 8) * 8)
        # The sum of float32 numbers is exact where they are whole; offsets become so by their zero points.
        whole = (stored[0], torch.ones_like(stored[1]), stored[2].sign() * 3 - 128)
        for x in activations(tokens, outputs, device):
            grad = strided(x, 2)
            for width in (inputs, inputs + 11):
                expected, found = both(lambda: kernels.int8_linear_backward(grad, *stored, width))  # noqa: B023
                assert isinstance(expected, Tensor) and isinstance(found, Tensor)
                assert found.shape == (tokens, width) and found[:, inputs:].count_nonzero() == 0
                # Half a unit of the last place where float32 sums in another order make it round the other way.
                offset = stored[2].float() + 128 * stored[1].float()
                magnitude = (x.float().abs() @ offset.abs()) * 1e-6 + expected.float().abs() * torch.finfo(x.dtype).eps
                assert ((found.float() - expected.float()).abs() <= magnitude).all(), (tokens, inputs, outputs)
            exact = whole_numbers(tokens, outputs, seed=2).to(device, x.dtype)
            assert same(*both(lambda: kernels.int8_linear_backward(exact, *whole, inputs)))  # noqa: B023


def check_int8_products_that_are_not_finite(device: torch.device) -> None:
    for value in (float("inf"), float("nan")):
        stored = kernels.quantize(normal(40, 30, seed=1).to(device), 8, 32)
        x, grad = normal(5, 30).to(device), normal(5, 40).to(device)
        x[2, 7] = grad[2, 7] = value
        for run in (
            lambda: kernels.int8_linear(x, *stored, 40),  # noqa: B023
            lambda: kernels.int8_linear_backward(grad, *stored, 30),  # noqa: B023
        ):
            for found in both(run):
                assert isinstance(found, Tensor)
                finite = found.isfinite()
                assert not finite[2].any() and finite.sum() == found.numel() - found.shape[1]


def check_adam(device: torch.device) -> None:
    for shape in ((64, 128), (37, 131), (5,), (4099,)):
        for bits in (8, 32):
            for factor in (None, torch.tensor(0.3, device=device)):

                def run() -> object:
                    state: dict[str, Tensor] = {}
                    moments.init_moments(state, torch.Size(shape), bits, device)  # noqa: B023
                    for step in range(1, 4):
                        # Over many orders of magnitude: every part of the 8-bit map is used.
                        grad = (normal(*shape, seed=step) ** 5).to(device)  # noqa: B023
                        direction = adam_step(state, grad, step, (0.9, 0.99), 1e-8, factor=factor)  # noqa: B023
                    return direction, *(state[key] for key in sorted(state))

                (expected, *states), (found, *found_states) = both(run)  # type: ignore[misc]
                assert same(tuple(states), tuple(found_states)), (shape, bits, factor)
                # Neither the kernel's square root nor PyTorch's own on a CPU is always the nearest.
                assert torch.allclose(found, expected, rtol=1e-6, atol=0), (shape, bits, factor)


def check_momentum(device: torch.device) -> None:
    for shape in ((64, 128), (37, 131), (5,), (4099,)):
        for bits, dtype in ((8, torch.bfloat16), (32, torch.float32)):
            for factor in (None, torch.tensor(0.3, device=device)):

                def run() -> object:
                    state: dict[str, Tensor] = {}
                    moments.init_moments(state, torch.Size(shape), bits, device, ("exp_avg",))  # noqa: B023
                    for step in range(1, 4):
                        grad = (normal(*shape, seed=step) ** 5).to(device)  # noqa: B023
                        momentum = state["exp_avg"], state.get("exp_avg_absmax")
                        ahead = kernels.momentum_step(grad, *momentum, 0.9, 256, factor, dtype=dtype)  # noqa: B023
                    return ahead, *(state[key] for key in sorted(state))

                expected, found = both(run)
                assert same(expected, found), (shape, bits, factor)


def check_blocks(device: torch.device) -> None:
    """Values over many orders of magnitude, zero and tiny blocks among them, whose rows may have any stride."""
    for shape in ((64, 128), (37, 131), (5,), (4099,)):
        for dtype in (torch.float32, torch.bfloat16):
            x = (normal(*shape) ** 5).to(device, dtype)
            # The interpreter does not convert denormal numbers of bfloat16.
            x.view(-1)[256:512], x.view(-1)[512:768] = 0.0, 1e-39 if dtype == torch.float32 else 1e-37
            for signed, value in ((True, x), (False, x.abs()), (True, x.T.contiguous().T)):
                for skip in (None, torch.tensor(True, device=device), torch.tensor(False, device=device)):

                    def run() -> object:
                        codes = torch.full(value.shape, 9, dtype=torch.uint8, device=device)  # noqa: B023
                        absmax = torch.full((-(-value.numel() // 256),), 7.0, device=device)  # noqa: B023
                        kernels.quantize_blocks_(codes, absmax, value, signed, 256, skip)  # noqa: B023
                        return codes, absmax, kernels.dequantize_blocks(codes, absmax, signed, 256, dtype)  # noqa: B023

                    expected, found = both(run)
                    assert same(expected, found), (shape, dtype, signed, skip)
                    untouched = isinstance(found, tuple) and bool((found[0] == 9).all() and (found[1] == 7).all())
                    assert untouched == (skip is not None and bool(skip))


def check_newton_schulz(device: torch.device) -> None:
    """To the last bits of the dtype; and what a matrix becomes does not depend on its neighbours."""
    dtype = operand_types(device)[-1]
    polynomials = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51), (1.875, -1.25, 0.375)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for shapes in ([(24, 40)], [(70, 24), (24, 24), (24, 130)], [(96, 200)] * 9):
        matrices = [(normal(*shape, seed=i) * 10.0 ** (i - 2)).to(device, dtype) for i, shape in enumerate(shapes)]
        expected, found = both(lambda: tuple(kernels.orthogonalize(matrices, polynomials)))  # noqa: B023
        assert isinstance(expected, tuple) and isinstance(found, tuple)
        for matrix, one, other in zip(matrices, expected, found, strict=True):
            assert one.shape == other.shape == matrix.shape
            assert (one.float() - other.float()).norm() <= tolerance * one.float().norm(), shapes
        with mock.patch.dict(os.environ, QGALORE_KERNELS="triton"):
            assert torch.equal(kernels.orthogonalize(matrices[-1:], polynomials)[0], found[-1])


def check_skipping(device: torch.device) -> None:
    for skipped in (True, False):
        flag = torch.tensor(skipped, device=device)
        start = kernels.quantize(normal(20, 300).to(device), 8, GROUP)
        low, full = normal(4, 300).to(device), normal(20, 300, seed=1).to(device)
        basis = normal(4, 20).to(device)
        floats, grad = normal(20, 300, seed=2).to(device), normal(64, 64).to(device)
        state: dict[str, Tensor] = {}
        moments.init_moments(state, grad.shape, 8, device)
        before = {key: value.clone() for key, value in state.items()}
        for direction, left in ((low, basis), (full, None)):
            weight = tuple(tensor.clone() for tensor in start)
            update_quantized_(*weight, direction, left, None, 300, 8, GROUP, 0.1, 1.0, 1, skip=flag)
            assert same(weight, start) == skipped
        updated = floats.clone()
        update_float_(updated, full, None, None, 0.1, 1.0, 1, skip=flag)
        assert same(updated, floats) == skipped
        adam_step(state, grad, 1, (0.9, 0.99), 1e-8, skip=flag)
        assert same(tuple(state.values()), tuple(before.values())) == skipped
        momentum, absmax = before["exp_avg"].clone(), before["exp_avg_absmax"].clone()
        kernels.momentum_step(grad, momentum, absmax, 0.9, moments.BLOCK_SIZE, skip=flag)
        assert same((momentum, absmax), (before["exp_avg"], before["exp_avg_absmax"])) == skipped


def check_gradient_norms(device: torch.device) -> None:
    for broken in (None, float("inf"), float("nan")):
        for skip in (True, False):
            grads = [normal(*shape, seed=i) for i, shape in enumerate([(3,), (300, 500), (64, 9000), (2, 3)])]
            grads += [normal(40, 30, seed=9).bfloat16(), normal(700, seed=8)] * 9
            grads = [grad.to(device) for grad in grads]
            if broken is not None:
                grads[1].view(-1)[-1] = broken

            def run(together: int, grads: list[Tensor] = grads, skip: bool = skip) -> object:
                norms, flag = torch.full((len(grads) + 2,), 7.0, device=device), torch.tensor(skip, device=device)
                for start in range(0, len(grads), together):
                    part = slice(start, start + together)
                    kernels.check_gradients_(grads[part], norms, range(len(grads), 0, -1)[part], flag)
                return norms, flag

            (norms, flag), (found, found_flag) = both(lambda: run(99))  # type: ignore[misc]
            assert bool(found_flag) == bool(flag) == (broken is not None or skip)
            assert found[0] == found[-1] == 7
            assert torch.allclose(found, norms, rtol=1e-5, equal_nan=True)
            _, (alone, _) = both(lambda: run(1))  # type: ignore[misc]
            assert same(found.nan_to_num(), alone.nan_to_num())


def check_no_more_than_the_reference_rounds(device: torch.device) -> None:
    """A projection back of real numbers: sums in another order, so a code may differ by one, rarely."""
    dtype = operand_types(device)[-1]
    direction, basis = normal(32, 600).to(device, dtype), (normal(32, 100, seed=1) / 10).to(device, dtype)
    stored = kernels.quantize(normal(100, 600, seed=2).to(device), 8, GROUP)

    def run() -> object:
        weight = tuple(tensor.clone() for tensor in stored)
        update_quantized_(*weight, direction, basis, None, 600, 8, GROUP, 0.01, 1.0, 5)
        return weight

    expected, found = both(run)
    assert isinstance(expected, tuple) and isinstance(found, tuple)
    difference = (expected[0].int() - found[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(expected[1], found[1]) or torch.allclose(expected[1].float(), found[1].float(), rtol=2**-7)


SHARES = 4
"""Processes that run the checks in the interpreter."""
CHECKS = {
    name.removeprefix("check_"): check
    for name, check in {**globals(), **vars(several_weights), **vars(padded_rows)}.items()
    if name.startswith("check_")
}


def run_share(share: int) -> None:
    """Run every check of a share on the CPU, in the interpreter; print the failures as JSON."""
    torch.set_num_threads(1)
    names, failures = list(CHECKS)[share::SHARES], {}
    for name in names:
        try:
            CHECKS[name](torch.device("cpu"))
        except Exception as error:
            failures[name] = repr(error)[:2000]
    print(json.dumps({"ran": names, "failures": failures}))


@pytest.mark.parametrize("share", range(SHARES))
def test_in_the_interpreter(share: int) -> None:
    """A process a share: to import Triton costs as much as most checks."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run here")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    program = f"from tests.kernels.test_agreement import run_share; run_share({share})"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ran"] == list(CHECKS)[share::SHARES] and result["ran"]
    assert result["failures"] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    CHECKS[name](torch.device("cuda"))


def test_a_cpu_runs_the_reference() -> None:
    assert not kernels.use_triton(torch.device("cpu"))
    assert not kernels.reads_rows_on_device(torch.device("cpu"), GROUP)


def test_only_groups_that_fit_a_tile_read_rows_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    for group_size, expected in ((256, True), (40, True), (12, False), (5464, True), (13824, True), (16392, False)):
        assert kernels.reads_rows_on_device(torch.device("cpu"), group_size) == expected
