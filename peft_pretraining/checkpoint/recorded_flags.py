"""The flags that a checkpoint has recorded, beside those of the command that goes on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.config.checks import find_problems
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.errors import UserError

_STATE = "state.json"
_NOT_ANNOUNCED = ("continue_from", "dry_run")
"""Flags of a start, not of a run."""


def keep_named_method(args: RunArgs) -> RunArgs:
    """`args` with the checkpoint's values of the flags that are left to the optimizer's name, and a note on them.

    A run whose checkpoints are older than today's meaning of the name goes on as it was. Only `state.json` is read, and
    not checked: what is damaged is found when the checkpoint is loaded. Raises UserError where other flags cannot work
    with these values.
    """
    source = args.checkpoint.continue_from
    recorded = _with_old_values(_recorded(source, args.checkpoint.save_dir) if source and args.left_to_name else {})
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
    flags = " ".join(_as_flag(name, value) for name, value in kept.items())
    note = f"{flags}, as in the checkpoint: the command line says nothing of it"
    args = dataclasses.replace(args, **changed, notes=(*args.notes, note))
    if problems := find_problems(args):
        raise UserError(f"{'; '.join(problems)} ({note}).")
    return args


def _as_flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _with_old_values(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint has recorded, and the values of flags that it is older than, where they are not the default."""
    return {"adam8bit_backend": "own", **recorded} if recorded.get("optimizer") == "adam8bit" else recorded


def _recorded(continue_from: str, save_dir: str) -> Mapping[str, Any]:
    """The state of the checkpoint that is probably chosen; empty if there is none that can be read."""
    folders = list_checkpoints(save_dir) if continue_from == "auto" else [Path(continue_from)]
    for folder in reversed(folders):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
    return {}


def changed_flags(args: RunArgs, recorded: Mapping[str, Any]) -> list[str]:
    """The flags of a command that have other values than a checkpoint has recorded, as `--lr 0.01 -> 0.02`.

    What an older version has not recorded counts as the flag's default.
    """
    defaults = {field.name: field.default for group in GROUPS.values() for field in dataclasses.fields(group)}
    recorded = _with_old_values(recorded)
    return [
        f"--{name} {_in_words(there)} -> {_in_words(here)}"
        for name, here in args.to_dict().items()
        if name not in _NOT_ANNOUNCED and (there := recorded.get(name, defaults[name])) != here
    ]


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None or value == "" else str(value)


def differing_keys(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The keys by which two JSON objects differ, with both values, as `hidden_size 512 there, 768 here`."""
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differing_keys(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key} {_shortened(old)} there, {_shortened(new)} here"


_ABSENT = object()
_LONGEST = 40


def _shortened(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
