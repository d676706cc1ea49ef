"""HTML and SVG as text in which whatever comes from data is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Final

_VOID: Final = frozenset({"br", "circle", "img", "line", "meta", "path", "polyline", "rect"})
"""Elements without children here; of HTML's, those that have no end tag."""
_OF_SVG: Final = frozenset({"circle", "line", "path", "polyline", "rect"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """Any value as text that shows it; control characters, which HTML forbids, become visible ones."""
    if isinstance(text, Markup):
        return text
    shown = "".join(_visible(character) for character in str(text))
    return Markup(html.escape(shown))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 0x20 and not 0x7F <= code < 0xA0 and not 0xD800 <= code < 0xE000):
        return character
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element; children and values that are no Markup are escaped.

    A name of an attribute may end in _, and another _ stands for -; one whose value is None or False is left out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    texts = "".join(
        f" {key}" if value is True else f' {key}="{escaped(value)}"'
        for key, value in given.items()
        if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{texts}{'/' if name in _OF_SVG else ''}>")
    return Markup(f"<{name}{texts}>{concatenated(children)}</{name}>")


def concatenated(parts: Iterable[object]) -> Markup:
    """Parts one after another."""
    return Markup("".join(escaped(part) for part in parts))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str, numbers: bool = True) -> Markup:
    """A table whose first column names its rows; numbers: align cells that begin with a digit or a sign as such."""
    rows, kind = list(rows), _kind if numbers else (lambda _: None)
    listed = [[element("td", cell, class_=kind(cell)) for cell in row[1:]] for row in rows]
    kinds = [None, *map(kind, rows[0][1:])] if rows else [None] * len(header)
    head = [element("th", cell, scope="col", class_=each) for cell, each in zip(header, kinds, strict=True)]
    body = [element("tr", element("th", row[0], scope="row"), *cells) for row, cells in zip(rows, listed, strict=True)]
    parts = [element("caption", caption), element("thead", element("tr", *head)), element("tbody", *body)]
    return element("div", element("table", *parts), class_="scroll", tabindex="0", role="region", aria_label=caption)


def _kind(cell: object) -> str | None:
    text = str(cell)
    return "number" if text[:1].isdigit() or (text[:1] in "-+" and text[1:2].isdigit()) else None
