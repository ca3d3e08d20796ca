"""Callbacks of collectives, and the end of the process.

gloo runs the Python callbacks of a future in separate threads.  Such a thread needs the
interpreter once more to let go of a callback, and by then ``backward`` may have returned.  If the
interpreter shuts down first, the thread is ended within C++ code, and the process aborts
("terminate called without an active exception") although its training was complete.  Any Python
communication hook has this race.  So a callback is registered here, and the interpreter shuts down
only after the threads have let go of all of them.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["forget_finished", "then"]

_T = TypeVar("_T")
_S = TypeVar("_S")

_SECONDS_TO_FINISH = 2.0
"""Limit of the wait.  The error of a failed collective may refer to a callback and keep it."""

_registered: list[tuple[weakref.ref[Callable[..., Any]], tuple[Any, ...]]] = []
"""Callbacks, each with what must not be let go of by gloo's thread: it would need the interpreter
for that too, after it has let go of the callback."""


def then(
    future: torch.futures.Future[_T],
    callback: Callable[[torch.futures.Future[_T]], _S],
    *,
    work: Any = None,
) -> torch.futures.Future[_S]:
    """``future.then(callback)``; at exit the process waits until the callback has been let go of.

    Args:
        future: the future of a collective, or one that ``then`` has returned.
        callback: called with the completed future; referred to by nothing else.
        work: the collective's work, if the future is its own; and whatever else the callback
            refers to and nothing else does.
    """
    forget_finished()
    result = future.then(callback)
    _registered.append((weakref.ref(callback), (future, result, work)))
    return result


def forget_finished() -> None:
    """Let go of the futures, and so of the buffers, of finished callbacks."""
    _registered[:] = [entry for entry in _registered if entry[0]() is not None]


@atexit.register
def _wait() -> None:
    deadline = time.monotonic() + _SECONDS_TO_FINISH
    while any(callback() is not None for callback, _ in _registered):
        if time.monotonic() > deadline:
            return
        time.sleep(0.001)  # in which the other threads have the interpreter
