"""Idleness: processes that compute are waited for, however slow the machine; those that all sit
still hang."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess

import psutil

__all__ = ["wait"]

_WINDOW = 2.0
"""Seconds from one look at the processes to the next."""

_LEAST_SHARE = 0.05
"""Share of a core in a window below which a process sits still.  Threads that only watch over a run
use less; a process that shares a core with others that compute gets more."""


def wait(processes: Sequence[BaseProcess], idle_limit: float) -> set[int]:
    """Wait until processes have ended.

    Args:
        processes: they have been started.
        idle_limit: seconds in a row in which none of them, nor any of their children, computes,
            after which they are no longer waited for.

    Returns:
        The indices of those that have not ended.
    """
    running = {process.sentinel: index for index, process in enumerate(processes)}
    idle_since = last_look = time.monotonic()
    used = _processor_seconds(processes)
    while running:
        for sentinel in connection.wait(list(running), timeout=_WINDOW):
            del running[sentinel]  # type: ignore[arg-type]
            idle_since = time.monotonic()
        now = time.monotonic()
        if now - last_look < _WINDOW:
            continue
        before, used = used, _processor_seconds(processes)
        least = _LEAST_SHARE * (now - last_look)
        if any(seconds - before.get(pid, 0.0) > least for pid, seconds in used.items()):
            idle_since = now
        last_look = now
        if now - idle_since > idle_limit:
            break
    return set(running.values())


def _processor_seconds(processes: Sequence[BaseProcess]) -> dict[int, float]:
    """What each process and each of their children has used, by its id."""
    found = {}
    for process in processes:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                found[each.pid] = times.user + times.system
    return found
