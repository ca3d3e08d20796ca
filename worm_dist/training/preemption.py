"""Preemption: graceful stop on the signals that schedulers send."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from ..distributed.graceful_stop import StopCoordinator

__all__ = ["exit_code_of_stopped", "exit_with_parent_only", "stop_on_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SLURM, Kubernetes and torchrun's agent send SIGTERM; SLURM's ``--signal`` may send either."""

_TRY_AGAIN_LATER = 75


@contextmanager
def stop_on_signals() -> Iterator[Callable[[StopCoordinator], None]]:
    """Yield a function that installs signal handlers which request a graceful stop.

    Until that function is called the signals end the process as usual, as there is no state to
    save.  The previous handlers are restored at the end.  Main thread only.
    """
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def install(stop: StopCoordinator) -> None:
        def request_stop(number: int, frame: FrameType | None) -> None:
            stop.request()

        for number in _SIGNALS:
            signal.signal(number, request_stop)

    try:
        yield install
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code_of_stopped(environment: Mapping[str, str]) -> int:
    """Exit code of a rank that stopped gracefully before the end of the run.

    Under torchrun it is 0: any other code counts as a failure, and torchrun would restart all ranks
    on a machine that is about to be reclaimed.  Elsewhere it is 75 (``EX_TEMPFAIL``), so that a job
    script can distinguish the run from a finished one.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in environment else _TRY_AGAIN_LATER


def exit_with_parent_only(worker: int) -> None:
    """Ignore stop signals in a loader process unless its rank sends them; a ``worker_init_fn``.

    Schedulers send their signal to every process of a job.  A rank that loses its loaders cannot
    take its remaining steps, so a loader exits only when its rank terminates it.

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
