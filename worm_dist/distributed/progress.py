"""Progress: how far this rank has come, for those who wait for it."""

from __future__ import annotations

import time
from typing import NamedTuple

__all__ = ["Progress", "ProgressPoint"]


class ProgressPoint(NamedTuple):
    """A place that every rank comes to.

    Attributes:
        number: of the station.  All ranks pass the same ones in the same order, so whoever has a
            lower number is waited for.
        what: for people, such as "step 3, the gradients".
        since: when it was reached, in seconds of ``time.monotonic``.
        starting: the run has yet to take its first step.
    """

    number: int
    what: str
    since: float
    starting: bool


class Progress:
    """Written by the thread that trains, read by the one that watches."""

    def __init__(self) -> None:
        self._starting = True
        self.now = ProgressPoint(0, "the start", time.monotonic(), starting=True)

    def reach(self, what: str) -> None:
        """Whatever follows, other ranks may have to wait for; costs a microsecond."""
        # One assignment, so that a reader sees one station or the other.
        self.now = ProgressPoint(self.now.number + 1, what, time.monotonic(), self._starting)

    def started(self) -> None:
        """The first step is done: nothing takes as long any more as at the start."""
        self._starting = False
