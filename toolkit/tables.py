"""Tables in plain text that are valid Markdown too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An aligned table in plain text that is valid Markdown too; numbers to the right, None as "-".

    Floats get four significant digits, and no decimals from 1,000 on.

    Raises ValueError for a row of another length than `headers`.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {list(row)}")
    columns = [[header, *map(_cell, cells)] for header, *cells in zip(headers, *rows, strict=True)]
    widths = [max(3, *map(len, column)) for column in columns]
    right = [
        bool(rows) and all(isinstance(row[c], (int, float, type(None))) for row in rows) for c in range(len(headers))
    ]
    rule = ["-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    lines = [
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in zip(*columns, strict=True)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)
