"""Agreed failure: what fails on one rank raises on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import (
    BackendError,
    CheckpointError,
    CollapseError,
    ConfigError,
    DivergenceError,
    DrawError,
    NonFiniteError,
    WormError,
)
from .collectives import Communicator

__all__ = ["described", "on_every_rank", "refused_on_every_rank"]

logger = logging.getLogger(__name__)

_KINDS = (
    ConfigError,
    CheckpointError,
    DivergenceError,
    NonFiniteError,
    BackendError,
    CollapseError,
    DrawError,
)
"""By exit code: the lower it is, the closer to the cause."""
_OF_THE_HOST = (OSError, MemoryError, torch.OutOfMemoryError)


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
    failures, _ = _compared(comm, failure, ())
    if failures:
        raise error_of("; ".join(failures)) from failure


@contextmanager
def refused_on_every_rank(
    comm: Communicator, otherwise: type[WormError] = CheckpointError
) -> Iterator[None]:
    """Context whose error on one rank is raised on every rank, with the same text and type.  Its
    exit is collective; its body must not be, unless it issues its collectives in any case.

    If ranks raise errors of several types, that with the lowest exit code is raised.

    Args:
        comm: the communicator.
        otherwise: the type that is raised for errors of a disk or for want of memory.

    Raises:
        WormError: naming the ranks that failed, unless all of them did for the same reason.  Any
            other error is raised as it is if all ranks have it; else its rank logs its traceback,
            and every rank raises this class itself.
        BackendError: the ranks cannot tell one another.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # any error: the other ranks must not wait for this one
        failure = error
    kinds = (*((kind, kind) for kind in _KINDS), (_OF_THE_HOST, otherwise))
    flags = [failure is None, *(isinstance(failure, caught) for caught, _ in kinds)]
    failures, (has_any_none, *found) = _compared(comm, failure, flags)
    if not failures:
        return
    kind = next((raised for (_, raised), is_there in zip(kinds, found) if is_there), WormError)
    is_everyones = not has_any_none and len(failures) == 1
    if failure is not None and is_everyones:
        if isinstance(failure, kind) or kind is WormError:
            raise failure
        raise kind(described(failure)) from failure
    if failure is not None and not isinstance(failure, (WormError, *_OF_THE_HOST)):
        logger.error("rank %d: %s", comm.rank, described(failure), exc_info=failure)
    raise kind("; ".join(failures)) from failure


def _compared(
    comm: Communicator, failure: Exception | None, flags: Sequence[bool]
) -> tuple[list[str], list[bool]]:
    """``Communicator.failures``; and, if there are any, which flags are set on any rank.
    Collective."""
    own = "" if failure is None else described(failure)
    try:
        failures = comm.failures(own)
        if not (failures and flags):
            return failures, [False] * len(flags)
        return failures, (comm.mean(torch.tensor(flags).float()) > 0).tolist()
    except Exception as error:  # the reason must not be lost with the connection
        raise BackendError(
            f"{own or 'no failure on this rank'}; then the ranks could not be compared "
            f"({described(error)}). Start again from the last checkpoint"
        ) from (failure or error)


def described(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, WormError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
