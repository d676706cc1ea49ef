"""Feed what the rounding of a quantized weight has lost into its momentum, so that the next updates make up for it.

The idea is ECO's (Nikdan et al., arXiv 2601.22101), for an orthogonalised momentum Cesista's
(leloykun.github.io/ponder/eco, 2026). Here it is derived anew, since Nesterov's momentum and the derivative of an
orthogonal factor ask for more.

How much. An update is W <- round(decay W - s c P): P (rows, columns) the orthogonal factor of Nesterov's momentum
beta m + (1 - beta) g, c = 0.2 sqrt(longer side), s the step size. What is lost is E = W_exact - W_stored. If P were
the momentum over a constant size h, a change of the stored m by D would move W in the k-th next update by
-s c beta^(k + 1) D / h, k = 1, 2, ..., and in all by -s c beta^2 / (1 - beta) D / h. So, for a share C of the error,

    D = -C (1 - beta) / (beta^2 s c) h E.

For plain SGD, without Nesterov, h = 1 and c = 1, that is C (1 - 1 / beta) / s E, ECO's rule: its factor lets the error
be made up for once, over the next 1 / (1 - beta) updates. Weight decay and the schedule of s are taken to stand still
over these.

The size. A change of M in the coordinates of its singular vectors turns P by the antisymmetric part of D_ij over
(S_i + S_j) / 2, and by what lies outside of the shorter side's vectors over S_i: so h = (M Mᵀ)^(1/2), Cesista's, is
exact for today's M, for errors that are such turns. The length of P's rows is fixed: no change of M makes up for an
error along P, such as a step so small that rounding to the nearest undoes it. But M's singular vectors change with each
gradient before an error is paid back. Weights along random gradients stay nearest to those that are not rounded where h
is one number, the mean of S = <P, M> / (shorter side), whether the spectrum is flat or falls as 1 / i, with C between
0.5 and 1; (M Mᵀ)^(1/2), also made symmetric or cut to today's turns, leaves 2 to 21 % more (docs/log). And it takes no
product of matrices.

To first order only, so a change has a bound, k |M|. It must not let the momentum grow, as D grows with h, that is with
all that was fed before: of errors that have nothing to do with each other an update makes beta^2 (1 + k^2) |M|^2 of
|M|^2, beside what the gradient adds. Where that is less than |M|^2, errors come to the share beta^2 k^2 / (1 - beta^2)
of it: here to half, by k^2 = (1 - beta^2) / (2 beta^2), k = 0.34 for a beta of 0.9. Weights of few bits get there where
steps are small, since their errors are larger than many of these. Where nothing was stepped nothing is fed. Plain
PyTorch, for one matrix at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qgalore import kernels
from qgalore.layer.linear import LowRankLinear
from qgalore.update import moments
from qgalore.update.directions import ORTHOGONAL_RMS
from qgalore.update.weight import Weight

BYTES_PER_VALUE = 16
"""What `apply_with_feedback` takes at most beside a direction: four matrices in float32."""
SHARE_OF_ERRORS = 0.5
"""Of the square of a momentum what fed errors come to at most, in the long run."""


def largest_change(beta: float) -> float:
    """What a change may have of the momentum's norm, so that errors come to `SHARE_OF_ERRORS` of its square."""
    return math.sqrt(SHARE_OF_ERRORS * (1.0 - beta**2)) / beta


def apply_with_feedback(layer: LowRankLinear, weight: Weight, direction: Tensor, skip: Tensor | None) -> None:
    """Update the quantized weight of a layer along a direction of its shape, and feed the error into the momentum.

    Where the flag `skip` is true, neither changes.
    """
    assert weight.config is not None
    row, beta = weight.step_row, weight.param_group["betas"][0]
    error = kernels.stepped(layer.dequantized_weight(torch.float32), direction.float(), row)
    layer.update_(direction, None, None, row, skip)
    error.sub_(layer.dequantized_weight(torch.float32))
    momentum = moments.read_moment(weight.state, "exp_avg")
    length = ORTHOGONAL_RMS * max(direction.shape) ** 0.5  # c
    size = (momentum * direction).sum() / (length * min(direction.shape))  # h
    step_size = kernels.StepNumbers.of(row).step_size
    wanted = weight.config.rounding_feedback * (1.0 - beta) / (beta**2 * length) * size / step_size
    # Infinite where nothing was stepped.
    bound = largest_change(beta) * torch.linalg.vector_norm(momentum)
    largest = bound / torch.linalg.vector_norm(error).clamp_min(1e-30)
    factor = torch.where(step_size > 0, torch.minimum(wanted, largest), 0.0)
    moments.write_moment(weight.state, "exp_avg", momentum - error.mul_(factor), skip)
