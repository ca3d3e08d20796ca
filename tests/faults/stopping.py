"""Stopping: send signals to ranks, from within one of them."""

from __future__ import annotations

import gc
import os
import signal
import time

from worm_dist.distributed.graceful_stop import StopCoordinator

__all__ = ["ask_to_stop"]


def ask_to_stop(*signals: tuple[int, signal.Signals]) -> None:
    """Send signals, and wait until this rank has been told that all are to stop: on a busy machine
    a few steps are faster than two messages.

    Another rank's signal may have told it already, so it is asked what it knows, not when."""
    (stop,) = (found for found in gc.get_objects() if isinstance(found, StopCoordinator))
    for pid, number in signals:
        os.kill(pid, number)
    deadline = time.monotonic() + 60
    while not stop.requested:
        assert time.monotonic() < deadline
        time.sleep(0.001)
