"""Consoles and tables that look alike in a terminal and in a log file."""

from __future__ import annotations

import sys
from typing import TextIO

import rich.console
from rich.table import Table

__all__ = ["GAP", "console_for", "plain_table", "print_table"]

GAP = 2
"""Number of spaces between columns."""
_WIDTH_OF_A_LOG = 100


def console_for(file: TextIO | None = None) -> rich.console.Console:
    """A console that prints text as it is; without colours if the output is not a terminal.

    Args:
        file: the stream to write to; the default is the standard output.
    """
    file = file or sys.stdout
    is_log = not file.isatty() or rich.console.Console(file=file).is_dumb_terminal
    return rich.console.Console(
        file=file,
        force_terminal=not is_log,
        color_system=None if is_log else "auto",
        width=_WIDTH_OF_A_LOG if is_log else None,
        highlight=False,
        markup=False,
        emoji=False,
    )


def plain_table() -> Table:
    """An empty table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))


def print_table(console: rich.console.Console, title: str, table: Table) -> None:
    """Print an empty line, the title and the table."""
    console.print()
    console.print(title, style="bold")
    console.print(table)
