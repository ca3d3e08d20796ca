"""Agreed failure: what fails on one rank raises on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import BackendError, WormError
from .collectives import Communicator

__all__ = ["described", "on_every_rank"]


@contextmanager
def on_every_rank(comm: Communicator, error_of: Callable[[str], WormError]) -> Iterator[None]:
    """Context that raises on every rank if its body raises on any.  Its exit is collective; its
    body must not be, unless it issues its collectives in any case.

    Args:
        comm: the communicator.
        error_of: makes the error, from the ranks that failed and why.

    Raises:
        WormError: that of ``error_of``.
        BackendError: the ranks cannot tell one another.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # any error: the other ranks must not wait for this one
        failure = error
    own = "" if failure is None else described(failure)
    try:
        failures = comm.failures(own)
    except Exception as error:  # the reason must not be lost with the connection
        raise BackendError(
            f"{own or 'no failure on this rank'}; then the ranks could not be compared "
            f"({described(error)}). Start again from the last checkpoint"
        ) from (failure or error)
    if failures:
        raise error_of("; ".join(failures)) from failure


def described(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, WormError) else f"{type(error).__name__}: {error}"
