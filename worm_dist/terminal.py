"""Terminal: where tables and JSON are printed, or a job's log file in its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import rich.console

__all__ = ["console_of", "only_json_on_stdout", "print_json"]


def console_of(file: TextIO | None = None, width_of_a_log: int = 100) -> rich.console.Console:
    """A console; what is no terminal gets plain text of a fixed width.

    Args:
        file: the stream to write to; the default is the standard output.
        width_of_a_log: this width, in characters.
    """
    import rich.console  # late, as commands that print JSON do not need it

    file = file or sys.stdout
    is_log = not file.isatty() or rich.console.Console(file=file).is_dumb_terminal
    return rich.console.Console(
        file=file,
        force_terminal=not is_log,
        color_system=None if is_log else "auto",
        width=width_of_a_log if is_log else None,
        highlight=False,
        markup=False,
        emoji=False,
    )


@contextmanager
def only_json_on_stdout(is_json: bool) -> Iterator[None]:
    """Send to the standard error what libraries and the user's functions print meanwhile, so that
    the standard output has one JSON document alone.

    Args:
        is_json: whether JSON was asked for; without it nothing is redirected.
    """
    if not is_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(content: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print one JSON object.

    Args:
        content: the object.
        file: the stream to write to; the default is the standard output.
    """
    file = file or sys.stdout
    json.dump(content, file, indent=2, allow_nan=False)
    print(file=file, flush=True)
