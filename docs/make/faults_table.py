"""The table of faults that runs survived, from chaos.csv and chaos_network.csv."""

from __future__ import annotations

from collections.abc import Sequence

from docs.make.csv_rows import Row, rows_of
from docs.make.markdown import table


def table_of_faults() -> str:
    """Of each fault, how often it was made and how often the run ended with the bits of an undisturbed one."""
    rows = rows_of("chaos.csv")
    faults = sorted({row["fault"] for row in rows})
    kills = [fault for fault in faults if fault.startswith("kill")]
    lines = [_line(fault, [row for row in rows if row["fault"] == fault]) for fault in kills]
    lines.append(_line("**kills, all of them**", [row for row in rows if row["fault"] in kills]))
    lines += [_line(fault, [row for row in rows if row["fault"] == fault]) for fault in faults if fault not in kills]
    network = rows_of("chaos_network.csv")
    for fault in sorted({row["fault"] for row in network}):
        lines.append(_line(fault, [row for row in network if row["fault"] == fault]))
    return table(["fault", "one rank: made, same bits", "two ranks: made, same bits"], lines)


def _line(label: str, rows: Sequence[Row]) -> list[str]:
    cells = []
    for ranks in ("1", "2"):
        made, same = (sum(int(row[name]) for row in rows if row["ranks"] == ranks) for name in ("made", "same_bits"))
        cells.append(f"{made}, {same}" if made else "-")
    return [label, *cells]
