"""The watchdogs of two ranks, in real processes."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist.distributed.graceful_stop import StopCoordinator
from worm_dist.distributed.init import RankInfo
from worm_dist.distributed.monitor import MonitorServer
from worm_dist.distributed.progress import Progress
from worm_dist.distributed.watchdog import Timeouts, _Watchdog, watched

BROKEN = "broken on purpose"


def _break(self: MonitorServer) -> None:
    raise RuntimeError(BROKEN)


def _with_a_monitor_that_fails() -> None:
    """One of two ranks.  The monitor fails when rank one has been asked to stop."""
    MonitorServer._request_stop = _break  # type: ignore[method-assign]
    rank = dist.get_rank()
    stop = StopCoordinator()
    rank_info = RankInfo(rank, 2, rank, 2, "127.0.0.1", 1)
    with watched(rank_info, Progress(), Timeouts(starting=60, steady=60), stop):
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
