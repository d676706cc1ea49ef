"""Bases and projections: orthonormalisation, the SVD, similarity, rotated moments, streaming."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qgalore.subspace import fit

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rank: int, d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, rank, seed=seed))[0].T.contiguous()


def similarity(new: Tensor, old: Tensor) -> Tensor:
    return fit.similarity(new, old, new @ old.T)


def projector(basis: Tensor) -> Tensor:
    basis = basis.double()
    return basis.T @ basis


def with_spectrum(spectrum: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix (m, n) with these singular values."""
    k = spectrum.numel()
    left, right = orthonormal(k, m, seed).double(), orthonormal(k, n, seed + 1).double()
    return (left.T * spectrum.double() @ right).float()


# ---- start and projection


@pytest.mark.parametrize(("rank", "d"), [(8, 40), (8, 8), (1, 3)])
def test_random_basis_is_orthonormal_and_seeded(rank: int, d: int) -> None:
    basis = fit.random_basis(rank, d, 0, CPU)
    assert basis.shape == (rank, d) and torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-5)
    assert torch.equal(basis, fit.random_basis(rank, d, 0, CPU))
    assert not torch.equal(basis, fit.random_basis(rank, d, 1, CPU))
    torch.manual_seed(5)
    assert torch.equal(basis, fit.random_basis(rank, d, 0, CPU)), "no global generator"


def test_random_matrix_has_mean_0_and_variance_1() -> None:
    """In each place of the words that it is drawn in, and for sizes that no word divides."""
    matrix = fit.random_matrix(500, 800, 3, CPU)
    places = matrix.view(-1, 8)
    assert (places.mean(0).abs() < 0.02).all() and ((places.var(0) - 1).abs() < 0.02).all()
    assert matrix.unique().numel() == 256
    odd = fit.random_matrix(3, 7, 3, CPU)
    assert odd.shape == (3, 7) and torch.equal(odd, fit.random_matrix(3, 7, 3, CPU))


@pytest.mark.parametrize("sides", ["left", "right", "both"])
@pytest.mark.parametrize("tokens", [3, 500])
def test_projection_from_factors_is_that_of_the_gradient(tokens: int, sides: str) -> None:
    g, x = normal(tokens, 24), normal(tokens, 40, seed=1)
    left = orthonormal(5, 24) if sides != "right" else None
    right = orthonormal(5, 40) if sides != "left" else None
    expected = (g.T @ x).double()
    expected = expected if left is None else left.double() @ expected
    expected = expected if right is None else expected @ right.double().T
    for found in (fit.project(g.T @ x, left, right), fit.project_factors(g, x, (24, 40), left, right)):
        assert torch.allclose(found.double(), expected, atol=1e-4)


# ---- orthonormalize


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e8, 1e10, 1e12])
def test_basis_is_orthonormal_for_any_condition(condition: float) -> None:
    rank, d = 12, 64
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), rank, dtype=torch.float64)
    sketch = with_spectrum(spectrum, rank, d)
    basis, worked = fit.orthonormalize(sketch, orthonormal(rank, d, seed=9))
    assert bool(worked)
    assert torch.allclose(basis @ basis.T, torch.eye(rank), atol=3e-6 if condition <= 1e6 else 1e-4)
    # What the sketch says above the noise of float32 lies in the span, with the same weight or more.
    residual = sketch.double() - sketch.double() @ projector(basis)
    assert residual.norm() < 2e-5 * sketch.double().norm()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_span_is_that_of_the_sketch(condition: float) -> None:
    sketch = with_spectrum(torch.logspace(0, -torch.tensor(condition).log10().item(), 8), 8, 50)
    basis, worked = fit.orthonormalize(sketch, orthonormal(8, 50, seed=9))
    exact = torch.linalg.qr(sketch.double().T)[0].T
    assert bool(worked)
    assert (projector(basis) - projector(exact)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1e-10, 1e10])
