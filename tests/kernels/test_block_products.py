"""Products of Newton-Schulz read by whole blocks are those of the kernels that read with masks."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from tests.kernels.comparison import OPERAND_TYPES, both, normal

blocks = pytest.importorskip("qgalore.kernels.triton.block_products", reason="Triton is not installed")
blocks_fp8 = pytest.importorskip("qgalore.kernels.triton.block_products_fp8")
matrix_groups = pytest.importorskip("qgalore.kernels.triton.matrix_groups")
newton_schulz = pytest.importorskip("qgalore.kernels.triton.newton_schulz")
newton_schulz_fp8 = pytest.importorskip("qgalore.kernels.triton.newton_schulz_fp8")

TILE = (16, 32, 32, 4, 2)
WAYS = {
    "pointers": {"tma": False}, "descriptors": {}, "descriptors at the end, too": {"stores": True},
    "in turn": {"programs": 2, "overlaps": True}, "twice": {"twice": True},
}  # fmt: skip
SHAPES = [(64, 70), (64, 64)]


@pytest.fixture(autouse=True)
def _interpreted_or_on_a_gpu(kernel_device: torch.device) -> None:
    if kernel_device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU or its interpreter")
    if kernel_device.type == "cuda" and torch.cuda.get_device_capability(kernel_device) < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")


def matrices(device: torch.device) -> list[Tensor]:
    return [normal(*shape, seed=i).to(device, OPERAND_TYPES[-1]) / 8 for i, shape in enumerate(SHAPES)]


def alike(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """On a GPU to the bit; NumPy sums up transposed factors in another order."""
    if one.is_cuda:
        return torch.equal(one.float(), other.float()) and bool(one.float().any())
    return bool((one.float() - other.float()).norm() < tolerance * one.float().norm())


@pytest.mark.parametrize(
    ("way", "in_segments"), [*[(way, False) for way in WAYS if way != "twice"], ("descriptors at the end, too", True)]
)
def test_products(way: str, in_segments: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In segments of tiles over the diagonal one side is stored, by pointers."""
    how = matrix_groups.Blocks(TILE, **WAYS[way])
    monkeypatch.setattr(newton_schulz, "TILES", {1 << 30: newton_schulz.Tiles(TILE, TILE)})
    group = newton_schulz._Group(matrices(kernel_device), in_segments)
    group._fill(None)
    (gram, other), (square, found) = group._squares(2), group._squares(2)
    ends, scale = group._side_by_side.ends[: len(SHAPES)], torch.tensor([0.5, 2.0], device=kernel_device)
    group._gram(gram, 0.5)
    blocks.gram(how, group._x, other, ends, TILE[1], 0.5, in_segments)
    assert alike(gram, other)
    for scales in (0, 2):
        group._square(gram, gram, square, (0.5, 2.0, 0.25), scale, scales)
        blocks.square(how, gram, gram, found, (0.5, 2.0, 0.25), scale, scales, in_segments)
        assert alike(square, found)
    for given in (None, scale):
        group._apply(square, 3.0, given, group._out)
        applied = torch.empty_like(group._x)
        blocks.apply(how, group._x, square, applied, ends, 3.0, given)
        assert alike(group._out, applied)


@pytest.mark.parametrize("way", WAYS)
def test_products_in_fp8(way: str, kernel_device: torch.device) -> None:
    how, columns = matrix_groups.Blocks(TILE, **WAYS[way]), TILE[1]
    group = newton_schulz_fp8._Group(matrices(kernel_device), newton_schulz_fp8.Tiles(TILE, TILE))
    group._fill()
    group._form_gram(128.0)
    group._square((3.0, -4.0, 2.0), 128.0)
    first, second = group._diagonals
    written = group._gram, group._gram8, group._even8, first, second
    expected = [x.clone() for x in written]
    exact, ends = newton_schulz_fp8._SUMMED, group._side_by_side.ends[: len(SHAPES)]
    for x in written:
        x.view(torch.uint8).zero_()
    blocks_fp8.gram(how, group._x8, group._gram, group._gram8, first, ends, columns, group._scale**-2, 128.0, exact)
    factors = (3.0, -4.0, 2.0, 128.0**-2, newton_schulz_fp8.FACTOR)
    blocks_fp8.square(how, group._gram, group._gram8, first, group._even8, second, factors, exact)
    for one, other in zip(expected, written, strict=True):
        assert alike(one, other, 2e-3)
    if how.twice:
        return
    x, x8, out = group._x.clone(), torch.zeros_like(group._x8), torch.zeros_like(group._out)
    factor = 1.0 / (newton_schulz_fp8.FACTOR * group._scale)
    blocks_fp8.apply(how, x, x8, group._turned, out, group._even8, second, ends, factor, group._scale, False)
    group._apply(last=False)
    for one, other in zip((group._x, group._x8, group._out), (x, x8, out), strict=True):
        assert alike(one, other, 2e-3)


@pytest.mark.parametrize("segments", [None, (2,)])
def test_a_table_chooses_them(
    segments: tuple[int, ...] | None, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are whole tiles; other matrices are made as before."""
    called = []
    how = matrix_groups.Blocks(TILE, stores=True)
    for name in ("gram", "square", "apply"):
        run = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *given, run=run, name=name: (called.append(name), run(*given))[1])
    table = {1 << 30: newton_schulz.Tiles(TILE, TILE, matrix_groups.BlockProducts(how, how, how))}
    monkeypatch.setattr(newton_schulz, "TILES", table)
    steps = [(8.4703, -25.1081, 18.6293), (3.8944, -2.7889, 0.51)]
    for rows, names in ((64, {"gram", "square", "apply"}), (56, set())):
        called.clear()
        given = [normal(rows, columns, seed=columns).to(kernel_device, OPERAND_TYPES[-1]) for columns in (70, 64)]
        expected, found = both(lambda given=given: kernels.orthogonalize(given, steps, segments))
        for one, other in zip(expected, found, strict=True):
            assert (one.float() - other.float()).norm() <= (0.05 if one.is_cuda else 1e-4) * one.float().norm()
        assert set(called) == names


def test_a_table_chooses_them_in_fp8(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    how = matrix_groups.Blocks(TILE, stores=True)
    table = {1 << 30: newton_schulz.Tiles(TILE, TILE, matrix_groups.BlockProducts(how, how._replace(twice=True), how))}
    steps = [(3.4445, -4.7750, 2.0315)] * 2
    given = matrices(kernel_device)
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    monkeypatch.setattr(newton_schulz_fp8, "TILES", {1 << 30: newton_schulz.Tiles(TILE, TILE)})
    expected = kernels.orthogonalize_fp8(given, steps)
    monkeypatch.setattr(newton_schulz_fp8, "TILES", table)
    assert newton_schulz_fp8._least_rows(64) == 256
    for one, other in zip(expected, kernels.orthogonalize_fp8(given, steps), strict=True):
        assert alike(one, other, 0.02)
