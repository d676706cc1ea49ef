"""Groups of matrices: what comes of one does not depend on the others, and is what the reference makes of it."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.update import moments
from tests.kernels import comparison
from tests.kernels.comparison import OPERAND_TYPES, agreed, both, copied, each, normal, same, step_row, whole_numbers

# Rows, columns, bits, group, columns of what it is written into: whole groups and ragged ones, a row, a column.
STORED = [
    (16, 512, 8, 256, 0), (9, 85, 8, 256, 96), (5, 1376, 8, 256, 0), (1, 256, 8, 256, 0), (64, 512, 4, 256, 0),
    (3, 301, 4, 256, 320), (20, 256, 8, 256, 272), (4, 97, 8, 40, 0), (3, 1, 8, 256, 16), (33, 512, 4, 256, 0),
    *[(8, 256 + 16 * i, 8, 256, 0) for i in range(9)],
]  # fmt: skip
STORED_GROUPS = {"none": [], "one": STORED[:1], "two": STORED[1:3], "all": STORED, "reversed": STORED[::-1]}


def stored_matrix(
    number: int, rows: int, columns: int, bits: int, group: int, width: int, device: torch.device, dtype: torch.dtype
) -> kernels.QuantizedMatrix:
    """A matrix with numbers of its own; with a width it is dequantized into a wider one, which is 7 beside it."""
    parts = kernels.quantize(normal(rows, columns, seed=number).to(device), bits, group)
    wide = torch.full((rows + 1, width), 7.0, dtype=dtype, device=device) if width else None
    return kernels.QuantizedMatrix(*parts, columns, bits, group, None if wide is None else wide[:rows, :columns])


@each("dtype", (torch.float32, torch.bfloat16))
@each("chosen", STORED_GROUPS)
def test_dequantize(chosen: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    def run(grouped: bool) -> object:
        matrices = [stored_matrix(i, *each, kernel_device, dtype) for i, each in enumerate(STORED_GROUPS[chosen])]
        parts = [matrices] if grouped else [[matrix] for matrix in matrices]
        values = [value for part in parts for value in kernels.dequantize(part, dtype)]
        for value, matrix in zip(values, matrices, strict=True):
            assert value.shape == (matrix.qdata.shape[0], matrix.columns) and value.dtype == dtype
            assert matrix.out is None or value is matrix.out
        bases = [value if value._base is None else value._base for value in values]
        return tuple(values), tuple(bases)

    assert same(agreed(lambda: run(True)), agreed(lambda: run(False)))


# ---- updates of quantized weights

# Rows, columns, rank, basis, where a direction's values lie: whole and ragged tiles, more than one block of rows.
LOW_RANK = [
    (65, 300, 5, "right", "rows"), (16, 256, 64, "right", "apart"), (130, 97, 130, "right", "columns"),
    (24, 131, 7, "left", "rows"), (256, 128, 33, "left", "columns"), (40, 512, 16, "right", "rows"),
    (7, 7, 7, "left", "apart"),
]  # fmt: skip


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


def updated(
    updates: list[kernels.QuantizedUpdate], limit: int = 99, skip: Tensor | None = None
) -> tuple[tuple[Tensor, ...], ...]:
    """Codes, scale and zero point of each weight after the update of a copy, `limit` of them at a time."""
    copies = [kernels.QuantizedUpdate(*copied(update[:3]), *update[3:]) for update in updates]
    for start in range(0, len(copies), limit):
        kernels.update_quantized_(copies[start : start + limit], skip)
    return tuple(copy[:3] for copy in copies)


@each("dtype", OPERAND_TYPES)
@each("chosen", ("first", "two", "three", "all", "reversed"))
def test_low_rank_updates(chosen: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Of each number of weights up to more than one launch takes."""
    every = [update_of(*kind, 11 + i, kernel_device, dtype) for i, kind in enumerate([*LOW_RANK, *LOW_RANK[:2]])]
    every.append(update_of(33, 140, 9, "left", "rows", 3, kernel_device, dtype, bits=4))
    every.append(update_of(33, 140, 9, "right", "rows", None, kernel_device, dtype))
    groups = {"first": every[:1], "two": every[3:5], "three": every[:3], "all": every, "reversed": every[::-1]}
    updates = groups[chosen]
    found = agreed(lambda: updated(updates))
    assert all(not same(update[:3], new) for update, new in zip(updates, found, strict=True))
    assert same(agreed(lambda: updated(updates, limit=1)), found)


