"""Halt: where all ranks stop when one of them is asked to.

A job that is about to lose its machine hears of it on one rank, on some, or on all, at different
moments.  They must stop at the same place, or those who go on wait for those who do not.  To agree
on it in every step would cost a collective; here nobody says a word until somebody is asked:

1. the rank that is asked tells rank zero's roll; it asks all ranks how many places they have
   passed, and whoever has answered waits at the next one;
2. the roll names the place after the furthest of them, which nobody has passed, and all go on to
   it.

So a rank takes at most the step that it is in and the one after it, and waits for one answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["StopCoordinator", "Stopped"]


class Stopped(Exception):
    """All ranks stop here, because one of them was asked to; nothing is wrong."""


class StopCoordinator:
    """The places of one rank: between two steps, numbered alike on all ranks.

    Attributes:
        wanted: some rank has been asked to stop.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._num_passed = 0
        self._place: int | None = None
        self._say: Callable[[], None] = self._stop_alone
        self._moves = threading.Condition()

    def speak_through(self, say: Callable[[], None]) -> None:
        """There are other ranks: ``say`` tells the roll that this one has been asked."""
        self._say = say

    def ask(self) -> None:
        """This rank is asked to stop.  A signal handler may call it, at any moment."""
        self._say()

    def pass_by(self) -> None:
        """The training thread comes to a place; costs a microsecond while nobody is asked.

        Raises:
            Stopped: it is the last one, on every rank.
        """
        with self._moves:
            self._num_passed += 1
            if self.wanted:
                self._moves.wait_for(lambda: self._place is not None)
            if self._place is not None and self._num_passed >= self._place:
                raise Stopped

    def waits(self) -> int:
        """From now on the training thread waits at its next place; how many it has passed."""
        with self._moves:
            self.wanted = True
            return self._num_passed

    def stop_at(self, place: int) -> None:
        """The place has been decided."""
        with self._moves:
            self._place = place
            self._moves.notify_all()

    def _stop_alone(self) -> None:
        self.stop_at(self.waits() + 1)
