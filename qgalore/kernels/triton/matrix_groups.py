"""Matrices side by side in a buffer, and tiles of symmetric ones: what kernels of Newton-Schulz share.

Layout: matrices with equally many rows lie side by side in a buffer (rows, width), each padded with zeros to whole
tiles of columns. `ends` are the tiles of columns after each matrix, as arguments of the launch: a table on the device
could not be made while a graph is captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import GROUP_LIMIT, ceil_div, launches
from qgalore.kernels.triton.tile_access import takes_descriptors
from qgalore.kernels.triton.tiles import chosen, matrix_of_program

__all__: list[str] = []

ENDS = [f"e{index}" for index in range(GROUP_LIMIT)]


@triton.jit
def end_of(which, e0, e1, e2, e3, e4, e5, e6, e7):
    """Tiles of columns after matrix `which`; 0 for -1."""
    low = tl.where(which < 1, tl.where(which < 0, 0, e0), tl.where(which < 2, e1, tl.where(which < 3, e2, e3)))
    high = tl.where(which < 6, tl.where(which < 5, e4, e5), tl.where(which < 7, e6, e7))
    return tl.where(which < 4, low, high)


@triton.jit
def matrix_of(index, e0, e1, e2, e3, e4, e5, e6):
    """The matrix that a tile of columns belongs to."""
    which = (index >= e0).to(tl.int32) + (index >= e1).to(tl.int32) + (index >= e2).to(tl.int32)
    which += (index >= e3).to(tl.int32) + (index >= e4).to(tl.int32) + (index >= e5).to(tl.int32)
    return which + (index >= e6).to(tl.int32)


@triton.jit
def _below_diagonal(index):
    """Row and column, at most the row, of a tile among those on and below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)  # where the root was rounded down or up
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def corner(index, T: tl.constexpr, S: tl.constexpr):
    """First row and column of a tile (T, S), S a multiple of T, among those that reach below the diagonal."""
    EACH: tl.constexpr = S // T
    row, column = _below_diagonal(index // EACH)
    return (row * EACH + index % EACH) * T, column * S


@triton.jit
def tile_of_slot(
    matrices, factors, numbers, rows, lengths, strides, starts, ends, T: tl.constexpr, C: tl.constexpr,
    TURNS: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """First row, first column in the buffer, and a tile of a matrix (T, C) float32, with zeros up to a whole tile.

    TURNS: the matrices are contiguous along the rows, and a tile is turned. factors: of all matrices, by number.
    """
    which, program = matrix_of_program(ends)
    matrix, length, stride = chosen(which, matrices), chosen(which, lengths), chosen(which, strides)
    blocks = tl.cdiv(rows, T)
    row, column = (program % blocks) * T, (program // blocks) * C
    i, j = row + tl.arange(0, T), column + tl.arange(0, C)
    if TURNS:
        mask = (j < length)[:, None] & (i < rows)[None, :]
        value = tl.trans(tl.load(matrix + j[:, None].to(tl.int64) * stride + i[None, :], mask=mask, other=0.0))
    else:
        mask = (i < rows)[:, None] & (j < length)[None, :]
        value = tl.load(matrix + i[:, None].to(tl.int64) * stride + j[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    if HAS_FACTORS:
        value *= tl.load(factors + chosen(which, numbers))
    return row, chosen(which, starts) + column, value


@triton.jit
def squares_summed(matrix, row, rows, T: tl.constexpr, K: tl.constexpr):
    """The sum of squares of T rows of a matrix (rows, rows), from a row on."""
    i, k = (row + tl.arange(0, T))[:, None], tl.arange(0, K)[None, :]
    total = tl.zeros((T, K), dtype=tl.float32)
    for start in range(0, rows, K):
        mask = (i < rows) & (start + k < rows)
        value = tl.load(matrix + i.to(tl.int64) * rows + (start + k), mask=mask, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(tl.sum(total, axis=1), axis=0)


class Tile(NamedTuple):
    """How a product is computed; rows, columns and depth are powers of two of at least 16, of FP8 32."""

    rows: int
    columns: int
    """Of a symmetric matrix a multiple of the rows; of X a multiple of the depth of its Gram matrices."""
    depth: int
    """Terms that are summed at a time."""
    warps: int
    stages: int


class Tiles(NamedTuple):
    """How the three products of a step are computed."""

    gram: Tile
    square: Tile
    apply: Tile
    """Of the product with X."""
    whole: bool = False
    """Whether tiles are read and written through descriptors (`tile_access`)."""


def are_whole(tiles: Tiles, rows: int) -> bool:
    """Whether matrices of so many rows are whole tiles; those of X are padded to whole tiles along their columns.

    Rows of a matrix in memory are then of whole multiples of 16 bytes, as descriptors ask.
    """
    sides = (*tiles.gram[:2], *tiles.square[:3], tiles.apply.rows, tiles.apply.depth)
    return not any(rows % side for side in sides)


def tiles_for(
    rows: int, dtype: torch.dtype, device: torch.device, masked: Mapping[int, Tiles], whole: Mapping[int, Tiles]
) -> Tiles:
    """The entry of a table: of that with whole tiles where device, rows and dtype allow them."""
    found = entry_for(rows, whole)
    if takes_descriptors(dtype, device) and are_whole(found, rows):
        return found
    return entry_for(rows, masked)


def entry_for(rows: int, table: Mapping[int, Tiles]) -> Tiles:
    """That of a table by the most rows that each is for."""
    return next(tiles for most, tiles in sorted(table.items()) if rows <= most)


FILLED_ROWS = 32
"""Rows of a tile that is copied into the buffer; as many columns as a tile of it has."""


class SideBySide:
    """Where at most `GROUP_LIMIT` matrices whose shorter sides are equal lie: each turned so that its rows are fewer.

    The widest come first, whose sums are the longest: what begins last should end soon. columns: of a tile.
    """

    def __init__(self, matrices: Sequence[Tensor], columns: int) -> None:
        self.matrices, self.columns, self.count = matrices, columns, len(matrices)
        self.rows = min(matrices[0].shape)
        tiles = [ceil_div(max(matrix.shape), columns) for matrix in matrices]
        order = sorted(range(self.count), key=lambda index: -tiles[index])
        ends = list(itertools.accumulate(tiles[index] for index in order))
        self.width = ends[-1] * columns
        self.starts = [0] * self.count
        for index, end in zip(order, ends, strict=True):
            self.starts[index] = (end - tiles[index]) * columns
        self.ends = [*ends, *[ends[-1]] * (GROUP_LIMIT - self.count)]

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A buffer (rows, width)."""
        return torch.empty(self.rows, self.width, dtype=dtype, device=self.matrices[0].device)

    def squares(self, dtype: torch.dtype) -> Tensor:
        """For each matrix one of (rows, rows)."""
        return torch.empty(self.count, self.rows, self.rows, dtype=dtype, device=self.matrices[0].device)

    def fills(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Programs and arguments of each launch that copies the matrices: one for each order of their values."""
        views = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in self.matrices]
        views = [view if 1 in view.stride() else view.contiguous() for view in views]
        for indices in launches(views, lambda view: view.stride(1) != 1):
            turns = views[indices[0]].stride(1) != 1
            chosen_views = [views[index] for index in indices]
            lengths = tuple(view.shape[1] for view in chosen_views)
            blocks = ceil_div(self.rows, FILLED_ROWS)
            ends = tuple(itertools.accumulate(blocks * ceil_div(length, self.columns) for length in lengths))
            yield ends[-1], {
                "matrices": tuple(chosen_views), "numbers": tuple(indices), "rows": self.rows, "width": self.width,
                "lengths": lengths, "strides": tuple(view.stride(0 if not turns else 1) for view in chosen_views),
                "starts": tuple(self.starts[index] for index in indices), "ends": ends, "T": FILLED_ROWS,
                "C": self.columns, "TURNS": turns,
            }  # fmt: skip

    def slots(self, x: Tensor) -> list[Tensor]:
        """The parts of a buffer that the matrices have, in their shapes."""
        return [_slot(x, start, matrix) for start, matrix in zip(self.starts, self.matrices, strict=True)]


def _slot(x: Tensor, start: int, matrix: Tensor) -> Tensor:
    tall = matrix.shape[0] > matrix.shape[1]
    view = x[:, start : start + max(matrix.shape)]
    return view.T if tall else view


def tiles_below(rows: int, height: int, columns: int) -> int:
    """Tiles (height, columns) of a symmetric matrix that reach below its diagonal; columns a multiple of the height."""
    across = ceil_div(rows, columns)
    return columns // height * (across * (across + 1) // 2)
