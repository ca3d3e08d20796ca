"""Log lines and warnings of a rank on the standard error, which all ranks of a host share."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["rank_named"]

_ROOT = logging.getLogger("worm_dist")


@contextmanager
def rank_named(rank: int) -> Iterator[None]:
    """Begin each line that this rank logs, and each of its warnings, with ``[rank N]``; those of
    rank zero stay as they are.

    Args:
        rank: rank of this process.
    """
    if rank == 0:
        yield
        return
    prefix = f"[rank {rank}] "
    handler, written = _StandardError(prefix), warnings.formatwarning

    def prefixed(*args: object, **kwargs: object) -> str:
        return prefix + written(*args, **kwargs)  # type: ignore[arg-type]

    _ROOT.addHandler(handler)
    warnings.formatwarning = prefixed
    try:
        yield
    finally:
        warnings.formatwarning = written
        _ROOT.removeHandler(handler)


class _StandardError(logging.Handler):
    """Writes warnings, as Python does where nothing else is set up for logging."""

    def __init__(self, prefix: str) -> None:
        super().__init__(logging.WARNING)
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a job's log on a full disk must not stop the run
            # The present stream, and a single write, so that lines of ranks do not mix.
            sys.stderr.write(f"{self._prefix}{self.format(record)}\n")
            sys.stderr.flush()
