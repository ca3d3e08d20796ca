"""Voice: what a process says of its error, and how it leaves."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..errors import WormError
from .diagnosis import FailureReport

__all__ = ["AlreadyReported", "hard_exit", "one_line", "record", "tell"]

_LONGEST_LINE = 600


class AlreadyReported(WormError):
    """The run has ended and this rank has said why; all that is left is to exit."""

    def __init__(self, ending: FailureReport) -> None:
        super().__init__(ending.text)
        self.exit_code = ending.exit_code


def tell(error: Exception, rank: int | str | None) -> None:
    """One line for an error of ours, which says what to do; a traceback for any other."""
    where = "" if rank is None else f" (rank {rank})"
    if isinstance(error, WormError):
        said = f"worm_dist: error{where}: {error}\n"
    else:
        said = f"worm_dist: error{where}:\n{_traceback(error)}"
    # In one piece, or other ranks' words would come between.
    sys.stderr.write(said)
    sys.stderr.flush()


def record(error: Exception) -> None:
    """Leave the error where torchrun looks for what went wrong first, as its ``record`` does."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    ours = isinstance(error, WormError)
    said = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {
            "py_callstack": str(error) if ours else _traceback(error),
            # torchrun takes the earliest, in whole seconds, for the cause of all; of several in
            # the same second it takes the first that it looks at, which may have failed after.
            "timestamp": str(int(time.time()) - 1),
        },
    }
    Path(path).write_text(json.dumps({"message": said}), encoding="utf-8")


def one_line(error: Exception) -> str:
    """What an error says, for other ranks: with its kind, unless it is one of ours."""
    kind = "" if isinstance(error, WormError) else f"{type(error).__name__}: "
    said = " ".join(f"{kind}{error}".split())
    return said if len(said) <= _LONGEST_LINE else f"{said[:_LONGEST_LINE]} ..."


def hard_exit(exit_code: int) -> NoReturn:
    """End the process without taking the interpreter apart.

    torch keeps gloo's threads alive once a network has been wrapped, whoever lets go of it.  When
    one of them is at work while Python shuts down, the process dies of SIGABRT after everything
    was done ("terminate called without an active exception", seen at one exit in sixty with torch
    2.14), and the launcher takes the run for failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk of the job's log may be full
            stream.flush()
    os._exit(exit_code)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
