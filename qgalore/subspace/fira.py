"""What the projection leaves out of a gradient, brought back into the update at the size that Adam gives the rest.

Fira (Chen et al., arXiv 2410.01623) adds to the low-rank update of a weight the residual of its gradient, each column
scaled by what Adam did to the same column of the projected gradient. Here columns are those across the projected side.
"""

from __future__ import annotations

from torch import Tensor

from qgalore.subspace import fit


def full_direction(
    direction: Tensor, projected: Tensor, full: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """The direction (m, n) of a whole weight, in the dtype of `full`.

    direction: Adam's, like `projected`, the gradient that it was given, (rank, n) with a left basis or (m, rank) with a
    right one. full: the gradient (m, n), or of several micro-batches the last one's, scaled as if it were the mean of
    all.
    """
    side = 0 if right is None else 1
    norms = [part.float().norm(dim=side, keepdim=True) for part in (direction, projected)]
    scales = norms[0] / norms[1].clamp_min(1e-30)  # zero where nothing was projected
    scaled: Tensor = full * scales.to(full.dtype)
    basis = left if right is None else right
    assert basis is not None
    inside = direction.to(full.dtype) - fit.project(scaled, left, right)
    back: Tensor = basis.to(full.dtype).T @ inside if right is None else inside @ basis.to(full.dtype)
    return scaled + back
