"""A run whose terminal stops it: Ctrl-C, a closed window, an ssh connection that ends."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.faults.driver import Act, Driver, Ended, Fault, Run, busy
from tests.faults.stopping import ask_to_stop
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.training.preemption import stop_on_signals

SLOW = pytest.mark.slow("stops whole runs and goes on with them")


def _interrupt(real: Act, *args: Any) -> Any:
    ask_to_stop((os.getpid(), signal.SIGINT))
    return real(*args)


def _hang_up(real: Act, *args: Any) -> Any:
    ask_to_stop((os.getpid(), signal.SIGHUP))
    return real(*args)


def _interrupt_twice(real: Act, *args: Any) -> None:
    ask_to_stop((os.getpid(), signal.SIGINT))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def _interrupt_the_launcher(real: Act, *args: Any) -> Any:
    """As a terminal does: torchrun's agent is alone in its process group."""
    agent = os.getppid()
    assert os.getpgid(agent) == agent
    ask_to_stop((-agent, signal.SIGINT))
    return real(*args)


def _step_of_newest(driver: Driver) -> int:
    newest = CheckpointManager(driver.out / "checkpoints").newest()
    assert newest is not None
    return newest.step


def _assert_stopped(driver: Driver, ends: list[Ended], first: int) -> None:
    assert [end.exitcode for end in ends] == [75] * 2, ends
    assert _step_of_newest(driver) in (first, first + 1)
    assert f"* stopped after step {_step_of_newest(driver)}; " in ends[0].printed


@SLOW
@pytest.mark.fault(44, "SIGINT and SIGHUP to one rank; a second SIGINT")
def test_a_terminal_stops_a_run_as_a_scheduler_does(driver: Driver) -> None:
    """A SIGINT was a traceback of KeyboardInterrupt, nothing was saved, and the other rank asked
    whether memory was out."""
    ends = driver(2, Run((Fault.do(_interrupt, rank=1, step=3),)))
    _assert_stopped(driver, ends, 3)
    assert [end.said for end in ends] == ["", ""], "it is said once for all ranks"

    ends = driver(2, Run((Fault.do(_hang_up, rank=0, step=3),)))
    _assert_stopped(driver, ends, 6)
    assert [end.said for end in ends] == ["", ""]

    ends = driver(2, Run((Fault.do(_interrupt_twice, rank=0, step=2),)))
    assert [end.exitcode for end in ends] == [-signal.SIGINT, 6]
    assert ends[0].seconds < busy(10) and "Ctrl-C again ends the run at once" in ends[0].said
    assert "Traceback" not in ends[0].said + ends[1].said

    ends = driver(2, Run())
    assert [end.exitcode for end in ends] == [0, 0]
    assert "* goes on from step" in ends[0].printed


@SLOW
@pytest.mark.fault(44, "Ctrl-C on torchrun, with loader processes")
def test_an_interrupted_torchrun_leaves_a_checkpoint(driver: Driver) -> None:
    """torchrun passes the SIGINT on, to loader processes too."""
    run = Run((Fault.do(_interrupt_the_launcher, rank=1, step=3),), {"data.num_workers": 1})
    end = driver.under_torchrun(2, run)
    assert end.printed.count("* stopped after step") == 1, end.said
    assert _step_of_newest(driver) in (3, 4)
    for words in ("KeyboardInterrupt", "out of memory", "worm_dist: error", "DataLoader"):
        assert words not in end.said
    assert end.said.count("Ctrl-C again") == 1
    ends = driver(2, Run((), run.settings))
    assert [end.exitcode for end in ends] == [0, 0]
    assert "* goes on from step" in ends[0].printed


@pytest.mark.fault(44, "nohup")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """``nohup`` protects a run from the end of its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as install:
            stop = StopCoordinator()
            install(stop)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_those_of_before_at_the_end() -> None:
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals() as install:
        install(StopCoordinator())
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
