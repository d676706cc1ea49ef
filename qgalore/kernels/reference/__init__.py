"""The arithmetic of Q-GaLore in plain PyTorch: what every kernel must equal, and the path where Triton is absent."""

from qgalore.kernels.reference.adam import adam_direction, nesterov_momentum, scaled
from qgalore.kernels.reference.block_quantization import dequantize_blocks, dynamic_map, quantize_blocks
from qgalore.kernels.reference.group_quantization import dequantize_groups, pack_int4, quantize_groups, unpack_int4
from qgalore.kernels.reference.int8_matmul import int8_linear, int8_linear_backward, int8_product, quantize_rows
from qgalore.kernels.reference.low_rank_update import project_back_rows, row_chunks
from qgalore.kernels.reference.newton_schulz import orthogonalize
from qgalore.kernels.reference.random_bits import philox, random_bits16, round_stochastic_bfloat16

__all__ = [
    "adam_direction",
    "dequantize_blocks",
    "dequantize_groups",
    "dynamic_map",
    "int8_linear",
    "int8_linear_backward",
    "int8_product",
    "nesterov_momentum",
    "orthogonalize",
    "pack_int4",
    "philox",
    "project_back_rows",
    "quantize_blocks",
    "quantize_groups",
    "quantize_rows",
    "random_bits16",
    "round_stochastic_bfloat16",
    "row_chunks",
    "scaled",
    "unpack_int4",
]
