"""What a layer of CUDA graphs holds of its quantized matrices, dequantized (`qgalore.graphs.dequant_cache`)."""

import math
from collections.abc import Iterable

from peft_pretraining.memory.settings import MemorySettings
from peft_pretraining.memory.state_bytes import basis_values
from peft_pretraining.models.config import ModelConfig
from qgalore.graphs.dequant_cache import CACHE_BYTES
from qgalore.layer.layout import padded_width


def held_weights_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """Of all weights of a layer during its passes; 0 where each is dequantized alone, for its use."""
    if not s.cuda_graphs or s.weight.stored_bits is None or s.weight.int8_products:
        return 0
    return _held(s, (math.prod(map(padded_width, shape)) for shape in config.matrix_shapes().values()))


def held_bases_bytes(config: ModelConfig, s: MemorySettings) -> int:
    """The same of all bases of a layer, from its backward pass to the end of the updates that are made inside it."""
    if not s.cuda_graphs or s.basis_bits is None:
        return 0
    return _held(s, (basis_values(shape, s) for shape in config.matrix_shapes().values()))


def _held(s: MemorySettings, values: Iterable[int]) -> int:
    together = s.dtype_bytes * sum(values)
    return together if together <= CACHE_BYTES else 0
