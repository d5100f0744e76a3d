"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells in columns; the first row is the head, numbers are set flush right.

    Example:
        >>> print(format_table([["run", "loss"], ["adamw", "1.5"]]))
        run    loss
        -----  ----
        adamw   1.5
    """
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if idx else cell.ljust(width)
            for idx, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(
        [line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])]
    )
