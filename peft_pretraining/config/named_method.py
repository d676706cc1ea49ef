"""What the name of a q_galore optimizer says of a run: INT8 weights, stochastic rounding and INT4 projections.

It is the default of three flags, each with a --no- form. A run that goes on from a checkpoint keeps the values there,
unless its command line gives the flags: checkpoints may be older than this meaning of the names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag_groups import Q_GALORE_OPTIMIZERS
from peft_pretraining.models.config_source import states_in
from qgalore.config import FULL

NAMED = ("weight_quant", "stochastic_round", "proj_quant")


def with_named_method(values: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the optimizer's name says to `values`, flags by name with those of the recipe, where they lack it.

    Float weights have no rounding of this kind, and `--rank full` has no projections. What is `recorded` goes first.
    """
    if values.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return dict(values)
    projects = values.get("rank") != FULL or values.get("mlp_rank", FULL) not in (0, FULL)
    quantized = values.get("weight_quant", True)
    named = {"weight_quant": True, "stochastic_round": quantized, "proj_quant": projects}
    return {**named, **recorded, **values}


def recorded_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags that are left to the name, in the checkpoint that a command with these values goes on from.

    Only `state.json` is read, and not checked: what is damaged is found when the checkpoint is loaded. Empty without a
    checkpoint that can be read.
    """
    source, names = given.get("continue_from", ""), left_to_name(given)
    if not source or not names:
        return {}
    folder = Path(given.get("save_dir", "") if source == "auto" else source)
    with contextlib.suppress(OSError):  # of a folder that is not there yet
        for path in states_in(folder):
            with contextlib.suppress(OSError, ValueError):
                state = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(state, dict):
                    return {name: state[name] for name in names if name in state}
    return {}


def recorded_in_words(values: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """A note on what is `recorded` otherwise than the name says; "" where nothing is."""
    named = with_named_method(values, {})
    kept = {name: value for name, value in recorded.items() if value != named[name]}
    flags = " ".join(f"--{name}" if value else f"--no-{name}" for name, value in kept.items())
    return f"{flags}, as in the checkpoint: the command line says nothing of it" if kept else ""


def left_to_name(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that the optimizer's name decides for a command line with the values `given`."""
    if given.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return ()
    return tuple(name for name in NAMED if name not in given)
