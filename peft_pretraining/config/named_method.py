"""What the name of a q_galore optimizer says of a run: INT8 weights, stochastic rounding and INT4 projections.

It is the default of three flags, each with a --no- form. A run that goes on from a checkpoint keeps the values there,
unless its command line gives the flags: checkpoints may be older than this meaning of the names. So it is with the
recipe and its Newton-Schulz steps, and with the library whose kernels adam8bit has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag_groups import GALORE_OPTIMIZERS, Q_GALORE_OPTIMIZERS
from peft_pretraining.models.config_source import states_in
from qgalore.config import FULL, SubspaceConfig, default_of

NAMED = ("weight_quant", "stochastic_round", "proj_quant")


def with_named_method(values: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the optimizer's name says to `values`, flags by name with those of the recipe, where they lack it.

    Float weights have no rounding of this kind, and `--rank full` has no projections. What is `recorded` goes first.
    """
    return {**_named(values), **recorded, **values}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer's name says; for adam8bit that is what a machine has."""
    if values.get("optimizer") == "adam8bit":
        return {"adam8bit_backend": "auto"}
    steps = {"newton_schulz": default_of(SubspaceConfig, "newton_schulz")}  # of a recipe that has no others
    if values.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return steps if values.get("optimizer") in GALORE_OPTIMIZERS else {}
    projects = values.get("rank") != FULL or values.get("mlp_rank", FULL) not in (0, FULL)
    quantized = values.get("weight_quant", True)
    return {"weight_quant": True, "stochastic_round": quantized, "proj_quant": projects, **steps}


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
                    return {name: value for name, value in with_old_values(state).items() if name in names}
    return {}


def with_old_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has recorded, and what was so before there was a flag for it.

    8-bit Adam had our kernels; a subspace followed the paper or had the orthogonal direction, and that Muon's steps.
    """
    old = {"adam8bit_backend": "own"} if state.get("optimizer") == "adam8bit" else {}
    if state.get("optimizer") in Q_GALORE_OPTIMIZERS and not state.get("recipe"):
        recipes = {"orthogonal": "orthogonal", "normuon": "full_rank"}
        state = {**state, "recipe": recipes.get(state.get("direction", ""), "paper")}
    if state.get("optimizer") in (*GALORE_OPTIMIZERS, *Q_GALORE_OPTIMIZERS):
        old = {"newton_schulz": "muon"}
    return {**old, **state}


def recorded_in_words(values: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """A note on what is `recorded` otherwise than the name and the recipe say; "" where nothing is.

    values: those of the flags on the command line, with its recipe's.
    """
    named = {**_named(values), **values}
    kept = {name: value for name, value in recorded.items() if value != named[name]}
    flags = " ".join(_as_flag(name, value) for name, value in kept.items())
    return f"{flags}, as in the checkpoint: the command line says nothing of it" if kept else ""


def _as_flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def left_to_name(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that the optimizer's name decides for a command line with the values `given`."""
    optimizer, names = given.get("optimizer"), tuple[str, ...]()
    if optimizer == "adam8bit":
        names = ("adam8bit_backend",)
    elif optimizer in GALORE_OPTIMIZERS:
        names = ("newton_schulz",)
    elif optimizer in Q_GALORE_OPTIMIZERS:
        names = ("recipe", "newton_schulz", *NAMED)
    return tuple(name for name in names if name not in given)
