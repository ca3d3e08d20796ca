"""Graceful stop: all ranks stop at the same step boundary when one of them is asked to.

A scheduler that is about to take a machine away signals one rank, some or all of them, at
different moments.  All ranks must stop at the same step, or those that go on wait for those that
do not.  To agree on it in every step would cost a collective; here nothing is sent until a rank is
asked to stop:

1. that rank notifies the monitor on rank zero.  The monitor asks every rank how many step
   boundaries it has passed; a rank that has answered waits at its next boundary;
2. the monitor sends the boundary after the furthest one, which no rank has passed, and all ranks go
   on to it.

So a rank completes at most its current step and the one after, and waits for one answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["StopCoordinator", "Stopped"]


class Stopped(Exception):
    """Raised on every rank at the agreed step boundary after a stop request; not an error."""


class StopCoordinator:
    """The stop request of one rank, and its boundaries between steps, numbered alike on all ranks.

    Attributes:
        requested: whether any rank has been asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._num_passed = 0
        self._last_boundary: int | None = None
        self._on_request: Callable[[], None] = self._stop_alone
        self._decided = threading.Condition()

    def notify_by(self, notify: Callable[[], None]) -> None:
        """Set how a stop request is passed on to the monitor.

        Args:
            notify: function that tells the monitor that this rank was asked to stop.  Without one
                the request concerns this process only.
        """
        self._on_request = notify

    def request(self) -> None:
        """Ask all ranks to stop.  A signal handler may call it at any moment."""
        self._on_request()

    def pass_boundary(self) -> None:
        """Called by the training thread between two steps; takes about a microsecond.

        Raises:
            Stopped: this is the agreed boundary, on every rank.
        """
        with self._decided:
            self._num_passed += 1
            if self.requested:
                self._decided.wait_for(lambda: self._last_boundary is not None)
            if self._last_boundary is not None and self._num_passed >= self._last_boundary:
                raise Stopped

    def hold(self) -> int:
        """Make the training thread wait at its next boundary until ``stop_at`` is called.

        Returns:
            The number of boundaries passed so far.
        """
        with self._decided:
            self.requested = True
            return self._num_passed

    def stop_at(self, boundary: int) -> None:
        """Set the boundary at which all ranks stop, and release a waiting training thread.

        Args:
            boundary: number of the boundary, counted from 1.
        """
        with self._decided:
            self._last_boundary = boundary
            self._decided.notify_all()

    def _stop_alone(self) -> None:
        self.stop_at(self.hold() + 1)
