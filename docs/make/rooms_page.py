"""The page of the rooms: what each is for, in the order in which they may import each other."""

from __future__ import annotations

import ast

from benchmarks.rows import ROOT
from docs.make.markdown import sections, table

_INTRODUCTION = """# Rooms

```
run_pretrain.py -> peft_pretraining -> qgalore -> qgalore.kernels -> torch
```

`qgalore` is a library of its own, which needs torch alone and knows no flags, data sets or wandb.
`peft_pretraining` is everything about training a model that is not Q-GaLore. `run_pretrain.py` is a run from
start to end. A room imports those above it in its table and never one below; no two files import each other.
`tests/test_project.py` has the order and holds every file to it. How a room is added or changed:
`CONTRIBUTING.md`.

![The rooms, drawn from their imports](../pictures/rooms.svg)"""
_BESIDE = {
    "run_pretrain.py": "the training run, from start to end",
    "configs/": "the shapes of the shipped models, 9M to 70B",
    "scripts/": "quickstart, tests, the paper's recipes, SLURM",
    "benchmarks/": "what figures are measured with; `results/` has the rows",
    "docs/": "these pages; `make/` makes those that are generated",
    "findings/": "faults of other projects, each with a program that shows it",
    "tests/": "the contract",
}


def page() -> str:
    """The text of the page."""
    return sections(
        _INTRODUCTION,
        "## `qgalore`",
        table(["room", "purpose"], _rows("qgalore")),
        "## `peft_pretraining`",
        table(["room", "purpose"], _rows("peft_pretraining")),
        "## Beside them",
        table(["path", "contents"], [[f"`{path}`", text] for path, text in _BESIDE.items() if (ROOT / path).exists()]),
    )


def rooms() -> list[str]:
    """All rooms in their order, as dotted names."""
    from tests.test_project import ROOMS

    return list(ROOMS)


def path_of(room: str) -> str:
    """The path of a room: a folder ends with a slash."""
    path = room.replace(".", "/")
    return f"{path}/" if (ROOT / path).is_dir() else f"{path}.py"


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = path_of(room)
    file = ROOT / (f"{path}__init__.py" if path.endswith("/") else path)
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _rows(library: str) -> list[list[str]]:
    inside = [room for room in rooms() if room.startswith(f"{library}.")]
    return [[f"`{path_of(room).removeprefix(f'{library}/')}`", purpose(room)] for room in inside]
