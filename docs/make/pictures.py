"""The pictures of the documents that are drawn from rows, plans and imports.

A picture's module has `figures`, what is drawn, as values of JSON, and `draw`, which makes the figure of matplotlib. An
SVG carries a digest of the figures and of the module's text, by which `is_stale` knows whether it has to be drawn anew;
the bytes of a picture depend on matplotlib's version and fonts.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from types import ModuleType

from benchmarks.rows import ROOT

PICTURES = {
    "docs/pictures/bars.svg": "bars",
    "docs/pictures/frontier.svg": "frontier",
    "docs/pictures/loss_curves.svg": "loss_curves",
    "docs/pictures/memory_7b.svg": "memory_bar",
    "docs/pictures/rooms.svg": "rooms_graph",
    "docs/pictures/scaling.svg": "scaling_bars",
    "docs/pictures/update.svg": "update_flow",
}
"""Path, and the module in `docs/make/` that draws it."""
_DIGEST = re.compile(r"digest ([0-9a-f]{16})")


def is_stale(path: str) -> bool:
    """Whether a picture is not there, or was drawn from other figures or by another program."""
    file = ROOT / path
    found = _DIGEST.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found is None or found[1] != digest(path)


def digest(path: str) -> str:
    """Of what a picture is drawn from."""
    module = _module(path)
    text = json.dumps(module.figures(), sort_keys=True) + inspect.getsource(module)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(path: str, as_png: str = "") -> None:
    """Draw a picture; as_png: also as a PNG at this path, to look at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    module = _module(path)
    with pyplot.rc_context({"svg.hashsalt": "q-galore", "font.size": 9}):
        figure = module.draw(module.figures())
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None, "Description": f"digest {digest(path)}"}
        figure.savefig(ROOT / path, metadata=about, bbox_inches="tight", facecolor="white")
        if as_png:
            figure.savefig(as_png, bbox_inches="tight", facecolor="white", dpi=110)
        pyplot.close(figure)


def _module(path: str) -> ModuleType:
    return importlib.import_module(f"docs.make.{PICTURES[path]}")
