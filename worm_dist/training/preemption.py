"""Preemption: graceful stop on the signals that schedulers and terminals send."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from ..distributed.graceful_stop import StopCoordinator

__all__ = ["exit_code_of_stopped", "exit_with_parent_only", "stop_on_signals"]

_FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
"""SLURM, Kubernetes and torchrun's agent send SIGTERM; SLURM's ``--signal`` may send either."""
_FROM_TERMINALS = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C, which torchrun's agent passes on, and a terminal or an ssh connection that is closed."""
_SIGNALS = (*_FROM_SCHEDULERS, *_FROM_TERMINALS)
_AT_FIRST_SIGINT = b"""
worm_dist: stopping after this step, with a checkpoint; Ctrl-C again ends the run at once
"""

_TRY_AGAIN_LATER = 75


@contextmanager
def stop_on_signals() -> Iterator[Callable[[StopCoordinator], None]]:
    """Yield a function that installs signal handlers which request a graceful stop.

    Until that function is called the signals end the process, without a traceback, as there is no
    state to save.  Afterwards a second SIGINT ends it at once.  A signal of terminals that is
    ignored, as ``nohup`` and a shell's ``&`` arrange it, stays ignored.  The previous handlers are
    restored at the end.  Main thread only.
    """
    previous = {
        number: handler
        for number in _SIGNALS
        if (handler := signal.getsignal(number)) != signal.SIG_IGN or number in _FROM_SCHEDULERS
    }

    def install(stop: StopCoordinator) -> None:
        def request_stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                # Not a handler: it would wait for a collective to return.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                _announce()
            stop.request()

        for number in previous:
            signal.signal(number, request_stop)

    try:
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        yield install
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce() -> None:
    """Tell whoever pressed Ctrl-C, once for all ranks; the stream may be in use, or lost."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, _AT_FIRST_SIGINT)


def exit_code_of_stopped(environment: Mapping[str, str]) -> int:
    """Exit code of a rank that stopped gracefully before the end of the run.

    Under torchrun it is 0: any other code counts as a failure, and torchrun would restart all ranks
    on a machine that is about to be reclaimed.  Elsewhere it is 75 (``EX_TEMPFAIL``), so that a job
    script can distinguish the run from a finished one.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in environment else _TRY_AGAIN_LATER


def exit_with_parent_only(worker: int) -> None:
    """Ignore stop signals in a loader process unless its rank sends them; a ``worker_init_fn``.

    Schedulers and terminals send their signal to every process of a job.  A rank that loses its
    loaders cannot take its remaining steps, so a loader exits only when its rank terminates it.

    Args:
        worker: the worker's index; not used.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_exit_with_parent, args=(parent.pid,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