def test_updates_that_other_kernels_make(kernel_device: torch.device) -> None:
    """With two bases or none, in groups that are no tile of the tensor cores or that no kernel takes, beside others."""
    plain = update_of(65, 300, 5, "right", "rows", 3, kernel_device, torch.float32)
    full, left, inner = (whole_numbers(*shape, seed=4).to(kernel_device) for shape in ((65, 300), (4, 65), (4, 5)))

    def regrouped(group: int) -> kernels.QuantizedUpdate:
        qdata, scale, zero_point = kernels.quantize(normal(65, 300).to(kernel_device), 8, group)
        return plain._replace(qdata=qdata, scale=scale, zero_point=zero_point, group_size=group)

    both_sides, whole = plain._replace(direction=inner, left=left), plain._replace(direction=full, right=None)
    updates = [both_sides, plain, whole, regrouped(304), regrouped(12)]
    found = agreed(lambda: updated(updates))
    assert all(not same(new, old[:3]) for new, old in zip(found, updates, strict=True))


def test_low_rank_updates_of_one_table(kernel_device: torch.device) -> None:
    """Rows of a table with seeds of all lengths; the first has a learning rate of 0, which leaves every bit."""
    seeds = [(1 << 64) - 1 - 7919 * i if i % 2 else 3 * i for i in range(len(LOW_RANK))]
    table = torch.stack([step_row(0.01 * i, 1 - 0.001 * i, seed, device=kernel_device) for i, seed in enumerate(seeds)])
    updates = [
        update_of(*kind, i, kernel_device, OPERAND_TYPES[-1])._replace(row=row)
        for i, (kind, row) in enumerate(zip(LOW_RANK, table, strict=True))
    ]
    found = agreed(lambda: updated(updates))
    assert [same(update[:3], new) for update, new in zip(updates, found, strict=True)] == [True] + [False] * 6


# ---- steps of Adam

ADAM_SHAPES = [(64, 128), (37, 131), (4099,), (5,), (16, 256), (3, 7), (70, 100), (64, 64), (4097,), (1, 5000)]


def adam_step_of(shape: tuple[int, ...], number: int, device: torch.device, factor: bool = False) -> kernels.AdamStep:
    """A step on moments that have moved already; with other numbers each."""
    state: dict[str, Tensor] = {}
    moments.init_moments(state, torch.Size(shape), 8, device)
    with mock.patch.dict(os.environ, QGALORE_KERNELS="reference"):
        comparison.adam_step(state, (normal(*shape, seed=number) ** 5).to(device), 1, (0.9, 0.99), 1e-8)
    grad = (normal(*shape, seed=number + 50) ** 5).to(device)
    names = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
    held, row = [state.get(name) for name in names], step_row(step=number + 2, device=device)
    scale = torch.tensor(0.1 * (1 + number), device=device) if factor else None
    return kernels.AdamStep(grad, *held, row, (0.9, 0.99), 1e-8, scale)  # type: ignore[arg-type]


def moments_of(step: kernels.AdamStep) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in step[1:5] if isinstance(tensor, Tensor))


def moved(
    steps: list[kernels.AdamStep], limit: int = 99, skip: Tensor | None = None
) -> tuple[list[Tensor], tuple[tuple[Tensor, ...], ...]]:
    """Directions and moments of copies, `limit` of them moved at a time."""
    copies = [
        kernels.AdamStep(step.grad, *(None if x is None else x.clone() for x in step[1:5]), *step[5:]) for step in steps
    ]
    parts = [copies[start : start + limit] for start in range(0, len(copies), limit)]
    directions = [direction for part in parts for direction in kernels.adam_steps(part, 256, skip)]
    return directions, tuple(map(moments_of, copies))


