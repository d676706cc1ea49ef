"""Markdown as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars within a cell are escaped."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def sections(*parts: str) -> str:
    """Paragraphs, headings and tables with an empty line between them, and a line break at the end."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
