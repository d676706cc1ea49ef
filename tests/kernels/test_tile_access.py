"""Products of Newton-Schulz through descriptors are those by pointers with masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from tests.kernels.comparison import OPERAND_TYPES, WIDE_TILES, each, normal, use_tiles

tile_access = pytest.importorskip("qgalore.kernels.triton.tile_access", reason="Triton is not installed")
matrix_groups = pytest.importorskip("qgalore.kernels.triton.matrix_groups")
newton_schulz = pytest.importorskip("qgalore.kernels.triton.newton_schulz")
newton_schulz_fp8 = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
corner, rows_of, store = matrix_groups.corner, tile_access.rows_of, newton_schulz._store

POLYNOMIALS = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51), (1.875, -1.25, 0.375)]
MUON = [(3.4445, -4.7750, 2.0315)] * 3
FORMS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "plain": lambda matrices: kernels.orthogonalize(matrices, POLYNOMIALS),
    "segments": lambda matrices: kernels.orthogonalize(matrices, POLYNOMIALS, (1, 2)),
    "fp8": lambda matrices: kernels.orthogonalize_fp8(matrices, MUON),
    "fp8, Schatten norm": lambda matrices: kernels.orthogonalize_fp8(matrices, MUON, schatten_norm=True),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Descriptors that Triton's kernels were given."""
    descriptors: list[Any] = []
    kind = tile_access.TensorDescriptor
    monkeypatch.setattr(
        tile_access, "TensorDescriptor", lambda *given: (descriptors.append(kind(*given)), descriptors[-1])[1]
    )
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    yield descriptors


def skip_without_descriptors(device: torch.device) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU or its interpreter")
    if device.type == "cuda" and not tile_access.takes_descriptors(torch.bfloat16, device):
        pytest.skip("tiles go through descriptors on Hopper alone")


def matrices_of(rows: int, device: torch.device, dtype: torch.dtype = OPERAND_TYPES[-1]) -> list[Tensor]:
    """Wide, square and tall."""
    shapes = [(rows, rows + 38), (rows, rows), (2 * rows + 11, rows)]
    return [normal(*shape, seed=index).to(device, dtype) for index, shape in enumerate(shapes)]


