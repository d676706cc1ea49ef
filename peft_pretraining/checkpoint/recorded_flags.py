"""The flags that a checkpoint has recorded, beside those of the command that goes on from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from peft_pretraining.config.named_method import with_old_values
from peft_pretraining.config.run_config import GROUPS, RunArgs

_NOT_ANNOUNCED = ("continue_from", "dry_run")
"""Flags of a start, not of a run."""


def changed_flags(args: RunArgs, recorded: Mapping[str, Any]) -> list[str]:
    """The flags of a command that have other values than a checkpoint has recorded, as `--lr 0.01 -> 0.02`.

    What an older version has not recorded counts as the flag's default.
    """
    defaults = {field.name: field.default for group in GROUPS.values() for field in dataclasses.fields(group)}
    recorded = with_old_values(recorded)
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
