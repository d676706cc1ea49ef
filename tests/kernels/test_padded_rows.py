"""Rows of codes that are longer than the matrix, by Triton's kernels and the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore import kernels
from tests.kernels.comparison import (
    OPERAND_TYPES,
    agreed,
    dequantize,
    each,
    normal,
    same,
    step_row,
    update_quantized_,
    whole_numbers,
)

# Rows, columns, group: a ragged last group, one whole group, one group that leaves the padding to nobody.
every_shape = each("shape", [(9, 341, 128), (5, 61, 64), (33, 37, 32), (3, 85, 88)])
every_width = each("alignment", (1, 16))  # the bytes of a row are a multiple
Shape = tuple[int, int, int]
BESIDE = 77  # what memory beside a row holds, which is nobody's business


def codes_width(columns: int, bits: int, alignment: int = 1) -> int:
    return -(-columns * bits // (8 * alignment)) * alignment


def held(shape: Shape, bits: int, alignment: int, device: torch.device) -> tuple[Tensor, ...]:
    """Memory with rows further apart than they are wide, and a quantized matrix in it: codes, scale, zero point."""
    rows, columns, group = shape
    width = codes_width(columns, bits, alignment)
    codes, scale, zero_point = kernels.quantize(normal(rows, columns).to(device), bits, group)
    memory = torch.full((rows, width + 5), BESIDE, dtype=torch.uint8, device=device)
    memory[:, :width] = torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
    return memory, memory[:, :width], scale, zero_point


@each("more", ((0, 0), (7, 0), (0, 11), (3, 150)))
@every_width
@each("bits", (8, 4))
@every_shape
def test_dequantize_into_something_larger(
    shape: Shape, bits: int, alignment: int, more: tuple[int, int], kernel_device: torch.device
) -> None:
    rows, columns, group = shape
    _, *weight = held(shape, bits, alignment, kernel_device)

    def run() -> object:
        memory = torch.full((rows + more[0] + 1, columns + more[1] + 3), float("nan"), device=kernel_device)
        out = memory[:-1, :-3]
        found = dequantize(*weight, columns, bits, group, out=out)
        assert found is out and memory[-1].isnan().all() and memory[:, -3:].isnan().all()
        return out

    found = agreed(run)
    assert torch.equal(found[:rows, :columns], dequantize(*weight, columns, bits, group))
    assert found[rows:].count_nonzero() == found[:, columns:].count_nonzero() == 0


@each("kind", ("full", "right", "left"))
@every_width
@each("bits", (8, 4))
@every_shape
def test_updates_of_padded_rows(
    shape: Shape, bits: int, alignment: int, kind: str, kernel_device: torch.device
) -> None:
    """They give the codes of rows without padding, leave zeros at the end, and what is beside a row alone."""
    rows, columns, group = shape
    tall, wide = (
        whole_numbers(*each, seed=5).to(kernel_device, OPERAND_TYPES[-1]) for each in ((rows, 5), (5, columns))
    )
    factors = {
        "full": (normal(rows, columns, seed=1).to(kernel_device), None, None), "right": (tall, None, wide),
        "left": (wide, tall.T.contiguous(), None),
    }[kind]  # fmt: skip
    width = codes_width(columns, bits)

    def run(alignment: int) -> object:
        memory, *weight = held(shape, bits, alignment, kernel_device)
        for seed in (None, 3):
            update_quantized_(*weight, *factors, columns, bits, group, 0.01, 0.99, seed)
        assert (memory[:, codes_width(columns, bits, alignment) :] == BESIDE).all()
        assert weight[0][:, width:].count_nonzero() == 0
        return weight[0][:, :width], weight[1], weight[2]

    assert same(agreed(lambda: run(alignment)), run(1)), "the padding changes a weight"


def test_padded_and_plain_rows_in_one_launch(kernel_device: torch.device) -> None:
    dtype = OPERAND_TYPES[-1]

    def run() -> object:
        updates = []
        for columns, alignment in ((341, 16), (256, 1), (341, 1), (37, 16)):
            _, *weight = held((20, columns, 128), 8, alignment, kernel_device)
            bases = whole_numbers(5, 20, seed=columns).to(kernel_device, dtype), None
            direction = whole_numbers(5, columns, seed=columns + 1).to(kernel_device, dtype)
            row = step_row(0.01, 0.99, 5, device=kernel_device)
            updates.append(kernels.QuantizedUpdate(*weight, direction, *bases, columns, 8, 128, row))
        kernels.update_quantized_(updates)
        return tuple(update[:3] for update in updates)

    found = agreed(run)
    assert same((found[0][0][:, :341], *found[0][1:]), found[2]), "the padding changes a weight"
    assert found[0][0][:, 341:].count_nonzero() == found[3][0][:, 37:].count_nonzero() == 0
