"""Tables as text that is Markdown, too."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    ruled = [lines[0], ["-" * max(3, width) for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