@each("chosen", ("one", "alike", "mixed"))
def test_adam_steps(chosen: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have 8-bit moments, some float32, factors, other rates or dtypes."""
    if chosen == "alike":
        steps = [adam_step_of((64, 64 + i), i, kernel_device) for i in range(9)]
    else:
        steps = [adam_step_of(shape, i, kernel_device, factor=i % 4 == 1) for i, shape in enumerate(ADAM_SHAPES)]
        others = [{"betas": (0.8, 0.9)}, {"dtype": torch.bfloat16}, {"eps": 0.1}]
        odd = [steps[i]._replace(**other) for i, other in zip((0, 4, 6), others, strict=True)]
        steps = steps[:1] if chosen == "one" else [*steps, *odd]
    (expected, expected_moments), (found, found_moments) = both(lambda: moved(steps))
    assert same(expected_moments, found_moments)
    for step, one, other in zip(steps, expected, found, strict=True):
        assert one.shape == other.shape == step.grad.shape and one.dtype == other.dtype == step.dtype
        assert torch.allclose(one.float(), other.float(), rtol=1e-6 if one.dtype == torch.float32 else 0.01, atol=0)
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    alone, alone_moments = moved(steps, limit=1)
    assert same(tuple(alone), tuple(found)) and same(alone_moments, found_moments)


@each("implementation", ("reference", "triton"))
@each("skip", (True, False))
@each("operation", ("adam_steps", "update_quantized_"))
def test_skipping(
    operation: str, skip: bool, implementation: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGALORE_KERNELS", implementation)
    flag = torch.tensor(skip, device=kernel_device)
    if operation == "adam_steps":
        steps = [adam_step_of((64, 64 + i), i, kernel_device) for i in range(3)]
        before, after = map(moments_of, steps), moved(steps, skip=flag)[1]
    else:
        updates = [update_of(*kind, 5 + i, kernel_device, torch.float32) for i, kind in enumerate(LOW_RANK)]
        before = (update[:3] for update in updates)
        after = updated(updates, skip=flag)
    assert all(same(old, new) == skip for old, new in zip(before, after, strict=True))


# ---- updates of float weights, and steps of momentum

FLOAT_SHAPES = [(896,), (128,), (5,), (1,), (3, 200), (64, 128), (1030, 3), (896,), (7, 513)]


@each("dtype", (torch.float32, torch.bfloat16))
@each("chosen", ("one", "alike", "mixed"))
def test_float_updates(chosen: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    shapes = {"one": FLOAT_SHAPES[:1], "alike": [(896,)] * 11, "mixed": FLOAT_SHAPES}[chosen]

    def run(grouped: bool) -> tuple[Tensor, ...]:
        updates = []
        for number, shape in enumerate(shapes):
            row = step_row(0.01 * (1 + number), 0.99, 7 + number, device=kernel_device)
            # One that an earlier row number belongs to, one that is rounded to nearest, one that changes nothing.
            if number == 4:
                row = step_row(0.0, 1.0, 3, device=kernel_device)
            weight = normal(*shape, seed=number).to(kernel_device, dtype)
            direction = whole_numbers(*shape, seed=number + 1).to(kernel_device, dtype)
            start = 2 if number == 6 else 0
            updates.append(kernels.FloatUpdate(weight, direction, None, None, row, number != 5, start))
        if chosen == "mixed":
            basis = whole_numbers(4, 12, seed=1).to(kernel_device, dtype)
            weight, direction = normal(6, 12, seed=2).to(kernel_device, dtype), whole_numbers(6, 4, seed=3)
            row = step_row(0.5, 0.9, 5, device=kernel_device)
            updates.append(kernels.FloatUpdate(weight, direction.to(kernel_device, dtype), None, basis, row))
        for part in [updates] if grouped else [[update] for update in updates]:
            kernels.update_float_(part)
        return tuple(update.weight for update in updates)

    found = agreed(lambda: run(True))
    assert same(found, agreed(lambda: run(False)))
    before = [normal(*shape, seed=number).to(kernel_device, dtype) for number, shape in enumerate(shapes)]
    unchanged = [torch.equal(old, new) for old, new in zip(before, found, strict=False)]
    assert unchanged == [number == 4 for number in range(len(before))]


def test_momentum_steps(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have an 8-bit momentum, some a float32 one, factors, another rate or dtype."""
    steps = [adam_step_of(shape, i, kernel_device, factor=i % 4 == 1) for i, shape in enumerate(ADAM_SHAPES)]
    steps = [step._replace(exp_avg_sq=None, exp_avg_sq_absmax=None) for step in steps]
    steps += [steps[0]._replace(betas=(0.8, 0.9)), steps[4]._replace(dtype=torch.bfloat16)]

    def run(limit: int) -> tuple[tuple[Tensor, ...], ...]:
        copies = [
            step._replace(
                exp_avg=step.exp_avg.clone(), exp_avg_absmax=None if (x := step.exp_avg_absmax) is None else x.clone()
            )
            for step in steps
        ]
        ahead = [x for i in range(0, len(copies), limit) for x in kernels.momentum_steps(copies[i : i + limit], 256)]
        return tuple(ahead), *map(moments_of, copies)

    assert same(agreed(lambda: run(99)), agreed(lambda: run(1)))


@each("bits", (8, 4))
def test_whole_directions_in_any_order(bits: int, kernel_device: torch.device) -> None:
    """In rows or columns of something wider that holds no numbers elsewhere, apart from one another, and contiguous."""
    shapes = [
        (24, 300, "wider"),
        (300, 24, "turned"),
        (40, 272, "turned"),
        (5, 512, ""),
        (18, 256, "apart"),
        (33, 1, ""),
    ]

    def run(grouped: bool) -> tuple[Tensor, ...]:
        updates = []
        for number, (m, n, layout) in enumerate(shapes):
            direction = normal(m, n, seed=number)
            held = torch.full({"wider": (m + 1, 2 * n), "turned": (n + 1, 2 * m)}.get(layout, (m, 2 * n)), torch.nan)
            if layout:
                view = {"wider": held[:m, 32 : 32 + n], "turned": held[:n, 32 : 32 + m].T, "apart": held[:, ::2]}[
                    layout
                ]
                view.copy_(direction)
                direction = held.to(kernel_device).as_strided(view.shape, view.stride(), view.storage_offset())
            weight = kernels.quantize(normal(m, n, seed=9).to(kernel_device), bits, 256)
            row = step_row(0.1, 0.9, number, device=kernel_device)
            updates.append(kernels.QuantizedUpdate(*weight, direction.to(kernel_device), None, None, n, bits, 256, row))
        for part in [updates] if grouped else [[update] for update in updates]:
            kernels.update_quantized_(part)
        return tuple(x for update in updates for x in update[:3])

    assert same(agreed(lambda: run(True)), agreed(lambda: run(False)))


# ---- decay of what grows


@each("kind", ("float", "low rank", "group of a row"))
def test_values_that_grow_have_a_decay_of_their_own(kind: str, kernel_device: torch.device) -> None:
    """Those that the direction moves away from zero; whole numbers, so that nothing is rounded."""
    signs = torch.tensor([-3.0, -1.0, 1.0, 2.0])
    weight = signs.repeat(6, 64).to(kernel_device)  # 6 x 256
    direction = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0, -1.0])[:, None].expand(6, 256).contiguous()
    direction = direction.to(kernel_device)
    row = kernels.StepScalars(1, 1.0, 0.5, decay_of_growing=0.75).row(kernel_device)
    expected = weight * torch.where(weight * direction >= 0, 0.5, 0.75) - direction

    def run() -> Tensor:
        if kind == "float":
            value = weight.clone()
            kernels.update_float_([kernels.FloatUpdate(value, direction, None, None, row)])
            return value
        group = 256 if kind == "low rank" else 300
        stored = kernels.quantize(weight, 8, group)
        basis = torch.ones(1, 256, device=kernel_device)
        update = kernels.QuantizedUpdate(*stored, direction[:, :1].contiguous(), None, basis, 256, 8, group, row, False)
        kernels.update_quantized_([update])
        return kernels.dequantize([kernels.QuantizedMatrix(*stored, 256, 8, group)], torch.float32)[0]

    assert torch.allclose(agreed(run), expected, atol=0.0 if kind == "float" else 0.03)
