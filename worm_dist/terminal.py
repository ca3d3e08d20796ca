"""Terminal: where tables are printed, or a job's log file in its place."""

from __future__ import annotations

import sys
from typing import TextIO

import rich.console

__all__ = ["console_of"]

_WIDTH_OF_A_LOG = 100


def console_of(file: TextIO | None = None) -> rich.console.Console:
    """A console; what is no terminal gets plain text of a fixed width.

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
