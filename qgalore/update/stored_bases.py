"""A weight matrix with the bases of its subspace in its state: how they are stored, and read in a float dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgalore.config import subspace_of
from qgalore.layer.quantization import QuantizedTensor, quantize
from qgalore.update.full_rank import FullRankWeight, States
from qgalore.update.step_table import StepTable

Basis = Tensor | QuantizedTensor
"""A basis (rank, d) as it is stored."""


class WeightWithBases(FullRankWeight):
    """A matrix of which one side or both are projected; `LowRankWeight` follows it through an update."""

    def __init__(self, param: Tensor, seed: int) -> None:
        """See `FullRankWeight`."""
        super().__init__(param, seed)
        self.held_bases: dict[str, Tensor] = {}
        """What `basis` gives in one dtype, by side, made ahead by `qgalore.graphs.dequant_cache`."""

    def bind(self, group: dict[str, Any], states: States, table: StepTable, index: int, place: int, count: int) -> None:
        """See `FullRankWeight`; the options of the subspace are those that the group has now."""
        self.subspace = subspace_of(group)
        super().bind(group, states, table, index, place, count)
        self.held_bases.clear()

    def clear(self) -> None:
        """Forget the gradient, and the bases that were held for it."""
        super().clear()
        self.held_bases.clear()

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are projected: ("left",), ("right",) or both; `std` takes the shorter side of the weight."""
        return self.subspace.sides(self.shape)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1]

    def basis(self, side: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The basis (rank, d) of a side, dequantized; None where that side is not projected."""
        if side not in self.sides:
            return None
        if not self.state:
            self._init_state()
        held = self.held_bases.get(side)
        return held if held is not None and held.dtype == dtype else self._decode(self._stored(side), dtype)

    def quantized_bases(self) -> dict[str, QuantizedTensor]:
        """The stored bases (rank, d) by side: none where they are float, or before the first gradient."""
        stored = {side: self._stored(side) for side in self.sides if f"{side}_basis" in self.state}
        return {side: basis for side, basis in stored.items() if isinstance(basis, QuantizedTensor)}

    def _encode(self, basis: Tensor) -> Basis:
        if self.subspace.proj_quant:
            return quantize(basis, self.subspace.proj_bits, self.subspace.proj_group_size)
        # A solver may leave columns contiguous; a loaded basis would then not multiply to the same bits.
        return basis.to(self._basis_dtype).contiguous()

    def _decode(self, basis: Basis, dtype: torch.dtype = torch.float32) -> Tensor:
        return basis.dequantize(dtype) if isinstance(basis, QuantizedTensor) else basis.to(dtype)

    @property
    def _basis_dtype(self) -> torch.dtype:
        return self.param.dtype if self.param.is_floating_point() else torch.float32

    def _store(self, side: str, basis: Basis, wanted: Tensor | None = None) -> None:
        """Keep a basis, unless the flag `wanted` on the device says no.

        It goes into the tensors of the one before, if there is one, since CUDA graphs know those.
        """
        self.held_bases.pop(side, None)
        parts = {f"{side}_basis": basis} if isinstance(basis, Tensor) else {
            f"{side}_basis": basis.qdata,
            f"{side}_basis_scale": basis.scale,
            f"{side}_basis_zero_point": basis.zero_point,
        }  # fmt: skip
        for key, part in parts.items():
            if key in self.state:
                place = self.state[key]
                place.copy_(part if wanted is None else torch.where(wanted, part, place))
            else:
                self.state[key] = part

    def _stored(self, side: str) -> Basis:
        stored, scale = self.state[f"{side}_basis"], self.state.get(f"{side}_basis_scale")
        if scale is None:
            return stored
        d = self.shape[0 if side == "left" else 1]
        bits, group_size = self.subspace.proj_bits, self.subspace.proj_group_size
        return QuantizedTensor(stored, scale, self.state[f"{side}_basis_zero_point"], d, bits, group_size)
