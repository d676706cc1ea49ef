"""A momentum of full rank stored as low-rank factors in 8 bits and a rest of few bits: M = leftᵀ right + rest.

An orthogonalised direction (`qgalore.update.directions`) gives all singular directions of the momentum one size. So it
magnifies what rounding does to the small ones in a matrix whose range the large ones decide. Here the large ones are
kept apart, and what is left has a smaller range, for which 4 bits do. After Muon-GRASP
(openreview.net/forum?id=g2l9bg9DWx, ICLR 2026), whose rest has another format.

With d the shorter side of a matrix, l the longer one, V (rank, d) of orthonormal rows and B (rank, l):

- `write` takes one step of subspace iteration on M (d, l), warm-started from what is stored: V <- the rows of B_old Mᵀ
  made orthonormal, then B <- V M. As B_old is V_old M_old, this is a power step on M M_oldᵀ for two products.
- V, B and the rest are rounded to nearest, each for what those before it have lost. V, B and a rest in 8 bits are
  quantized in groups along rows (`qgalore.kernels.quantize`). A rest in 4 or 2 bits is first divided by the root mean
  square of each column, since columns differ as rows do; 2 bits are the four values that suit a normal distribution.

V is `left` of a matrix that is not taller than wide, else `right`. Products with factors are made of bfloat16 on a GPU,
summed in float32; reading makes the same product as writing, so that the rest makes up for its rounding. Rows are made
orthonormal by products alone, since a CUDA graph may hold an update and solvers may not be captured: where M has fewer
dimensions than V, the rows are shorter in those that it lacks, and the rest has what that leaves out.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qgalore import kernels
from qgalore.layer.quantization import QuantizedTensor, quantize, row_bytes
from qgalore.subspace import fit
from qgalore.update import moments

_FACTOR_BITS, _FACTOR_GROUP = 8, 256
_REST_GROUP = {8: 256, 4: 128, 2: 128}
"""Values of a row of the rest that share a scale, by its bits."""
_COLUMNS = "exp_avg_rest_columns"
"""The root mean square of each column of a rest in 4 or 2 bits, (n,) float32."""
_QUARTER, _MOST = 0.4528, 1.510
"""-_MOST, -_QUARTER, _QUARTER and _MOST have the least squared error for a normal variable of variance 1 (Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 1960, table I)."""
_POLYNOMIALS = (
    (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518), (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188), (1.8913, -1.2680, 0.3768), (1.8750, -1.2500, 0.3750),
)  # fmt: skip
"""(a, b, c) of a x + b x³ + c x⁵, which together bring all of 0.001 to 1 to 1 (Amsel et al., "The Polar Express", arXiv
2505.16932)."""
_SMALLEST = 1e-30


class PartsFormat(NamedTuple):
    """How the momentum of one matrix is stored in an optimizer's state."""

    shape: tuple[int, int]
    """(m, n)."""
    rank: int
    """Of the factors."""
    rest_bits: int
    """8, 4, 2, or 0 for no rest."""

    @property
    def sides(self) -> tuple[str, str]:
        """The factors V and B: of the shorter and of the longer side."""
        return ("left", "right") if self.shape[0] <= self.shape[1] else ("right", "left")

    def init_state(self, state: dict[str, Tensor], seed: int, device: torch.device) -> None:
        """Put a momentum of zero into `state`, with random rows of V to start from."""
        short, long = self.sides
        start = fit.random_basis(self.rank, min(self.shape), seed, device)
        _put(state, short, quantize(start, _FACTOR_BITS, _FACTOR_GROUP))
        _put(state, long, _zeros(self.rank, max(self.shape), _FACTOR_BITS, _FACTOR_GROUP, device))
        if self.rest_bits:
            _put(state, "rest", _zeros(*self.shape, self.rest_bits, _REST_GROUP[self.rest_bits], device))
        if self.rest_bits == 2:
            del state[_keys("rest")[2]]
        if self.rest_bits in (4, 2):
            state[_COLUMNS] = torch.zeros(self.shape[1], device=device)

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a state has the tensors of this format, in its shapes, and none of another."""
        shapes = _shapes(self)
        if "exp_avg_rest" in state and "exp_avg_rest" not in shapes:
            return False
        return all(key in state and state[key].shape == shape for key, shape in shapes.items())

    def read(self, state: dict[str, Tensor]) -> Tensor:
        """The momentum (m, n), float32."""
        if self.rest_bits:
            momentum = self._read_rest(state)
        else:
            momentum = torch.zeros(self.shape, device=state["exp_avg_left"].device)
        return self._add_factors(momentum, state, 1.0)

    def write(self, state: dict[str, Tensor], momentum: Tensor, skip: Tensor | None = None) -> None:
        """Store a momentum (m, n) float32, which is used up, unless the flag `skip` is true.

        Nothing waits for the device.
        """
        short, long = self.sides
        dtype = _dtype_of_products(momentum)
        matrix = momentum.to(dtype) if short == "left" else momentum.T.to(dtype)  # (d, l)
        basis, sizes = (self._factor(state, side).dequantize(dtype) for side in self.sides)
        sizes /= sizes.norm(dim=1, keepdim=True).clamp_min_(_SMALLEST)
        basis = _orthonormal_rows(kernels.project_back(sizes, None, matrix.T), basis.float())
        row = _row_of_replacing(momentum.device)
        _replace_(self._factor(state, short), basis, row, skip)
        basis = self._factor(state, short).dequantize(dtype)
        _replace_(self._factor(state, long), kernels.project_back(basis, None, matrix), row, skip)
        del matrix, basis, sizes
        if self.rest_bits:
            self._write_rest(state, self._add_factors(momentum, state, -1.0), row, skip)

    def _factor(self, state: dict[str, Tensor], side: str) -> QuantizedTensor:
        return _stored(state, side, self.shape[0 if side == "left" else 1], _FACTOR_BITS, _FACTOR_GROUP)

    def _rest(self, state: dict[str, Tensor]) -> QuantizedTensor:
        """Of 8 or 4 bits."""
        return _stored(state, "rest", self.shape[1], self.rest_bits, _REST_GROUP[self.rest_bits])

    def _add_factors(self, matrix: Tensor, state: dict[str, Tensor], sign: float) -> Tensor:
        """Add leftᵀ right times `sign` to a float32 matrix (m, n) in place, some rows at a time; returns it."""
        left, right = (self._factor(state, side).dequantize(_dtype_of_products(matrix)) for side in ("left", "right"))
        for start, stop in kernels.row_chunks(*self.shape):
            matrix[start:stop].add_(kernels.project_back(right, left, None, start, stop), alpha=sign)
        return matrix

    def _read_rest(self, state: dict[str, Tensor]) -> Tensor:
        if self.rest_bits == 2:
            codes, scale, _ = _keys("rest")
            rest = _from_two_bits(state[codes], state[scale], self.shape[1])
        else:
            rest = self._rest(state).dequantize()
        return rest if self.rest_bits == 8 else rest.mul_(state[_COLUMNS])

    def _write_rest(self, state: dict[str, Tensor], rest: Tensor, row: Tensor, skip: Tensor | None) -> None:
        """Store a rest (m, n) float32, which is used up, unless the flag `skip` is true."""
        new: dict[str, Tensor] = {}
        if self.rest_bits != 8:
            new[_COLUMNS] = torch.linalg.vector_norm(rest, dim=0) / len(rest) ** 0.5
            rest.div_(new[_COLUMNS].clamp_min(_SMALLEST))
        if self.rest_bits == 2:
            new.update(zip(_keys("rest")[:2], _to_two_bits(rest), strict=True))
        else:
            _replace_(self._rest(state), rest, row, skip)
        for key, value in new.items():
            state[key].copy_(value if skip is None else torch.where(skip, state[key], value))


class PartsStep(NamedTuple):
    """As `qgalore.kernels.AdamStep`, of a weight whose momentum is stored in parts and that has no second moment."""

    grad: Tensor
    format: PartsFormat
    state: dict[str, Tensor]
    """Of the weight."""
    exp_avg_sq: Tensor | None
    """A second moment of each row of the direction, (m,), where there is one."""
    row: Tensor
    betas: tuple[float, float]
    eps: float
    factor: Tensor | None
    dtype: torch.dtype

    def advance(self, dtype: torch.dtype, skip: Tensor | None) -> Tensor:
        """Move the momentum as `qgalore.kernels.momentum_steps` does; returns Nesterov's in dtype."""
        momentum = self.format.read(self.state)
        step = kernels.AdamStep(
            self.grad, momentum, None, None, None, self.row, self.betas, self.eps, self.factor, dtype
        )
        (ahead,) = kernels.momentum_steps([step], moments.BLOCK_SIZE, skip)
        self.format.write(self.state, momentum, skip)
        return ahead


