"""The console of a report: in colours on a terminal, plain and of a fixed width in a log."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

__all__ = ["report_console"]

_WIDTH_OF_A_LOG = 100


def report_console(file: TextIO) -> Console:
    """The console that prints to a stream; what it is given is printed as it is."""
    is_log = not file.isatty() or Console(file=file).is_dumb_terminal
    return Console(
        file=file,
        force_terminal=not is_log,
        color_system=None if is_log else "auto",
        width=_WIDTH_OF_A_LOG if is_log else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