def test_size_of_the_sketch_does_not_matter(size: float) -> None:
    rows = normal(6, 30) * torch.logspace(0, 4, 6)[:, None]
    basis, worked = fit.orthonormalize(rows * size, orthonormal(6, 30, seed=9))
    expected, _ = fit.orthonormalize(rows, orthonormal(6, 30, seed=9))
    assert bool(worked)
    assert float(similarity(basis, expected)) > 0.999


def test_a_sketch_of_lower_rank_is_filled_up() -> None:
    sketch = normal(8, 3) @ normal(3, 40, seed=1)
    basis, worked = fit.orthonormalize(sketch, orthonormal(8, 40, seed=9))
    assert not bool(worked) or torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-2)
    if bool(worked):
        assert (sketch - sketch @ projector(basis).float()).norm() < 1e-3 * sketch.norm()


@pytest.mark.parametrize("seed", range(5))
def test_a_row_that_is_there_twice_does_not_end_in_the_old_basis(seed: int) -> None:
    sketch = normal(8, 40, seed=seed)
    sketch[5] = sketch[1]
    basis, worked = fit.orthonormalize(sketch, orthonormal(8, 40, seed=9))
    assert bool(worked) and torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-5)
    assert (sketch - sketch @ projector(basis).float()).norm() < 1e-5 * sketch.norm()


def test_rows_without_a_sketch_come_from_the_old_basis() -> None:
    old, sketch = orthonormal(6, 40, seed=9), normal(6, 40)
    sketch[2] = 0.0
    basis, worked = fit.orthonormalize(sketch, old)
    assert bool(worked)
    assert torch.allclose(basis @ basis.T, torch.eye(6), atol=1e-3)
    assert (old[2] - old[2] @ projector(basis).float()).norm() < 1e-3
    nothing, worked = fit.orthonormalize(torch.zeros(6, 40), old)
    assert bool(worked) and torch.allclose(nothing, old, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_old_basis_is_kept_for_a_sketch_that_is_not_finite(bad: float) -> None:
    old, sketch = orthonormal(6, 40, seed=9), normal(6, 40)
    sketch[3, 7] = bad
    basis, worked = fit.orthonormalize(sketch, old)
    assert not bool(worked)
    assert torch.equal(basis, old)


# ---- the SVD


@pytest.mark.parametrize("seed", [None, 3], ids=["full", "randomized"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24), (32, 32)])
def test_svd_finds_the_top_subspace(m: int, n: int, side: str, seed: int | None) -> None:
    spectrum = torch.cat((torch.linspace(10, 5, 6), torch.linspace(1, 0.1, 18)))
    grad = with_spectrum(spectrum, m, n)
    basis = fit.fit_svd(grad, 6, side, seed)
    assert basis is not None and basis.shape == (6, m if side == "left" else n)
    assert torch.allclose(basis @ basis.T, torch.eye(6), atol=1e-4)
    U, _, Vh = torch.linalg.svd(grad.double())
    exact = U[:, :6].T if side == "left" else Vh[:6]
    assert (projector(basis) - projector(exact)).abs().max() < 1e-3


@pytest.mark.parametrize("seed", [None, 3], ids=["full", "randomized"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_svd_of_a_gradient_that_is_not_finite_is_none(bad: float, seed: int | None) -> None:
    grad = normal(24, 40)
    grad[1, 2] = bad
    assert fit.fit_svd(grad, 4, "left", seed) is None


def test_signs_are_those_of_the_old_rows() -> None:
    old = orthonormal(4, 9)
    new = (torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]) * old + 0.1 * orthonormal(4, 9, 5)).contiguous()
    turned = fit.with_signs_of(new, old)
    assert torch.equal(turned.abs(), new.abs()) and ((turned * old).sum(1) > 0.5).all()
    assert torch.equal(fit.with_signs_of(new, torch.zeros_like(old)), new), "where nothing is known they stay"