def in_parts(state: dict[str, Tensor]) -> bool:
    """Whether a state has a momentum in some `PartsFormat`."""
    return "exp_avg_left" in state


@functools.cache
def _shapes(format: PartsFormat) -> dict[str, torch.Size]:
    """Of the tensors of a state; cached, since float weights are checked in each update."""
    state: dict[str, Tensor] = {}
    format.init_state(state, 0, torch.device("meta"))
    return {key: tensor.shape for key, tensor in state.items()}


def _orthonormal_rows(sketch: Tensor, old: Tensor) -> Tensor:
    """The polar factor of a sketch (rank, d), float32: orthonormal rows that span what its rows do.

    A row of zeros is taken from `old` (rank, d), and all where the sketch is not finite. Float32 throughout: a sketch
    has the squares of singular values, of which less would lose the small ones.
    """
    norms = sketch.norm(dim=1, keepdim=True)
    basis = torch.where(norms > 0, sketch / norms.clamp_min(_SMALLEST), old)
    basis = kernels.odd_polynomials(basis, _POLYNOMIALS)
    return torch.where(basis.isfinite().all(), basis, old)


def _dtype_of_products(matrix: Tensor) -> torch.dtype:
    return kernels.product_dtype(matrix.device)


def _keys(part: str) -> tuple[str, str, str]:
    return f"exp_avg_{part}", f"exp_avg_{part}_scale", f"exp_avg_{part}_zero_point"


