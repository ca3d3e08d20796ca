"""Preemption: a scheduler wants the machine back, and says so with a signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from ..distributed.graceful_stop import StopCoordinator

__all__ = ["exit_code_of_stopped", "heeding", "obey_parent_alone"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SLURM, Kubernetes and torchrun's agent send the first; SLURM's ``--signal`` may send either."""

_TRY_AGAIN_LATER = 75


@contextmanager
def heeding() -> Iterator[Callable[[StopCoordinator], None]]:
    """Yields a function: call it with a Halt, and from then on either signal asks that to stop.

    Until then they end the process as ever, there being nothing to lose.  For the main thread.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def heed(halt: StopCoordinator) -> None:
        def ask(number: int, frame: FrameType | None) -> None:
            halt.ask()

        for number in _SIGNALS:
            signal.signal(number, ask)

    try:
        yield heed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of_stopped(environment: Mapping[str, str]) -> int:
    """What a rank exits with that was stopped before the end of the run.

    torchrun takes any other code than 0 for a failure, and starts all ranks anew on a machine that
    is about to go.  Elsewhere it is 75, by which the script of a job can tell it from a run that is
    over.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in environment else _TRY_AGAIN_LATER


def obey_parent_alone(worker: int) -> None:
    """To be called in a loader process, as ``worker_init_fn``.

    Schedulers send their signal to every process of a job.  A rank that loses its loaders cannot
    take the steps that are left, so a loader ends when its rank says so, and not before.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        said = signal.sigwaitinfo(_SIGNALS)
        if said.si_signo == signal.SIGTERM and said.si_pid == parent:
            os._exit(0)
