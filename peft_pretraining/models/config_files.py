"""The model configurations that this project ships, by their short names.

In a checkout they are `configs/*.json`. The build copies them into the wheel (`setup.py`), so that an installed package
has them, too: one name finds the file in either.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_IN_WHEEL = _PACKAGE / "shipped"  # a checkout has no such folder


def shipped_root() -> Path:
    """The folder that has `configs/` and `scripts/`: within the installed package, or else the checkout."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent


def shipped_configs() -> dict[str, Path]:
    """The file of each configuration by its size as in `60m`, from the smallest to the largest."""
    found = {path.stem.removeprefix("llama_"): path for path in (shipped_root() / "configs").glob("llama_*.json")}
    return dict(sorted(found.items(), key=lambda item: _parameters(item[0])))


def shipped_config(name: str) -> Path | None:
    """The file of `60m`, `60M`, `llama_60m`, `llama_60m.json` or `configs/llama_60m.json`; None for any other name.

    Looks at no file but the shipped ones: a path that the user gives comes first.
    """
    size = name.lower().removeprefix("configs/").removesuffix(".json").removeprefix("llama_")
    return shipped_configs().get(size)


def _parameters(size: str) -> float:
    """The number that a size stands for: 60m is 60e6."""
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
