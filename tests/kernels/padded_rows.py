"""Rows of codes that are longer than the matrix: the checks of them that `test_agreement.py` runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qgalore import kernels
from tests.kernels.comparison import both, normal, operand_types, same, step_row, update_quantized_, whole_numbers

# Rows, columns, group: a ragged last group, one whole group, one group that leaves the padding to nobody.
SHAPES = [(9, 341, 128), (5, 61, 64), (33, 37, 32), (3, 85, 88)]
BESIDE = 77  # what memory beside a row holds, which is nobody's business


def held(rows: int, columns: int, group: int, bits: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Memory with rows further apart than `width`, and a quantized matrix in it: codes, scale, zero point."""
    codes, scale, zero_point = kernels.quantize(normal(rows, columns).to(device), bits, group)
    memory = torch.full((rows, width + 5), BESIDE, dtype=torch.uint8, device=device)
    memory[:, :width] = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    return memory, memory[:, :width], scale, zero_point


def kinds() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Rows, columns, group, bits, bytes of a row's codes and of the row as it is stored."""
    for rows, columns, group in SHAPES:
        for bits in (8, 4):
            width = -(-columns * bits // 8)
            for stored in (width, -(-width // 16) * 16):
                yield rows, columns, group, bits, width, stored


def check_dequantize_into_something_larger(device: torch.device) -> None:
    for rows, columns, group, bits, _, stored in kinds():
        _, *weight = held(rows, columns, group, bits, stored, device)
        for more_rows, more_columns in ((0, 0), (7, 0), (0, 11), (3, 150)):

            def run(more: tuple[int, int] = (more_rows, more_columns)) -> object:
                out = torch.full((rows + more[0] + 1, columns + more[1] + 3), float("nan"), device=device)  # noqa: B023
                place = out[:-1, :-3]
                found = kernels.dequantize(*weight, columns, bits, group, out.dtype, place)  # noqa: B023
                assert found is place and out[-1].isnan().all() and out[:, -3:].isnan().all()
                return place

            expected, found = both(run)
            assert same(expected, found), (rows, columns, group, bits, more_rows, more_columns)
            value = kernels.dequantize(*weight, columns, bits, group, torch.float32)
            assert isinstance(found, Tensor) and torch.equal(found[:rows, :columns], value)
            assert found[rows:].count_nonzero() == found[:, columns:].count_nonzero() == 0


def check_updates_of_padded_rows(device: torch.device) -> None:
    """They give the codes of rows without padding, leave zeros at the end, and what is beside a row alone."""
    dtype = operand_types(device)[-1]
    for rows, columns, group, bits, width, stored in kinds():
        full, tall = normal(rows, columns, seed=1).to(device), whole_numbers(rows, 5, seed=2).to(device, dtype)
        wide = whole_numbers(5, columns, seed=3).to(device, dtype)
        factors = [(full, None, None), (tall, None, wide), (wide, tall.T.contiguous(), None)]
        for direction, left, right in factors:

            def run(stored: int) -> object:
                memory, *weight = held(rows, columns, group, bits, stored, device)  # noqa: B023
                for seed in (None, 3):
                    update_quantized_(
                        *weight, direction, left, right, columns, bits, group, 0.01, 0.99, seed  # noqa: B023
                    )  # fmt: skip
                assert (memory[:, stored:] == BESIDE).all()
                assert weight[0][:, width:].count_nonzero() == 0  # noqa: B023
                return weight[0][:, :width], weight[1], weight[2]  # noqa: B023

            expected, found = both(lambda: run(stored))  # noqa: B023
            assert same(expected, found), (rows, columns, group, bits, stored, direction.shape)
            assert same(found, run(width)), "the padding changes a weight"


def check_padded_and_plain_rows_in_one_launch(device: torch.device) -> None:
    dtype = operand_types(device)[-1]

    def run() -> object:
        updates = []
        for columns, stored in ((341, 352), (256, 256), (341, 341), (37, 48)):
            _, *weight = held(20, columns, 128, 8, stored, device)
            bases = whole_numbers(5, 20, seed=columns).to(device, dtype), None
            direction = whole_numbers(5, columns, seed=columns + 1).to(device, dtype)
            updates.append(
                kernels.QuantizedUpdate(
                    *weight, direction, *bases, columns, 8, 128, step_row(0.01, 0.99, 5, device=device)
                )  # type: ignore[arg-type]
            )
        kernels.update_quantized_(updates)
        return tuple(update[:3] for update in updates)

    expected, found = both(run)
    assert same(expected, found)
    assert isinstance(found, tuple) and same((found[0][0][:, :341].contiguous(), *found[0][1:]), found[2]), (
        "the padding changes a weight"
    )
    assert found[0][0][:, 341:].count_nonzero() == found[3][0][:, 37:].count_nonzero() == 0
