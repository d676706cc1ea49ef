"""The bases of a matrix's subspace in an optimizer's state: how they are stored, and read in a float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from qgalore.config import SubspaceConfig
from qgalore.layer.quantization import QuantizedTensor, quantize

Basis = Tensor | QuantizedTensor
"""A basis (rank, d) as it is stored."""


def decode(basis: Basis, dtype: torch.dtype = torch.float32) -> Tensor:
    """A stored basis in a float dtype."""
    return basis.dequantize(dtype) if isinstance(basis, QuantizedTensor) else basis.to(dtype)


class StoredBases:
    """The bases of the projected sides of one matrix, as entries `<side>_basis` of its optimizer state."""

    def __init__(self, config: SubspaceConfig, shape: torch.Size, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        """shape: (m, n) of the matrix; dtype: of bases that are stored in float."""
        self.sides = config.sides(shape)
        self.cached: dict[str, Tensor] = {}
        """What `read` gives in one dtype, by side, made ahead by `qgalore.graphs.dequant_cache`."""
        self._config, self._shape, self._state, self._dtype = config, shape, state, dtype

    def read(self, side: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The basis (rank, d) of a side; None where that side is not projected."""
        return decode(self.as_read(side, dtype), dtype) if side in self.sides else None

    def as_read(self, side: str, dtype: torch.dtype) -> Basis:
        """What `read` makes its value of: a float basis in `dtype`, or a quantized one."""
        cached = self.cached.get(side)
        if cached is not None and cached.dtype == dtype:
            return cached
        basis = self.stored(side)
        return basis if isinstance(basis, QuantizedTensor) else basis.to(dtype)

    def stored(self, side: str) -> Basis:
        """The basis of a projected side as it is stored: views of the state."""
        stored, scale = self._state[f"{side}_basis"], self._state.get(f"{side}_basis_scale")
        if scale is None:
            return stored
        d = self._shape[0 if side == "left" else 1]
        zero_point = self._state[f"{side}_basis_zero_point"]
        return QuantizedTensor(stored, scale, zero_point, d, self._config.proj_bits, self._config.proj_group_size)

    def quantized(self) -> dict[str, QuantizedTensor]:
        """The quantized bases by side: none where they are float, or before the first gradient."""
        stored = {side: self.stored(side) for side in self.sides if f"{side}_basis" in self._state}
        return {side: basis for side, basis in stored.items() if isinstance(basis, QuantizedTensor)}

    def encode(self, basis: Tensor) -> Basis:
        """A float basis (rank, d) in the form in which it is stored."""
        if self._config.proj_quant:
            return quantize(basis, self._config.proj_bits, self._config.proj_group_size)
        # A solver may leave columns contiguous; a loaded basis would then not multiply to the same bits.
        return basis.to(self._dtype).contiguous()

    def write(self, side: str, basis: Basis, wanted: Tensor | None = None) -> None:
        """Store a basis, unless the flag `wanted` () on the device is false.

        It goes into the tensors of the one before, if there is one, since CUDA graphs know those.
        """
        self.cached.pop(side, None)
        parts = {f"{side}_basis": basis} if isinstance(basis, Tensor) else {
            f"{side}_basis": basis.qdata,
            f"{side}_basis_scale": basis.scale,
            f"{side}_basis_zero_point": basis.zero_point,
        }  # fmt: skip
        for key, part in parts.items():
            if key in self._state:
                old = self._state[key]
                old.copy_(part if wanted is None else torch.where(wanted, part, old))
            else:
                self._state[key] = part
