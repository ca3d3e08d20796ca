"""Activity: what a command does at the moment, shown while it takes long."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...terminal import console_of

__all__ = ["shown_activity"]

_ROOT = logging.getLogger("worm_dist")


@contextmanager
def shown_activity(in_logs: bool = True) -> Iterator[None]:
    """Show what is logged at level INFO on the standard error, until the context ends.

    On a terminal it is one line with the time so far, which disappears at the end; elsewhere each
    message is a plain line.  Warnings are lines in both.

    Args:
        in_logs: whether something is shown where the standard error is no terminal.
    """
    console = console_of(sys.stderr)
    if not console.is_terminal and not in_logs:
        yield
        return
    handler = _Terminal(console) if console.is_terminal else _Lines(console)
    level = _ROOT.level
    _ROOT.addHandler(handler)
    _ROOT.setLevel(logging.INFO if level == logging.NOTSET else min(level, logging.INFO))
    try:
        with handler:
            yield
    finally:
        _ROOT.setLevel(level)
        _ROOT.removeHandler(handler)


class _Lines(logging.Handler):
    """Prints every message as a line."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), soft_wrap=True)


class _Terminal(_Lines):
    """Shows the newest message below the lines, and the time since the first."""

    def __init__(self, console: rich.console.Console) -> None:
        super().__init__(console)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> None:
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            super().emit(record)
        else:
            self._progress.update(self._task, description=record.getMessage())
