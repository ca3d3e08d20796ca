"""A deadline for collectives, which may never return when a rank is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["deadline"]


@contextmanager
def deadline(seconds: float, expired: Callable[[], None]) -> Iterator[None]:
    """Call a function in another thread if the block takes longer than so many seconds.

    The function ends the process: the block itself may wait in a backend, which nothing interrupts.
    """
    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
