"""The page of the Python API: what `qgalore` exports, for mkdocstrings to fill in."""

from __future__ import annotations

import importlib
import inspect

import qgalore
from docs.make.markdown import sections, table

_INTRODUCTION = """# Python API

`import qgalore` needs torch and nothing else. A name is imported when it is first asked for. Options of a
subspace and of a weight's format are in [param groups](param_groups.md); examples in other trainers in [inside
my trainer](../guide/trainers.md).

This table is all that `qgalore` exports, and what `qgalore.integrations` and `qgalore.compat` have beside it.
The built pages (`mkdocs build`) have signatures and whole docstrings below; in the tree read them in the named
file, or by `help(...)`."""
_BESIDE = {
    "qgalore.integrations.connection": ("connect", "without_ddp"),
    "qgalore.integrations.trainer": ("OptimizerFactory", "QGaLoreCallback"),
    "qgalore.integrations.distributed_checkpoint": ("TrainingState",),
    "qgalore.compat": ("install",),
}


def page() -> str:
    """The text of the page."""
    places = {name: getattr(qgalore, name).__module__ for name in qgalore.__all__}
    found = [(f"qgalore.{name}", place, name) for name, place in sorted(places.items())]
    for place, names in _BESIDE.items():
        room = ".".join(place.split(".")[:2])
        found += [(f"{room}.{name}", place, name) for name in names]
    rows = [
        [f"`{called}`", _first_sentence(place, name), f"`{place.replace('.', '/')}.py`"]
        for called, place, name in found
    ]
    return sections(
        _INTRODUCTION,
        table(["name", "what it is", "file"], rows),
        *(f"::: {place}.{name}" for _, place, name in found),
    )


def _first_sentence(place: str, name: str) -> str:
    text = inspect.getdoc(getattr(importlib.import_module(place), name)) or ""
    return " ".join(text.split("\n\n")[0].split())