def test_svd_takes_rank_up_to_the_whole_side() -> None:
    for seed in (None, 3):
        basis = fit.fit_svd(normal(12, 40), 12, "left", seed)
        assert basis is not None
        assert torch.allclose(basis @ basis.T, torch.eye(12), atol=1e-4)


# ---- similarity


def test_similarity_sees_neither_signs_nor_order_nor_rotation() -> None:
    basis = orthonormal(6, 64)
    rotation = torch.linalg.qr(normal(6, 6, seed=4))[0]
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])[:, None]
    for same in (basis, -basis, basis * signs, basis.flip(0), rotation @ basis):
        assert float(similarity(same, basis)) == pytest.approx(1.0, abs=1e-5)


def test_similarity_of_other_subspaces() -> None:
    eye = torch.eye(64)
    assert float(similarity(eye[:6], eye[6:12])) == 0.0
    assert float(similarity(eye[:6], eye[3:9])) == pytest.approx(0.5)
    random = [float(similarity(orthonormal(16, 128, s), orthonormal(16, 128, s + 50))) for s in range(20)]
    assert sum(random) / 20 == pytest.approx(16 / 128, rel=0.05)


def test_similarity_divides_out_the_length_of_quantized_rows() -> None:
    basis = orthonormal(6, 64)
    assert float(similarity(1.05 * basis, 0.9 * basis)) == pytest.approx(1.0, abs=1e-5)


# ---- rotated moments


@pytest.mark.parametrize("side", ["left", "right"])
def test_rotating_into_the_same_basis_is_the_identity(side: str) -> None:
    basis = orthonormal(6, 40)
    shape = (6, 9) if side == "left" else (9, 6)
    first, second = normal(*shape), normal(*shape, seed=1).square()
    rotated = [fit.rotate_moment(m, basis @ basis.T, side, power) for power, m in ((1, first), (2, second))]
    assert torch.allclose(rotated[0], first, atol=1e-5) and torch.allclose(rotated[1], second, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rotation_follows_its_definition(side: str) -> None:
    old, new = orthonormal(5, 12, 1), orthonormal(5, 12, 2)
    shape = (5, 7) if side == "left" else (7, 5)
    first, second = normal(*shape), normal(*shape, seed=1).square()
    change = new @ old.T
    rotated = [fit.rotate_moment(m, change, side, power) for power, m in ((1, first), (2, second))]
    for i in range(5):
        for j in range(7):
            at = (i, j) if side == "left" else (j, i)
            pairs: list[Any] = [((k, j) if side == "left" else (j, k), change[i, k]) for k in range(5)]
            assert rotated[0][at] == pytest.approx(sum(float(c * first[where]) for where, c in pairs), abs=1e-5)
            assert rotated[1][at] == pytest.approx(sum(float(c * c * second[where]) for where, c in pairs), abs=1e-5)


def test_rotated_moment_is_the_old_direction_seen_in_the_new_basis() -> None:
    # A momentum that lies in both subspaces gives the same full-size direction before and after.
    shared = orthonormal(3, 30)
    rotation = torch.linalg.qr(normal(3, 3, seed=8))[0]
    first = normal(3, 9)
    new = rotation @ shared
    rotated = fit.rotate_moment(first, new @ shared.T, "left", 1)
    assert torch.allclose(new.T @ rotated, shared.T @ first, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "m", "n", "rank", "direct"),
    [
        # Where the two differ on an H100 (benchmarks of the first study): many tokens over a small matrix, and a rank
        # near the full one, are cheaper by way of the full gradient.
        (65536, 512, 512, 128, False),
        (65536, 1376, 512, 128, True),
        (4096, 4096, 4096, 1024, True),
        (4096, 11008, 4096, 1024, True),
        (65536, 4096, 4096, 4000, False),
    ],
)
def test_the_cheaper_order_is_chosen_by_shape(tokens: int, m: int, n: int, rank: int, direct: bool) -> None:
    assert fit.projects_directly(tokens, m, n, rank, "right") == direct
    assert fit.projects_directly(tokens, n, m, rank, "left") == direct
