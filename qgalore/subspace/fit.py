"""Finding and changing the subspace of a gradient: bases as rows, projections, and Adam's moments in a new basis.

A basis is (rank, d): `rank` nearly orthonormal rows that span the subspace of R^d. With the gradient G (m, n) of a
weight (out_features, in_features), a left basis (d = m) gives the low-rank gradient R = left G (rank, n), a right one
(d = n) R = G rightᵀ (m, rank); both together R = left G rightᵀ. GaLore (arXiv 2403.03507) writes P = leftᵀ or rightᵀ.

Two ways to find it:
- `fit_svd`: the top singular vectors of G, as GaLore does, in full or by a randomized range finder with two power
  iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).
- streaming: one step of subspace iteration a refresh, warm-started. `sketch` gives Y = G T, linear in G, so it can be
  summed over micro-batches and ranks without ever forming G; `orthonormalize` turns it into a basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHOLESKY_SHIFT = 1e-12
COLUMNS_AT_ONCE = 1024
"""Of a sketch that are there in float64."""
_ORTHONORMAL_TOLERANCE = 1e-2


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """For values of any size, such as moments: float32 for float16, which holds nothing below 6e-8; others stay."""
    return torch.float32 if dtype == torch.float16 else dtype


def random_matrix(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Uniform in +-sqrt(3), so of variance 1, (rows, columns) float32: the same values on every device.

    Bytes are drawn, on the CPU and eight at a time: a test matrix needs no more, and 7B has 3 billion such numbers.
    """
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    words = torch.empty(-(-rows * columns // 8), dtype=torch.int64, device="cpu").random_(
        -(2**63), None, generator=generator
    )
    values = words.view(torch.uint8)[: rows * columns].to(device).float()
    return values.sub_(127.5).mul_(math.sqrt(12 / (256**2 - 1))).view(rows, columns)


def random_basis(rank: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    """A random orthonormal basis (rank, dimension), float32: where a subspace starts before any gradient is seen."""
    if device.type == "meta":
        return torch.empty(rank, dimension, device=device)
    matrix = random_matrix(rank, dimension, seed, device)
    return orthonormalize(matrix, matrix)[0]


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R = left G rightᵀ; None stands for the identity."""
    rows = grad if left is None else left.to(grad.dtype) @ grad
    return rows if right is None else rows @ right.to(grad.dtype).T


_OPERATIONS_PER_VALUE = 500
"""Operations that a GPU's tensor cores make in the time in which its memory moves one bfloat16 value (H100: 500)."""


def _product_cost(rows: int, inner: int, columns: int) -> float:
    """Time of a matrix product in values moved: bound by arithmetic or by memory, whichever is slower."""
    return max(2 * rows * inner * columns / _OPERATIONS_PER_VALUE, rows * inner + inner * columns + rows * columns)


def projects_directly(tokens: int, m: int, n: int, rank: int, side: str) -> bool:
    """Whether one-sided R is cheaper by `(g leftᵀ)ᵀ x` or `gᵀ(x rightᵀ)` than by the full gradient gᵀx.

    Directly it takes 2 T r (m + n) operations against 2 T m n + 2 m n r, but g and x are read and a (T, r) matrix is
    written and read: for small matrices under many tokens memory decides, and the full gradient is small then.
    """
    projected = n if side == "right" else m
    direct = _product_cost(tokens, projected, rank) + _product_cost(m + n - projected, tokens, rank)
    return direct < _product_cost(m, tokens, n) + _product_cost(m + n - projected, projected, rank)


def gradient(grad_output: Tensor, input: Tensor, shape: tuple[int, int]) -> Tensor:
    """gᵀx (m, n) from g (tokens, m) and x (tokens, n), either of which may have columns of zeros at the end."""
    product = grad_output.T @ input
    return product if product.shape == shape else product[: shape[0], : shape[1]].contiguous()


def _columns(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else x[:, :count]


def project_factors(
    grad_output: Tensor, input: Tensor, shape: tuple[int, int], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """R = left (gᵀx) rightᵀ from the factors of a gradient of `shape` (m, n), as in `gradient`, which is not formed."""
    m, n = shape
    if left is not None:
        grad_output, m = _columns(grad_output, m) @ left.to(grad_output.dtype).T, left.shape[0]
    if right is not None:
        input, n = _columns(input, n) @ right.to(input.dtype).T, right.shape[0]
    return gradient(grad_output, input, (m, n))


def orthonormalize(sketch: Tensor, old_basis: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (rank, d) of the rows of `sketch`, and a flag on the device: did it work.

    Cholesky-QR twice, with scaled rows and a small shift the first time (Fukaya et al., "Shifted Cholesky QR", SIAM J.
    Sci. Comput. 2020). The products of rows and their factor are in float64 that time, all else is in float32
    (Yamazaki, Tomov and Dongarra, "Mixed-precision Cholesky QR", SIAM J. Sci. Comput. 2015): orthonormal to 1e-6 for
    condition numbers up to 1e7 and to 1e-4 up to 1e12, which is finer than a basis is stored. In float32 alone four
    passes were needed, since the sketches of real gradients exceed 1e6. A row that is all zero is taken from
    `old_basis` (rank, d). Where the result is not orthonormal, as with a non-finite sketch, the old basis is kept.
    Nothing here waits for the device.
    """
    basis = sketch.float()
    finite = basis.norm(dim=1).isfinite().all()
    for dtype, shift in ((torch.float64, _CHOLESKY_SHIFT), (torch.float32, 0.0)):
        norm = basis.norm(dim=1, keepdim=True)
        basis = torch.where(norm > 0, basis / norm.clamp_min(1e-30), old_basis)
        factor, _ = torch.linalg.cholesky_ex(_row_products(basis, dtype, shift))
        basis = torch.linalg.solve_triangular(factor.float(), basis, upper=False)
    worked = (_row_products(basis, torch.float32, -1.0).abs().amax() < _ORTHONORMAL_TOLERANCE) & finite
    return torch.where(worked, basis, old_basis), worked


def _row_products(basis: Tensor, dtype: torch.dtype, shift: float) -> Tensor:
    """B Bᵀ + shift I in dtype, of a basis (rank, d) in float32."""
    if dtype == torch.float32:
        products = basis @ basis.T
    else:
        products = torch.zeros(len(basis), len(basis), dtype=dtype, device=basis.device)
        for part in basis.split(COLUMNS_AT_ONCE, dim=1):
            exact = part.to(dtype)
            products.addmm_(exact, exact.T)
            del exact
    products.diagonal().add_(shift)
    return products


def fit_svd(grad: Tensor, rank: int, side: str, seed: int | None = None) -> Tensor | None:
    """The top `rank` left or right singular vectors of G as rows (rank, d), float32; None if that failed.

    With a seed by a randomized range finder. It fails for a non-finite gradient or where the solver does not converge.
    """
    if not bool(grad.isfinite().all()):
        return None
    matrix = grad.float() if side == "left" else grad.float().T  # (d, other)
    try:
        if seed is None:
            vectors = _left_singular_vectors(matrix, rank)
        else:
            extra = min(rank + 8, min(matrix.shape))
            q = torch.linalg.qr(matrix @ random_matrix(matrix.shape[1], extra, seed, grad.device))[0]
            for _ in range(2):
                q = torch.linalg.qr(matrix.T @ q)[0]
                q = torch.linalg.qr(matrix @ q)[0]
            vectors = q @ _left_singular_vectors(q.T @ matrix, rank)
    except RuntimeError as error:  # LinAlgError is one, and so is what a solver of the device's library raises
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return vectors.T.contiguous()


def with_signs_of(basis: Tensor, old_basis: Tensor) -> Tensor:
    """The rows of `basis` (rank, d), turned so that none points away from the same row of the old basis.

    A singular vector is one only up to its sign, which a solver's last bits decide. Moments that stay when the basis
    changes belong to the old vectors: where a direction has stayed, so should its sign.
    """
    return torch.where((basis * old_basis).sum(1, keepdim=True) < 0, -basis, basis)


def _left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The top `rank` left singular vectors of M (d, other) as columns (d, rank), float32.

    They are eigenvectors of M Mᵀ, which float64 holds as exactly as float32 holds M, squares included. On a GPU that
    is an order of magnitude faster than an SVD, whose first result in a process was seen to differ from all later ones.
    """
    rows, columns = matrix.shape
    if rows > columns:
        q, triangle = torch.linalg.qr(matrix)
        vectors: Tensor = q @ _left_singular_vectors(triangle, rank)
        return vectors
    matrix = matrix.double()
    vectors = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors.flip(1)[:, :rank].float()


def similarity(new: Tensor, old: Tensor, change: Tensor) -> Tensor:
    """‖C‖²_F / rank in [0, 1] with the change of basis C = new oldᵀ: the mean squared cosine of the angles between.

    It sees neither the signs nor the order of the basis vectors; two random subspaces have rank / d. The norms of
    quantized bases, which are not quite 1, are divided out. float32, ().
    """
    of_change, of_new, of_old = (matrix.norm(dtype=torch.float32) for matrix in (change, new, old))
    cosine: Tensor = of_change / (of_new * of_old)
    return cosine.square() * new.shape[0]


def rotate_moment(moment: Tensor, change: Tensor, side: str, power: int) -> Tensor:
    """One of Adam's moments in a new basis: m <- C m and v <- (C ∘ C) v, on the side of the basis, in the dtype of C.

    power: 1 for m, 2 for v. For a right basis the moments are (m, rank) and C acts from the right. C ∘ C treats the old
    coordinates as uncorrelated.
    """
    change, moment = change.pow(power), moment.to(change.dtype)
    return change @ moment if side == "left" else moment @ change.T
