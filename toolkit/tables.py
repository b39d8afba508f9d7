"""Tables in plain text that are valid Markdown too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tabulate

tabulate.MIN_PADDING = 0  # the library would widen each column by two spaces

Cell = str | int | float | None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """An aligned table: columns of numbers to the right, None as "-". Floats get four significant digits, and no
    decimals from 1,000 on. Raises ValueError for a row of another length than `headers`."""
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {list(row)}")
    columns = zip(*rows, strict=True)
    alignment = ["left" if any(isinstance(cell, str) for cell in column) else "right" for column in columns]
    # The library gets text, and is to look for no numbers in it.
    cells = [[_text(cell) for cell in row] for row in rows]
    return tabulate.tabulate(cells, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1000 <= abs(cell) < math.inf else f"{cell:.4g}"
    return f"{cell:,}" if type(cell) is int else str(cell)  # a bool is an int as well
