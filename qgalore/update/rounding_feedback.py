"""Feed what the rounding of a quantized weight has lost into its momentum, so that the next updates make up for it.

The idea is ECO's (Nikdan et al., arXiv 2601.22101), for an orthogonalised momentum Cesista's
(leloykun.github.io/ponder/eco, 2026). Here it is derived anew, since Nesterov's momentum and the derivative of an
orthogonal factor ask for more.

How much. An update is W <- round(decay W - s c P): P (rows, columns) the orthogonal factor of Nesterov's momentum
beta m + (1 - beta) g, c = 0.2 sqrt(longer side), s the step size. What is lost is E = W_exact - W_stored. If P were
H^-1 times the momentum with a constant H, a change of the stored m by D would move W in the k-th next update by
-s c beta^(k+1) H^-1 D, k = 1, 2, ..., and in all by -s c beta^2 / (1 - beta) H^-1 D. So, for a share C of the error,

    D = -C (1 - beta) / (beta^2 s c) H E.

For plain SGD, without Nesterov, H = 1 and c = 1, that is C (1 - 1 / beta) / s E, ECO's rule: its factor lets the error
be made up for once, over the next 1 / (1 - beta) updates. Weight decay and the schedule of s are taken to stand still
over these.

In which directions. H is (M Mᵀ)^(1/2), the size of the momentum along each of its directions. But the length of each
row of P is fixed: a change of M only turns P. With P Pᵀ = 1 (rows the shorter side) and K = E Pᵀ, the errors that such
turns can make up for are T = E - (K + Kᵀ) / 2 P, and a change of M by

    H (E - K P) + (H A + A H) / 2 P,    A = (K - Kᵀ) / 2,    H = the symmetric part of P Mᵀ,

changes P by T to first order, and by nothing else. Of random errors T has 1 - rows / (2 columns), for a square matrix
half. H E alone, as in the sources, also turns P by what should have changed its length. The rest is lost as without
feedback, for instance a step so small that rounding to the nearest undoes it: it is parallel to P.

To first order only: a change larger than the momentum is cut to its norm. Where nothing was stepped nothing is fed.

Plain PyTorch, for one matrix at a time, on a GPU with products in bfloat16: 16 bytes a value, and twelve products of
the size of those of Newton-Schulz, which has ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore.layer.linear import LowRankLinear
from qgalore.update import moments
from qgalore.update.directions import ORTHOGONAL_RMS
from qgalore.update.weight import Weight

BYTES_PER_VALUE = 16
"""What `apply_with_feedback` takes at most beside a direction."""


def apply_with_feedback(layer: LowRankLinear, weight: Weight, direction: Tensor, skip: Tensor | None) -> None:
    """Update the quantized weight of a layer along a direction of its shape, and feed the error into the momentum.

    Where the flag `skip` is true, neither changes.
    """
    assert weight.config is not None
    row, beta = weight.step_row, weight.param_group["betas"][0]
    exact = _exact(layer.dequantized_weight(torch.float32), direction, row)
    layer.update_(direction, None, None, row, skip)
    dtype = _dtype_of_products(direction)
    error = exact.sub_(layer.dequantized_weight(torch.float32)).to(dtype)
    del exact
    size = ORTHOGONAL_RMS * max(direction.shape) ** 0.5
    change = pulled_back(error, direction / size, moments.read_moment(weight.state, "exp_avg", dtype))
    del error
    momentum = moments.read_moment(weight.state, "exp_avg")
    step_size = row.view(torch.float32)[2]
    wanted = weight.config.rounding_feedback * (1.0 - beta) / (beta**2 * size) / step_size
    # Infinite where nothing was stepped.
    largest = torch.linalg.vector_norm(momentum) / torch.linalg.vector_norm(change).clamp_min(1e-30)
    factor = torch.where(step_size > 0, torch.minimum(wanted, largest), 0.0)
    moments.write_moment(weight.state, "exp_avg", momentum - change.mul_(factor), skip)


def _exact(value: Tensor, direction: Tensor, row: Tensor) -> Tensor:
    """What the update would make of a weight without its rounding, float32; `qgalore.kernels.update_quantized_`."""
    # Scalars (), which may lie on a device: nothing waits for them.
    step_size, decay, _, _, growing = row.view(torch.float32)[2:7].unbind()
    full = direction.float()
    return torch.where(value * full >= 0, decay, growing).mul_(value).sub_(full * step_size)


def _dtype_of_products(direction: Tensor) -> torch.dtype:
    return torch.bfloat16 if direction.is_cuda else torch.float32


def pulled_back(error: Tensor, direction: Tensor, momentum: Tensor) -> Tensor:
    """The change of a momentum M that changes its orthogonal factor by what it can of an error, to first order.

    Returns float32 (m, n). error, M (m, n); direction: the factor by Newton-Schulz iteration, in whose singular values
    between 0.7 and 1.2 two more steps leave 2 % to the exact factor.
    """
    if direction.shape[0] > direction.shape[1]:
        return pulled_back(error.T, direction.T, momentum.T).T.contiguous()
    dtype = _dtype_of_products(direction)
    error, polar, momentum = error.to(dtype), direction.to(dtype), momentum.to(dtype)
    for _ in range(2):
        polar = 1.5 * polar - 0.5 * (polar @ polar.T) @ polar
    spectrum = polar @ momentum.T
    spectrum = (spectrum + spectrum.T) / 2  # H
    coordinates = error @ polar.T  # K
    turn = (coordinates - coordinates.T) / 2  # A
    inside = (spectrum @ turn + turn @ spectrum) / 2 - spectrum @ coordinates
    return (spectrum @ error).float().add_(inside @ polar)
