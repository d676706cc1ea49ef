"""The flags that a checkpoint has recorded, beside those of the command that goes on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.config.run_config import GROUPS, RunArgs

_STATE = "state.json"


def keep_named_method(args: RunArgs) -> RunArgs:
    """`args` with the checkpoint's values of the flags that are left to the optimizer's name, and a note on them.

    A run whose checkpoints are older than today's meaning of the name goes on as it was. Only `state.json` is read, and
    not checked: what is damaged is found when the checkpoint is loaded.
    """
    source = args.checkpoint.continue_from
    recorded = _recorded(source, args.checkpoint.save_dir) if source and args.left_to_name else {}
    values = args.to_dict()
    kept = {name: recorded[name] for name in args.left_to_name if recorded.get(name, values[name]) != values[name]}
    if not kept:
        return args
    groups = {title: getattr(args, title) for title in GROUPS}
    changed = {
        title: dataclasses.replace(group, **own)
        for title, group in groups.items()
        if (own := {name: value for name, value in kept.items() if name in vars(group)})
    }
    flags = " ".join(f"--{name}" if value else f"--no-{name}" for name, value in kept.items())
    note = f"{flags}, as in the checkpoint: the command line says nothing of it"
    return dataclasses.replace(args, **changed, notes=(*args.notes, note))


def _recorded(continue_from: str, save_dir: str) -> Mapping[str, Any]:
    """The state of the checkpoint that is probably chosen; empty if there is none that can be read."""
    folders = list_checkpoints(save_dir) if continue_from == "auto" else [Path(continue_from)]
    for folder in reversed(folders):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
    return {}
