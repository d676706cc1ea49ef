"""What the name of a q_galore optimizer says of a run: INT8 weights, stochastic rounding and INT4 projections.

It is the default of three flags, each with a --no- form. A run that goes on from a checkpoint keeps the values there,
unless its command line gives the flags: checkpoints may be older than this meaning of the names. So it is with the
library whose kernels adam8bit has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_pretraining.config.flag_groups import Q_GALORE_OPTIMIZERS
from qgalore.config import FULL

NAMED = ("weight_quant", "stochastic_round", "proj_quant")


def with_named_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the optimizer's name says to `values`, flags by name with those of the recipe, where they lack it.

    Float weights have no rounding of this kind, and `--rank full` has no projections.
    """
    if values.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return dict(values)
    projects = values.get("rank") != FULL or values.get("mlp_rank", FULL) not in (0, FULL)
    quantized = values.get("weight_quant", True)
    return {"weight_quant": True, "stochastic_round": quantized, "proj_quant": projects, **values}


def left_to_name(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that the optimizer's name decides for a command line with the values `given`."""
    if given.get("optimizer") == "adam8bit":
        names: tuple[str, ...] = ("adam8bit_backend",)
    else:
        names = NAMED if given.get("optimizer") in Q_GALORE_OPTIMIZERS else ()
    return tuple(name for name in names if name not in given)