def _put(state: dict[str, Tensor], part: str, stored: QuantizedTensor) -> None:
    state.update(zip(_keys(part), (stored.qdata, stored.scale, stored.zero_point), strict=True))


def _stored(state: dict[str, Tensor], part: str, columns: int, bits: int, group_size: int) -> QuantizedTensor:
    qdata, scale, zero_point = (state[key] for key in _keys(part))
    return QuantizedTensor(qdata, scale, zero_point, columns, bits, group_size)


def _row_of_replacing(device: torch.device) -> Tensor:
    """A step row of step size -1 and decay 0, made on the device, where a CUDA graph can make it again."""
    row = torch.zeros(8, dtype=torch.int32, device=device)
    kernels.StepNumbers.of(row).step_size.fill_(-1.0)
    return row


def _replace_(stored: QuantizedTensor, value: Tensor, row: Tensor, skip: Tensor | None) -> None:
    """Round a float32 matrix to the codes of `stored`, in place, unless the flag `skip` is true.

    As an update with `_row_of_replacing`: one launch, which reads the flag.
    """
    parts, sizes = (stored.qdata, stored.scale, stored.zero_point), (stored.columns, stored.bits, stored.group_size)
    update = kernels.QuantizedUpdate(*parts, value, None, None, *sizes, row, stochastic=False)
    kernels.update_quantized_([update], skip)


def _zeros(rows: int, columns: int, bits: int, group_size: int, device: torch.device) -> QuantizedTensor:
    """A matrix of zeros, whatever its codes."""
    qdata = torch.zeros(rows, row_bytes(columns, bits), dtype=torch.uint8, device=device)
    scale = torch.zeros(rows, -(-columns // group_size), dtype=torch.bfloat16, device=device)
    return QuantizedTensor(qdata, scale, torch.zeros_like(scale), columns, bits, group_size)


def _to_two_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a float32 matrix (m, n), four a byte, the first in the lowest bits, and the scale of each group.

    (m, ceil(n / 4)) uint8 and (m, groups) bfloat16, the root mean square of a group; some rows at a time.
    """
    group, columns = _REST_GROUP[2], x.shape[1]
    parts = []
    for start, stop in kernels.row_chunks(*x.shape):
        groups = F.pad(x[start:stop], (0, -columns % group)).view(stop - start, -1, group)
        squares = groups.square().sum(2)
        squares[:, :-1] /= group
        squares[:, -1] /= columns - (squares.shape[1] - 1) * group
        scale = squares.sqrt_().bfloat16()
        groups /= scale.float().clamp_min(_SMALLEST)[:, :, None]
        border = (_QUARTER + _MOST) / 2
        codes = (groups > -border).to(torch.uint8) + (groups > 0) + (groups > border)
        shifted = (codes.view(stop - start, -1, 4)[..., index] << 2 * index for index in range(4))
        packed = functools.reduce(torch.bitwise_or, shifted)[:, : row_bytes(columns, 2)]
        parts.append((packed, scale))
    codes_of_rows, scales = zip(*parts, strict=True)
    return torch.cat(codes_of_rows), torch.cat(scales)


def _from_two_bits(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The values (m, columns) float32 of `_to_two_bits`."""
    group = _REST_GROUP[2]
    value = torch.empty(len(packed), columns, device=packed.device)
    # An odd polynomial of -3, -1, 1 and 3 that gives the four values.
    third = (_MOST - 3 * _QUARTER) / 24
    for start, stop in kernels.row_chunks(*value.shape):
        codes = torch.stack([packed[start:stop] >> 2 * index & 3 for index in range(4)], dim=2)
        odd = codes.view(stop - start, -1)[:, :columns].float().mul_(2).sub_(3)
        scales = scale[start:stop].float().repeat_interleave(group, dim=1)[:, :columns]
        torch.mul(odd.square().mul_(third).add_(_QUARTER - third).mul_(odd), scales, out=value[start:stop])
    return value
