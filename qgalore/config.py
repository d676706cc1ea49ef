"""How a weight is stored: the options of the library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """How a low-rank weight is stored and rounded when it is written."""

    bits: int | None = None
    """8 or 4: quantized in groups; None: float."""
    group_size: int = 256
    """Values of a row that share a scale."""
    stochastic_rounding: bool = True
    """Round updates up or down at random, unbiased; else to nearest."""
    simulate: bool = False
    """Fake quantization: keep a float weight whose values lie on the quantized grid."""
    int8_products: bool = False
    """Quantize activations as they come and multiply in INT8: 8 bits, a row is one group and group_size has no say."""

    def __post_init__(self) -> None:
        """Raises ValueError for products in INT8 of a weight that is not stored in 8 bits."""
        if self.int8_products and (self.bits != 8 or self.simulate):
            stored = "a simulated weight" if self.simulate else f"bits={self.bits}"
            raise ValueError(f"int8_products multiplies the codes of an 8-bit weight: it cannot work with {stored}")

    @property
    def stored_bits(self) -> int | None:
        """8 or 4 where the weight is stored as codes; None where it is float."""
        return None if self.simulate else self.bits

    def group_size_of(self, columns: int) -> int:
        """Values that share a scale in a row of so many columns; for a whole row a multiple of 8, as kernels want."""
        return -(-columns // 8) * 8 if self.int8_products else self.group_size
