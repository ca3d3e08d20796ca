"""Error reports of a process, on stderr, for torchrun and for other ranks; and its end."""

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

__all__ = ["AlreadyReported", "hard_exit", "one_line", "print_error", "write_torchelastic_error"]

_MAX_LINE_LENGTH = 600


class AlreadyReported(WormError):
    """The run has failed and the error is already printed; the process only has to exit.

    Args:
        report: the failure report that all ranks share.
    """

    def __init__(self, report: FailureReport) -> None:
        super().__init__(report.text)
        self.exit_code = report.exit_code


def print_error(error: Exception, rank: int | str | None) -> None:
    """Print an error to stderr: one line for a ``WormError``, a traceback for any other.

    Args:
        error: the error.
        rank: this process's rank; None if it is not known.
    """
    where = "" if rank is None else f" (rank {rank})"
    if isinstance(error, WormError):
        text = f"worm_dist: error{where}: {error}\n"
    else:
        text = f"worm_dist: error{where}:\n{_traceback(error)}"
    with suppress(OSError):  # its reader may be gone, and the run must end with its own exit code
        # A single write, so that other ranks' output is not interleaved.
        sys.stderr.write(text)
        sys.stderr.flush()


def write_torchelastic_error(error: Exception) -> None:
    """Write the error file in which torchrun looks for the root cause; without torchrun do nothing.

    The format is that of torch's ``ErrorHandler.record_exception``, which cannot be used itself:

    - It stamps the error with the current time in whole seconds, and torchrun takes the earliest
      error for the root cause.  The other ranks write no file; torchrun stamps them with the time
      at which it notices that they have ended, mostly in the same second, and among equal times it
      takes the lowest rank.  In five of six runs in which rank one raised, torchrun 2.14 named rank
      zero.  So the time written here is one second earlier.
    - It writes a traceback for every error; a ``WormError`` is shown as one line.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    is_worm_error = isinstance(error, WormError)
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {
            "py_callstack": str(error) if is_worm_error else _traceback(error),
            "timestamp": str(int(time.time()) - 1),
        },
    }
    with suppress(OSError):  # the disk may be full, and the other ranks have yet to be told
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def one_line(error: Exception) -> str:
    """An error's message on one line, for other ranks; with its type unless a ``WormError``."""
    kind = "" if isinstance(error, WormError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= _MAX_LINE_LENGTH else f"{text[:_MAX_LINE_LENGTH]} ..."


def hard_exit(exit_code: int) -> NoReturn:
    """End the process without the interpreter's shutdown, after exit handlers and flushes.

    torch keeps gloo's threads alive once a network has been wrapped, even after every reference is
    gone.  When one of them is at work while Python shuts down, the process dies of SIGABRT after
    everything was done ("terminate called without an active exception", seen at one exit in sixty
    with torch 2.14), and the launcher takes the run for failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk of the job's log may be full
            stream.flush()
    os._exit(exit_code)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
