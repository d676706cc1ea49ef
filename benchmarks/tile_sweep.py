"""Time of single products of Newton-Schulz with each candidate for their tiles, with masks and through descriptors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.timing import median_ms
from qgalore.kernels.triton import newton_schulz, newton_schulz_fp8
from qgalore.kernels.triton.matrix_groups import Tile, Tiles, entry_for, tiles_for

OPS = ("gram", "square", "apply")
CALLS = 10  # in one graph
MASKED = (
    (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
"""Rows and columns of a tile, terms summed at a time, warps, stages."""
WHOLE = (
    (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 32, 4, 6), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
"""The same through descriptors."""
FP8_MASKED = (
    (64, 64, 128, 4, 3), (64, 128, 128, 4, 3), (64, 128, 128, 4, 4), (128, 128, 64, 4, 4), (128, 128, 128, 4, 3),
    (128, 128, 128, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
"""Both in FP8."""
FP8_WHOLE = (
    (64, 128, 128, 4, 3), (64, 128, 128, 4, 4), (128, 128, 64, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 3),
    (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4),
)  # fmt: skip

Products = dict[str, Callable[[], object]]
Append = Callable[[str, str, str, str, str, int, Mapping[str, float]], None]
"""Writes a row of model, op, method, form, shape, matrices and times."""


class Rates(Protocol):
    """Of large products on a device, operations a second, two for a multiply-add."""

    device: torch.device
    dtype: torch.dtype
    rate: float
    fp8_rate: float


class Case(NamedTuple):
    """Matrices of a model that are updated at once."""

    model: str
    matrices: Sequence[Tensor]
    fp8: bool

    def candidates(self) -> list[Tiles]:
        """The tiles of today's tables, then others, as far as the device and the rows take them."""
        masked, whole = (FP8_MASKED, FP8_WHOLE) if self.fp8 else (MASKED, WHOLE)
        found = [self.chosen(), entry_for(len(self.matrices[0]), self._kernels().TILES)]
        found += [_tiles(given, whole=False) for given in masked]
        return found + [
            tiles for given in whole if (tiles := self._allowed({1 << 30: _tiles(given, whole=True)})).whole
        ]

    def chosen(self) -> Tiles:
        """What the tables have for these matrices."""
        return self._allowed(self._kernels().WHOLE_TILES)

    def _kernels(self) -> ModuleType:
        return newton_schulz_fp8 if self.fp8 else newton_schulz

    def _allowed(self, whole: Mapping[int, Tiles]) -> Tiles:
        one = self.matrices[0]
        return tiles_for(len(one), one.dtype, one.device, self._kernels().TILES, whole)

    def products(self, tiles: Tiles) -> Products:
        """Each product of a step, in a group of its own."""
        return _fp8_products(self.matrices, tiles) if self.fp8 else _products(self.matrices, tiles)


def _tiles(given: tuple[int, int, int, int, int], whole: bool) -> Tiles:
    """The same for all products; those of symmetric ones are at least as wide as high."""
    height, columns, *rest = given
    symmetric = Tile(min(height, columns), max(height, columns), *rest)
    return Tiles(symmetric, symmetric, Tile(height, max(columns, rest[0]), *rest), whole)


def _products(matrices: Sequence[Tensor], tiles: Tiles) -> Products:
    group = newton_schulz._Group(matrices, in_segments=False, tiles=tiles)
    rows, width = matrices[0].shape
    group._x.copy_(torch.randn(group._x.shape, device=group._x.device) / width**0.5)
    first, second, out = group._squares(3)
    for square in (first, second):
        square.copy_(torch.eye(rows, device=square.device)[None])
    return {
        "gram": lambda: group._gram(out, 1.0),
        "square": lambda: group._square(first, second, out, (1.0, 1.0, 0.0), None, 0),
        "apply": lambda: group._apply(first, 1.0, None, group._out),
    }


