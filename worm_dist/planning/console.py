"""Tables of reports, all in one style."""

from __future__ import annotations

import rich.console
from rich.table import Table

__all__ = ["GAP", "plain_table", "print_table"]

GAP = 2
"""Number of spaces between columns."""


def plain_table() -> Table:
    """An empty table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))


def print_table(console: rich.console.Console, title: str, table: Table) -> None:
    """Print an empty line, the title and the table."""
    console.print()
    console.print(title, style="bold")
    console.print(table)
