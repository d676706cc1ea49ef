"""Q-GaLore: training in little memory with INT8 weights, INT4 low-rank projections and 8-bit Adam states."""

from qgalore.config import WeightFormat
from qgalore.layer.conversion import convert_linears
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.names import linear_names
from qgalore.layer.quantization import QuantizedTensor, quantize
from qgalore.optimizer import GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit
from qgalore.param_groups import low_rank_param_groups

__version__ = "0.1.0"

__all__ = [
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "LowRankLinear",
    "QGaLoreAdamW8bit",
    "QuantizedTensor",
    "WeightFormat",
    "convert_linears",
    "linear_names",
    "low_rank_param_groups",
    "quantize",
]
