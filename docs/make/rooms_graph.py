"""The rooms of both libraries, drawn from their imports."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import ROOT
from docs.make.rooms_page import rooms


def figures() -> dict[str, Any]:
    """Of each room those that its files import directly, in the order of the rooms."""
    from tests.test_project import FILES, imported_modules, module_name, room_of

    order, found = rooms(), {}
    needed: dict[str, set[str]] = {room: set() for room in order}
    for name in [*FILES, "run_pretrain.py"]:
        needed[room_of(module_name(name))] |= {room_of(other) for other in imported_modules(name)}
    for room in order:
        whole = room in ("qgalore", "peft_pretraining", "peft_pretraining.__main__")
        if (not whole and (ROOT / room.replace(".", "/")).is_dir()) or room in ("run_pretrain", "qgalore.config"):
            found[room] = [other for other in order if other in needed[room] and other != room]
    return {room: [other for other in others if other in found] for room, others in found.items()}


def levels(found: dict[str, Any]) -> dict[str, int]:
    """Of each room the length of the longest way down."""
    height: dict[str, int] = {}
    for room, others in found.items():  # a room comes after those that it imports
        height[room] = 1 + max((height[other] for other in others), default=-1)
    return height


def _without_detours(found: dict[str, Any]) -> dict[str, list[str]]:
    """Only the arrows that no longer way replaces."""
    below: dict[str, set[str]] = {}
    kept: dict[str, list[str]] = {}
    for room, others in found.items():
        indirect = set().union(*(below[other] for other in others)) if others else set()
        kept[room] = [other for other in others if other not in indirect]
        below[room] = indirect | set(others)
    return kept


def draw(found: dict[str, Any]) -> Any:
    """Boxes in layers, the arrows down to what each imports; an arrow that others imply is left out."""
    from matplotlib import pyplot

    height = levels(found)
    rows: dict[int, list[str]] = {}
    for room in found:
        rows.setdefault(height[room], []).append(room)
    arrows = _without_detours(found)
    place: dict[str, float] = {}
    for level, inside in rows.items():
        for library, left in (("peft_pretraining", 0.0), ("qgalore", 6.4)):
            own = [room for room in inside if room.startswith(library) or (library[0] == "p" and room[0] == "r")]
            for number, room in enumerate(own):
                place[room] = left + 2.0 * number + (0.9 if level % 2 else 0.0)
    figure, axis = pyplot.subplots(figsize=(8, 9))
    half = {room: 0.36 if room.startswith("qgalore") else 0.2 for room in found}  # of a box of two lines, or of one
    for room, others in arrows.items():
        for other in others:
            axis.annotate(
                "", (place[other], height[other] + half[other]), (place[room], height[room] - half[room]),
                arrowprops={"arrowstyle": "-|>", "color": "0.6", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
    for room in found:
        colour = "#d6e6f5" if room.startswith("qgalore") else "#e4f2dc" if room != "run_pretrain" else "#fbe3c8"
        label = room.removeprefix("peft_pretraining.").replace("qgalore.", "qgalore\n")
        axis.annotate(
            label, (place[room], height[room]), ha="center", va="center", fontsize=8,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "0.4"},
        )  # fmt: skip
    axis.set_xlim(min(place.values()) - 1.2, max(place.values()) + 1.2)
    axis.set_ylim(-0.7, max(height.values()) + 0.7)
    axis.axis("off")
    axis.set_title("blue: qgalore, the library; green: peft_pretraining; an arrow: imports", fontsize=9)
    return figure
