"""The watchdogs of two ranks, in real processes."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.distributed.init import RankInfo
from worm_dist.distributed.monitor import MonitorServer
from worm_dist.distributed.progress import Progress
from worm_dist.distributed.timeouts import Timeouts
from worm_dist.distributed.watchdog import _Watchdog, watched

BROKEN = "broken on purpose"


def _break(self: MonitorServer) -> None:
    raise RuntimeError(BROKEN)


def _with_a_monitor_that_fails() -> None:
    """One of two ranks.  The monitor fails when rank one has been asked to stop."""
    MonitorServer._request_stop = _break  # type: ignore[method-assign]
    rank = dist.get_rank()
    stop = StopCoordinator()
    rank_info = RankInfo(rank, 2, rank, 2, "127.0.0.1", 1)
    with watched(rank_info, Progress(), Timeouts(starting=60, steady=60), stop, Path()):
        (watchdog,) = (each for each in threading.enumerate() if isinstance(each, _Watchdog))
        if rank == 1:
            stop.request()
        assert watchdog._finished.wait(20)


@pytest.mark.fault(3, "the monitor itself fails")
def test_all_ranks_end_with_a_monitor_that_fails(ranks: Ranks) -> None:
    """Rank zero's process lives on, so no connection would have told that its monitor is gone."""
    for end in ranks.outcomes(2, _with_a_monitor_that_fails):
        assert end.error == "AlreadyReported", end
        assert end.text == f"the monitor on rank 0 has failed: RuntimeError: {BROKEN}"
        assert end.seconds < 20


def _timeouts_of_the_group(steady: float) -> list[float]:
    """Before and after the first step, of the default group and of another one, in seconds."""
    rank = dist.get_rank()
    groups: list[Any] = [dist.group.WORLD]
    groups.append(dist.new_group([0, 1], timeout=timedelta(seconds=1800)))
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    progress = Progress()
    rank_info = RankInfo(rank, 2, rank, 2, "127.0.0.1", 1)
    timeouts = Timeouts(starting=60, steady=steady)
    with watched(rank_info, progress, timeouts, StopCoordinator(), Path()):
        before = [backend.options._timeout.total_seconds() for backend in backends]
        progress.started()
        after = [backend.options._timeout.total_seconds() for backend in backends]
    return before + after


@pytest.mark.parametrize(("steady", "expected"), [(10, 51), (600, 1290)])
def test_the_backend_waits_as_long_as_the_ranks_may(
    ranks: Ranks, steady: float, expected: float
) -> None:
    """It knew the timeout of the start only: with a longer one for the steps it gave up first, and
    named nobody; with a shorter one it was of no use."""
    assert ranks(2, _timeouts_of_the_group, steady) == [[60, 1800, expected, expected]] * 2