@each("rows", (64, 56))
@each("form", FORMS)
def test_descriptors(
    form: str, rows: int, kernel_device: torch.device, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are whole tiles, by tiles that reach over the diagonal; and those of 56 rows by pointers."""
    skip_without_descriptors(kernel_device)
    given, module = matrices_of(rows, kernel_device), newton_schulz_fp8 if "fp8" in form else newton_schulz
    use_tiles(monkeypatch, module, WIDE_TILES)
    expected = FORMS[form](given)
    assert not made
    use_tiles(monkeypatch, module, WIDE_TILES, whole=True)
    found = FORMS[form](given)
    assert bool(made) == (rows == 64)
    for one, other in zip(expected, found, strict=True):
        assert one.float().any()
        if kernel_device.type == "cuda" or "fp8" in form or rows == 56:
            assert torch.equal(one, other)
        else:  # NumPy sums up transposed factors in another order
            assert (one - other).norm() <= 1e-5 * one.norm()


@each("form", FORMS)
def test_a_descriptor_is_made_once(
    form: str, kernel_device: torch.device, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each buffer of a group, whatever the number of steps: that takes longer than a launch."""
    skip_without_descriptors(kernel_device)
    use_tiles(monkeypatch, newton_schulz, WIDE_TILES, whole=True)
    use_tiles(monkeypatch, newton_schulz_fp8, WIDE_TILES, whole=True)
    FORMS[form](matrices_of(32, kernel_device))
    ways = {(each.base.data_ptr(), each.base.dtype, tuple(each.block_shape)) for each in made}
    assert len(ways) == len(made) > 0


# ---- symmetric matrices


@triton.jit
def _copy_kernel(
    values, out, tiled, turned, rows, T: tl.constexpr, S: tl.constexpr, ONCE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Store the tiles of `values` (count, rows, rows) that reach below the diagonals, as products are stored."""
    row, column = corner(tl.program_id(0), T, S)
    base = tl.program_id(1) * rows
    value = rows_of(values, base, row, rows, column, rows, rows, T, S, False)
    store(out, tiled, turned, base, row, column, rows, value, ONCE, WHOLE)


@pytest.mark.parametrize(("rows", "whole"), [(40, False), (64, False), (64, True)])
@pytest.mark.parametrize("once", [False, True])
@each("size", [(16, 32), (16, 64), (32, 32)])
def test_symmetric_stores(
    rows: int, size: tuple[int, int], once: bool, whole: bool, kernel_device: torch.device
) -> None:
    """By tiles that reach over the diagonal; where values of both sides differ, those on and below it are written.

    So is every value, and nothing behind the last matrix.
    """
    skip_without_descriptors(kernel_device)
    count = 2
    values = torch.arange(count * rows * rows, dtype=torch.float32, device=kernel_device).view(count, rows, rows)
    expected = values.tril() + values.tril(-1).mT
    out = torch.full((count + 1, rows, rows), torch.nan, device=kernel_device)
    tiled = tile_access.Tiled(whole)
    _copy_kernel[(matrix_groups.tiles_below(rows, *size), count)](
        values if once else expected, out, tiled(out, *size), tiled(out, *reversed(size)), rows, *size, once, whole
    )
    assert torch.equal(out[:count], expected) and out[count].isnan().all()


def test_what_goes_through_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, tables = torch.device("cuda", 7), (newton_schulz.TILES, newton_schulz.WHOLE_TILES)
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    chosen = [matrix_groups.tiles_for(rows, torch.bfloat16, gpu, *tables) for rows in (448, 512, 1000, 1024, 4096)]
    assert [tiles.whole for tiles in chosen] == [False, True, False, True, True]
    assert chosen[2] == newton_schulz.TILES[1024] and chosen[3] == newton_schulz.WHOLE_TILES[1024]
    assert matrix_groups.tiles_for(1024, torch.float32, gpu, *tables) == newton_schulz.TILES[1024]
    assert matrix_groups.tiles_for(1024, torch.float16, gpu, *tables).whole
    assert not matrix_groups.tiles_for(1024, torch.bfloat16, torch.device("cpu"), *tables).whole
    for capability[0] in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not matrix_groups.tiles_for(1024, torch.bfloat16, gpu, *tables).whole
    capability[0] = (9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not matrix_groups.tiles_for(1024, torch.bfloat16, gpu, *tables).whole


@each("side", range(7))
def test_rows_are_whole_tiles_of_every_side_of_them(side: int) -> None:
    """Which columns of X are by their padding."""
    sides = [32] * 7
    sides[side] = 64
    tiles = matrix_groups.Tiles(
        matrix_groups.Tile(*sides[:2], 1024, 4, 3), matrix_groups.Tile(*sides[2:5], 4, 3),
        matrix_groups.Tile(sides[5], 1024, sides[6], 4, 3), whole=True,
    )  # fmt: skip
    assert matrix_groups.are_whole(tiles, 192) and not matrix_groups.are_whole(tiles, 96)


@pytest.mark.parametrize("module", [newton_schulz, newton_schulz_fp8])
def test_tables_of_tiles(module: Any) -> None:
    for table, whole in ((module.TILES, False), (module.WHOLE_TILES, True)):
        assert max(table) >= 1 << 30
        for tiles in table.values():
            assert tiles.whole == whole and tiles.apply.columns % tiles.gram.depth == 0
            assert tiles.gram.columns % tiles.gram.rows == tiles.square.columns % tiles.square.rows == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each("rows", (768, 1024, 1000, 2048))
@each("form", FORMS)
def test_tiles_of_the_tables_have_the_bits_of_those_with_masks(
    form: str, rows: int, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    skip_without_descriptors(device)
    given = matrices_of(rows, device, torch.bfloat16)
    found = FORMS[form](given)
    assert bool(made) == (rows != 1000)
    monkeypatch.setattr(matrix_groups, "takes_descriptors", lambda dtype, device: False)
    for one, other in zip(FORMS[form](given), found, strict=True):
        assert one.float().any() and torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each("form", FORMS)
def test_descriptors_are_captured(form: str, made: list[Any]) -> None:
    """A graph has their values, not their addresses on the host."""
    device = torch.device("cuda")
    skip_without_descriptors(device)
    given = matrices_of(1024, device, torch.bfloat16)
    expected = FORMS[form](given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = FORMS[form](given)
    assert made
    made.clear()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
