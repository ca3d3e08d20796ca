from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import NO_GROUP, RankFailure, Ranks


def _sum_of_ranks() -> float:
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return float(value)


def _has_group() -> bool:
    return dist.is_initialized()


def _raise_on(rank: int) -> str:
    if dist.get_rank() == rank:
        raise ValueError("on purpose")
    return "fine"


def _abort_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.abort()


def _sleep() -> None:
    time.sleep(60)


def _compute_for_ever() -> None:
    while True:
        pass


def _wait_for_one_that_computes(seconds: float) -> str:
    end = time.monotonic() + seconds
    while dist.get_rank() == 0 and time.monotonic() < end:
        pass
    dist.barrier()
    return "done"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_takes_part(ranks: Ranks, world_size: int) -> None:
    expected = float(sum(range(world_size)))
    assert ranks(world_size, _sum_of_ranks) == [expected] * world_size


def test_one_process_may_have_no_group(ranks: Ranks) -> None:
    assert ranks(NO_GROUP, _has_group) == [False]


def test_an_exception_is_reported_with_its_rank(ranks: Ranks) -> None:
    first, second = ranks.outcomes(2, _raise_on, 1)
    assert (first.exitcode, first.value, first.error) == (0, "fine", "")
    assert (second.exitcode, second.error, second.text) == (1, "ValueError", "on purpose")
    assert "_raise_on" in second.traceback
    with pytest.raises(RankFailure, match="rank 1: exit code 1 ValueError"):
        ranks(2, _raise_on, 1)


def test_a_signal_shows_as_exit_code(ranks: Ranks) -> None:
    # The other rank may end well, or meet the dead one while it takes the group apart.
    assert ranks.outcomes(2, _abort_on, 1)[1].exitcode == -6


def test_a_rank_that_hangs_is_stopped_and_shows_where_it_was(ranks: Ranks) -> None:
    start = time.monotonic()
    (outcome,) = ranks.outcomes(1, _sleep, idle_limit=1)
    assert time.monotonic() - start < 10
    assert outcome.hung and "_sleep" in outcome.traceback


def test_a_rank_that_computes_for_long_does_not_hang(ranks: Ranks) -> None:
    """Limits on the clock's seconds ended tests that a slow machine had not finished."""
    outcomes = ranks.outcomes(2, _wait_for_one_that_computes, 4.0, idle_limit=2)
    assert [outcome.value for outcome in outcomes] == ["done"] * 2


def test_a_test_that_is_broken_off_leaves_no_ranks(ranks: Ranks) -> None:
    """As pytest breaks off what takes too long; processes are joined at its end."""

    class _BrokenOff(BaseException):
        pass

    def break_off(*unused: object) -> None:
        raise _BrokenOff

    handler = signal.signal(signal.SIGUSR2, break_off)
    pid = os.getpid()
    threading.Timer(1.0, lambda: os.kill(pid, signal.SIGUSR2)).start()
    try:
        with pytest.raises(_BrokenOff):
            ranks.outcomes(2, _compute_for_ever)
    finally:
        signal.signal(signal.SIGUSR2, handler)
    assert multiprocessing.active_children() == []
