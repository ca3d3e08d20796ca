"""Standard output and standard error of the process, whatever they are connected to."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["secure_standard_streams"]


def secure_standard_streams() -> None:
    """Let this process print any text to any standard output and standard error.

    - Text that the encoding lacks, such as a folder's name, is escaped.
    - A stream that is closed (``>&-``) is None in Python, and its file descriptor would be that of
      the next file or socket that is opened; what libraries print would end up there.  It is
      replaced by a stream on which every write fails, as on any other that is lost.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _unwritable(number))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors="backslashreplace")


_RAISING = ("strict", "surrogateescape")


def _unwritable(number: int) -> io.TextIOWrapper:
    """A stream on the file descriptor, without a buffer: every write raises ``OSError``."""
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)
        os.close(null)
        null = number
    binary = open(null, "wb", buffering=0, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", write_through=True)
