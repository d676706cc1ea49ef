"""Q-GaLore: training in little memory with INT8 weights, INT4 low-rank projections and 8-bit Adam states.

What stands here is imported when it is first asked for: a command line that takes its options from `qgalore.config` is
read and checked without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgalore.config import SubspaceConfig, WeightFormat
    from qgalore.integrations.from_model import optimizer_for
    from qgalore.layer.conversion import convert_linears
    from qgalore.layer.export import dequantize_linears, float_state_dict
    from qgalore.layer.linear import LowRankLinear
    from qgalore.layer.linear_names import linear_names
    from qgalore.layer.quantization import QuantizedTensor, quantize
    from qgalore.optimizer import GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit
    from qgalore.optimizer.adafactor import GaLoreAdafactor
    from qgalore.optimizer.param_groups import low_rank_param_groups
    from qgalore.optimizer.training_summary import TrainingSummary, summary

__version__ = "0.2.0"

__all__ = [
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "LowRankLinear",
    "QGaLoreAdamW8bit",
    "QuantizedTensor",
    "SubspaceConfig",
    "TrainingSummary",
    "WeightFormat",
    "convert_linears",
    "dequantize_linears",
    "float_state_dict",
    "linear_names",
    "low_rank_param_groups",
    "optimizer_for",
    "quantize",
    "summary",
]

_MODULES = {
    "optimizer.adafactor": ("GaLoreAdafactor",),
    "config": ("SubspaceConfig", "WeightFormat"),
    "integrations.from_model": ("optimizer_for",),
    "layer.conversion": ("convert_linears",),
    "layer.export": ("dequantize_linears", "float_state_dict"),
    "layer.linear": ("LowRankLinear",),
    "layer.linear_names": ("linear_names",),
    "layer.quantization": ("QuantizedTensor", "quantize"),
    "optimizer": ("GaLoreAdamW", "GaLoreAdamW8bit", "QGaLoreAdamW8bit"),
    "optimizer.param_groups": ("low_rank_param_groups",),
    "optimizer.training_summary": ("TrainingSummary", "summary"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            return globals()[name]
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
