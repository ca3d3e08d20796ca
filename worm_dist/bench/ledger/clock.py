"""Clock that runs during training and stands still during evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Wall-clock time of the work of a run, by kind.

    Attributes:
        seconds: the time of every piece of work, in order, by kind.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """Count the time of the block as one piece of work of this kind."""
        begin = time.perf_counter()
        yield
        self.seconds.setdefault(kind, []).append(time.perf_counter() - begin)

    def reset(self) -> float:
        """Forget everything; return the seconds of all work together."""
        seconds, self.seconds = self.seconds, {}
        return sum(map(sum, seconds.values()))
