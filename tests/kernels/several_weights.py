"""Several matrices in one launch, dequantized or updated: the checks of that which `test_agreement.py` runs."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update import moments
from tests.kernels import comparison
from tests.kernels.comparison import both, normal, operand_types, same, step_row, whole_numbers

# Rows, columns, bits, group, columns of what it is written into: whole groups and ragged ones, a row, a column.
STORED = [
    (16, 512, 8, 256, 0), (9, 85, 8, 256, 96), (5, 1376, 8, 256, 0), (1, 256, 8, 256, 0), (64, 512, 4, 256, 0),
    (3, 301, 4, 256, 320), (20, 256, 8, 256, 272), (4, 97, 8, 40, 0), (3, 1, 8, 256, 16), (33, 512, 4, 256, 0),
    *[(8, 256 + 16 * i, 8, 256, 0) for i in range(9)],
]  # fmt: skip


def stored_matrix(
    number: int, rows: int, columns: int, bits: int, group: int, width: int, device: torch.device, dtype: torch.dtype
) -> kernels.QuantizedMatrix:
    """A matrix with numbers of its own; with a width it is dequantized into a wider one, which is 7 beside it."""
    parts = kernels.quantize(normal(rows, columns, seed=number).to(device), bits, group)
    wide = torch.full((rows + 1, width), 7.0, dtype=dtype, device=device) if width else None
    return kernels.QuantizedMatrix(*parts, columns, bits, group, None if wide is None else wide[:rows, :columns])


def check_dequantize_several(device: torch.device) -> None:
    """Together as one after another, whatever the number of matrices and how they are stored."""
    for dtype in (torch.float32, torch.bfloat16):
        for chosen in ([], STORED[:1], STORED[1:3], STORED, STORED[::-1]):

            def run(together: bool, chosen: list[Any] = chosen, dtype: torch.dtype = dtype) -> object:
                matrices = [stored_matrix(i, *each, device, dtype) for i, each in enumerate(chosen)]
                if together:
                    values = kernels.dequantize_several(matrices, dtype)
                else:
                    values = [kernels.dequantize(*matrix[:-1], dtype, matrix.out) for matrix in matrices]
                for value, matrix in zip(values, matrices, strict=True):
                    assert value.shape == (matrix.qdata.shape[0], matrix.columns) and value.dtype == dtype
                    assert matrix.out is None or value is matrix.out
                bases = [value if value._base is None else value._base for value in values]
                return tuple(values), tuple(bases)

            expected, found = both(lambda run=run: run(True))  # type: ignore[misc]
            assert same(expected, found)
            assert same(*both(lambda run=run: run(False))) and same(run(False), found)  # type: ignore[misc]


def update_of(
    rows: int, columns: int, rank: int, side: str, layout: str, seed: int | None, device: torch.device,
    dtype: torch.dtype, bits: int = 8,
) -> kernels.QuantizedUpdate:  # fmt: skip
    """The update of a weight by whole numbers, which differ from those of another seed."""
    number = 0 if seed is None else seed % 97
    basis = whole_numbers(rank, rows if side == "left" else columns, seed=number).to(device, dtype)
    direction = whole_numbers(*((rank, columns) if side == "left" else (rows, rank)), seed=number + 1).to(device, dtype)
    if layout == "columns":
        direction = direction.T.contiguous().T
    elif layout == "apart":
        direction = direction.repeat_interleave(2, dim=1)[:, ::2]
    stored = kernels.quantize(normal(rows, columns, seed=number).to(device), bits, 128)
    bases = (basis, None) if side == "left" else (None, basis)
    row = step_row(0.01 * (1 + number), 0.99, seed, device=device)
    return kernels.QuantizedUpdate(*stored, direction, *bases, columns, bits, 128, row, seed is not None)


# Rows, columns, rank, basis, where a direction's values lie: whole and ragged tiles, more than one block of rows.
TOGETHER = [
    (65, 300, 5, "right", "rows"), (16, 256, 64, "right", "apart"), (130, 97, 130, "right", "columns"),
    (24, 131, 7, "left", "rows"), (256, 128, 33, "left", "columns"), (40, 512, 16, "right", "rows"),
    (7, 7, 7, "left", "apart"),
]  # fmt: skip


def check_several_low_rank_updates(device: torch.device) -> None:
    """Together as one after another, of each number of weights up to more than one launch takes."""
    for dtype in operand_types(device):
        kinds = [*TOGETHER, *TOGETHER[:2]]
        updates = [update_of(*kind, 11 + i, device, dtype) for i, kind in enumerate(kinds)]
        updates.append(update_of(33, 140, 9, "left", "rows", 3, device, dtype, bits=4))
        updates.append(update_of(33, 140, 9, "right", "rows", None, device, dtype))
        mixes = [updates[:1], updates[3:5], updates[:3], updates, updates[::-1]]
        for chosen in mixes:

            def run(together: bool) -> object:
                copies = [update._replace(**stored(update)) for update in chosen]  # noqa: B023
                for part in [copies] if together else [[copy] for copy in copies]:
                    kernels.update_quantized_(part)
                return tuple(copy[:3] for copy in copies)

            expected, found = both(lambda: run(True))
            assert same(expected, found), [tuple(update.qdata.shape) for update in chosen]
            assert not same(tuple(update[:3] for update in chosen), found)
            assert same(*both(lambda: run(False))) and same(run(False), found)


def stored(update: kernels.QuantizedUpdate) -> dict[str, Tensor]:
    """A copy of what an update writes to."""
    return {name: getattr(update, name).clone() for name in ("qdata", "scale", "zero_point")}


def check_several_updates_that_other_kernels_make(device: torch.device) -> None:
    """With two bases or none, and in groups that are no tile of the tensor cores, beside those that have one launch."""
    dtype = torch.float32
    plain = update_of(65, 300, 5, "right", "rows", 3, device, dtype)
    full = whole_numbers(65, 300, seed=4).to(device)
    both_sides = plain._replace(
        direction=whole_numbers(4, 5, seed=4).to(device), left=whole_numbers(4, 65, seed=5).to(device)
    )
    wide = kernels.quantize(normal(65, 300).to(device), 8, 304)
    row = plain._replace(qdata=wide[0], scale=wide[1], zero_point=wide[2], group_size=304)
    updates = [both_sides, plain, plain._replace(direction=full, right=None), row]

    def run() -> object:
        copies = [update._replace(**stored(update)) for update in updates]
        kernels.update_quantized_(copies)
        return tuple(copy[:3] for copy in copies)

    expected, found = both(run)
    assert same(expected, found)
    assert isinstance(found, tuple)
    assert all(not same(new, old[:3]) for new, old in zip(found, updates, strict=True))


def check_several_low_rank_updates_of_one_table(device: torch.device) -> None:
    """Rows of a table with seeds of all lengths; the first has a learning rate of 0, which leaves every bit."""
    seeds = [(1 << 64) - 1 - 7919 * i if i % 2 else 3 * i for i in range(len(TOGETHER))]
    table = torch.stack([step_row(0.01 * i, 1 - 0.001 * i, seed, device=device) for i, seed in enumerate(seeds)])
    updates = [
        update_of(*kind, i, device, operand_types(device)[-1])._replace(row=row)
        for i, (kind, row) in enumerate(zip(TOGETHER, table, strict=True))
    ]

    def run() -> object:
        copies = [update._replace(**stored(update)) for update in updates]
        kernels.update_quantized_(copies)
        return tuple(copy[:3] for copy in copies)

    expected, found = both(run)
    assert same(expected, found) and isinstance(found, tuple)
    assert [same(update[:3], new) for update, new in zip(updates, found, strict=True)] == [True] + [False] * 6


ADAM_SHAPES = [(64, 128), (37, 131), (4099,), (5,), (16, 256), (3, 7), (70, 100), (64, 64), (4097,), (1, 5000)]


def adam_step_of(shape: tuple[int, ...], number: int, device: torch.device, factor: bool = False) -> kernels.AdamStep:
    """A step on moments that have moved already; with other numbers each."""
    state: dict[str, Tensor] = {}
    moments.init_moments(state, torch.Size(shape), 8, device)
    with mock.patch.dict(os.environ, QGALORE_KERNELS="reference"):
        comparison.adam_step(state, (normal(*shape, seed=number) ** 5).to(device), 1, (0.9, 0.99), 1e-8)
    grad = (normal(*shape, seed=number + 50) ** 5).to(device)
    first, second = (
        (state["exp_avg"], state.get("exp_avg_absmax")),
        (state["exp_avg_sq"], state.get("exp_avg_sq_absmax")),
    )
    scale = torch.tensor(0.1 * (1 + number), device=device) if factor else None
    return kernels.AdamStep(grad, *first, *second, step_row(step=number + 2, device=device), (0.9, 0.99), 1e-8, scale)


def moments_of(step: kernels.AdamStep) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in step[1:5] if isinstance(tensor, Tensor))


def copied(step: kernels.AdamStep) -> kernels.AdamStep:
    moments = [tensor.clone() if isinstance(tensor, Tensor) else None for tensor in step[1:5]]
    return kernels.AdamStep(step.grad, *moments, *step[5:])  # type: ignore[arg-type]


def check_several_adam_steps(device: torch.device) -> None:
    """Together as one after another; some have 8-bit moments, some float32, factors, other rates or dtypes."""
    steps = [adam_step_of(shape, i, device, factor=i % 4 == 1) for i, shape in enumerate(ADAM_SHAPES)]
    alike = [adam_step_of((64, 64 + i), i, device) for i in range(9)]
    odd = [steps[0]._replace(betas=(0.8, 0.9)), steps[4]._replace(dtype=torch.bfloat16), steps[6]._replace(eps=0.1)]
    for chosen in (steps[:1], alike, [*steps, *odd]):

        def run(together: bool) -> object:
            copies = [copied(step) for step in chosen]  # noqa: B023
            parts = [copies] if together else [[step] for step in copies]
            directions = [direction for part in parts for direction in kernels.adam_steps(part, 256)]
            return tuple(directions), tuple(moments_of(step) for step in copies)

        (expected, moments), (found, found_moments) = both(lambda: run(True))  # type: ignore[misc]
        assert same(moments, found_moments), [tuple(step.grad.shape) for step in chosen]
        for step, one, other in zip(chosen, expected, found, strict=True):
            assert one.shape == other.shape == step.grad.shape and one.dtype == other.dtype == step.dtype
            assert torch.allclose(one.float(), other.float(), rtol=1e-6 if one.dtype == torch.float32 else 0.01, atol=0)
        with mock.patch.dict(os.environ, QGALORE_KERNELS="triton"):
            assert same(run(False), (tuple(found), found_moments)), "what comes of a weight depends on the others"


def check_several_skipped(device: torch.device) -> None:
    for skipped in (True, False):
        flag = torch.tensor(skipped, device=device)
        steps = [adam_step_of((64, 64 + i), i, device) for i in range(3)]
        updates = [update_of(*kind, 5 + i, device, torch.float32) for i, kind in enumerate(TOGETHER)]
        for implementation in ("reference", "triton"):
            moved = [copied(step) for step in steps]
            written = [update._replace(**stored(update)) for update in updates]
            with mock.patch.dict(os.environ, QGALORE_KERNELS=implementation):
                kernels.adam_steps(moved, 256, flag)
                kernels.update_quantized_(written, flag)
            for before, after in zip(steps, moved, strict=True):
                assert same(moments_of(before), moments_of(after)) == skipped
            for old, new in zip(updates, written, strict=True):
                assert same(old[:3], new[:3]) == skipped