def _fp8_products(matrices: Sequence[Tensor], tiles: Tiles) -> Products:
    group, polynomial = newton_schulz_fp8._Group(matrices, tiles), (3.0, -4.0, 2.0)
    group._fill()
    group._form_gram(1.0)
    group._square(polynomial, 1.0)
    return {
        "gram": lambda: group._form_gram(1.0),
        "square": lambda: group._square(polynomial, 1.0),
        "apply": lambda: group._apply(last=False),
    }


@contextlib.contextmanager
def _compiled_together() -> Iterator[None]:
    """Compile what is launched inside, all at a time, and launch nothing: one by one takes most of a sweep."""
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **how: run(self, *args, grid=grid, warmup=True, **how)
    try:
        with triton.AsyncCompileMode(ThreadPoolExecutor(os.cpu_count()), ignore_errors=True):
            yield
    finally:
        JITFunction.run = run


def sweep(case: Case, rates: Rates, repeats: int, append: Append) -> None:
    """Rows of each candidate, and a line for each product: its fastest tiles, beside those of today's tables."""
    candidates, times = case.candidates(), dict[tuple[str, Tile, bool], float]()
    if rates.device.type == "cuda":
        with _compiled_together():
            for tiles in candidates:
                with contextlib.suppress(Exception):  # which is said where it is timed
                    for run in case.products(tiles).values():
                        run()
    rows, width = case.matrices[0].shape
    for tiles in candidates:
        try:
            products = case.products(tiles)
        except Exception as error:  # of Triton, whose classes differ by version: more memory than the card has
            _say_failed(case, tiles.apply, error)
            continue
        for op, run in products.items():
            key = op, getattr(tiles, op), tiles.whole
            if key in times:
                continue
            try:
                times[key] = median_ms(lambda _, run=run: run(), rates.device, repeats, CALLS)
            except Exception as error:
                _say_failed(case, key[1], error)
                continue
            floor = _floor(op, case, rates)
            values = {"ms": times[key], "floor_ms": floor, "floor_full_ms": floor if op == "apply" else 2 * floor}
            shape, method = f"{rows}x{width}", "fp8" if case.fp8 else ""
            append(case.model, op, method, _name(key[1], tiles.whole), shape, len(case.matrices), values)
    for op in OPS:
        _say_fastest(op, case, times)


def _floor(op: str, case: Case, rates: Rates) -> float:
    rows, width = case.matrices[0].shape
    unit = 2e3 * len(case.matrices) * rows**2 / (rates.fp8_rate if case.fp8 else rates.rate)
    return unit * {"gram": width / 2, "square": rows / 2, "apply": width}[op]


def _name(tile: Tile, whole: bool) -> str:
    return "x".join(map(str, tile)) + (" whole" if whole else "")


def _say_failed(case: Case, tile: Tile, error: Exception) -> None:
    lines = str(error).splitlines() or [type(error).__name__]
    print(f"{case.model}: tiles {_name(tile, False)} do not run: {lines[0]}", file=sys.stderr)


def _say_fastest(op: str, case: Case, times: Mapping[tuple[str, Tile, bool], float]) -> None:
    parts, today = [], case.chosen()
    for whole, how in ((False, "with masks"), (True, "through descriptors")):
        if found := {tile: time for (of, tile, through), time in times.items() if (of, through) == (op, whole)}:
            best = min(found, key=lambda tile: found[tile])
            parts.append(f"{how} {_name(best, False)} {found[best]:.4f} ms")
    tile = getattr(today, op)
    took = times.get((op, tile, today.whole))
    parts.append(f"the table has {_name(tile, today.whole)}" + ("" if took is None else f" {took:.4f} ms"))
    kind = " in FP8" if case.fp8 else ""
    print(f"{case.model}, {len(case.matrices)} of {len(case.matrices[0])} rows, {op}{kind}: fastest {', '.join(parts)}")
