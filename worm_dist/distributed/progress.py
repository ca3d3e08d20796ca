"""The progress of this rank's training thread, as seen by its watchdog."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Progress", "ProgressPoint"]


class ProgressPoint(NamedTuple):
    """A point of the run that every rank reaches.

    Attributes:
        number: index of the point.  All ranks reach the same points in the same order, so the
            ranks with the lowest number are those that the others wait for.
        what: description for messages, such as "step 3, the gradients".
        since: time at which the point was reached, or the rank was last seen at work there, in
            seconds of ``time.monotonic``.
        starting: whether the run has yet to complete its first step.
    """

    number: int
    what: str
    since: float
    starting: bool


class Progress:
    """The latest progress point; written by the training thread, read by the watchdog thread.

    Attributes:
        now: the progress point that was reached last.
    """

    def __init__(self) -> None:
        self._starting = True
        self._on_start: Callable[[], None] = lambda: None
        self.now = ProgressPoint(0, "the start", time.monotonic(), starting=True)

    def reach(self, what: str) -> None:
        """Record a new progress point, after which other ranks may wait for this one.

        Takes about a microsecond.

        Args:
            what: description of what follows, such as "step 3, the gradients".
        """
        # A single assignment, so that the reader sees either the old point or the new one.
        self.now = ProgressPoint(self.now.number + 1, what, time.monotonic(), self._starting)

    def at_work(self) -> None:
        """Record that this rank works where it is, as opposed to waiting; takes a microsecond.

        For a part of the run that may take longer than any timeout, such as a test.
        """
        self.now = self.now._replace(since=time.monotonic())

    def when_started(self, act: Callable[[], None]) -> None:
        """Set what the training thread does once the first step is complete."""
        self._on_start = act

    def started(self) -> None:
        """Record that the first step is complete; from then on the shorter timeout holds."""
        if self._starting:
            self._starting = False
            self._on_start()
