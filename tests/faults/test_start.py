"""Ranks that cannot or must not begin together."""

from __future__ import annotations

import functools
import json
import resource
import socket
from typing import Any

import pytest

from tests.faults.courses import under_zero
from tests.faults.driver import Act, Driver, Fault, Run, busy

pytestmark = pytest.mark.slow("waits for ranks that do not come")

VERSIONS = "worm_dist.training.consistency:versions"
GROUP = "worm_dist.training.run:process_group"
CODE = "worm_dist.training.consistency:_code_digest"


def _older_torch(real: Act) -> Any:
    return {**real(), "torch": "1.0"}


def _other_code(real: Act, folder: Any) -> Any:
    return "edited"


def _unreadable_code(real: Act, folder: Any) -> Any:
    raise OSError("Stale file handle")


@pytest.mark.fault(2, "before the ranks are compared")
def test_a_rank_that_cannot_be_compared_is_told_on_all(driver: Driver) -> None:
    """It raised alone, and the other rank waited for its settings."""
    ends = driver(2, Run((Fault.do(_unreadable_code, 1, None).at(CODE),)))
    assert [end.exitcode for end in ends] == [2, 2]
    (line,) = [error for end in ends for error in end.errors]
    assert line == "worm_dist: error (rank 0): rank 1: OSError: Stale file handle"


@pytest.mark.fault(22, "settings, versions or code of one rank differ")
@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            Run(per_rank={1: {"optimizer.lr": 0.2, "epochs": 3}}),
            "epochs is 2 on rank 0, 3 on rank 1; optimizer.lr is 0.1 on rank 0, 0.2 on rank 1; ",
        ),
        (
            Run((Fault.do(_older_torch, rank=1, step=None).at(VERSIONS),)),
            "on rank 0, 1.0 on rank 1; give all of them the same settings and the same install",
        ),
        (
            Run((Fault.do(_other_code, rank=0, step=None).at(CODE),)),
            "the code of worm_dist is edited on rank 0, ",
        ),
        (
            Run(settings=under_zero(1), per_rank={1: under_zero(2)}),
            "distributed.deepspeed.zero_optimization is {'stage': 1} on rank 0, {'stage': 2} on ",
        ),
    ],
)
def test_ranks_that_are_not_started_alike_are_refused(driver: Driver, run: Run, says: str) -> None:
    """They would have trained together: the engine compares its own settings only."""
    ends = driver(2, run)
    assert [(end.exitcode, len(end.errors)) for end in ends] == [(4, 1), (4, 0)]
    assert "start: the ranks have not been started alike: " in ends[0].said
    assert says in ends[0].said
    assert not driver.out.exists(), "nothing has begun"


@pytest.mark.fault(22, "places and loaders may differ from host to host")
def test_each_host_has_its_own_place_for_the_data(driver: Driver) -> None:
    run = Run(per_rank={1: {"data.root": "/elsewhere", "data.num_workers": 1}})
    ends = driver(2, run)
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert json.loads((driver.out / "result.json").read_text())["status"] == "dense"


@pytest.mark.fault(21, "a rank that does not come")
def test_a_rank_that_does_not_come_is_named(driver: Driver) -> None:
    """torch says how many have come, not who has not."""
    run = Run(
        settings={"distributed.startup_timeout_seconds": 3},
        environment={rank: {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"} for rank in range(2)},
    )
    for end in driver(2, run):
        assert end.exitcode == 6 and end.seconds < 10 + busy(10)
        (line,) = end.errors
        assert "rank 2 is not there after 3 seconds" in line


@pytest.mark.fault(21, "a port that another program has")
def test_a_port_in_use_ends_all_ranks(driver: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        run = Run(
            settings={"distributed.startup_timeout_seconds": 3},
            environment={rank: {"MASTER_PORT": port} for rank in range(2)},
        )
        ends = driver(2, run)
    assert [end.exitcode for end in ends] == [6, 6]
    assert f"127.0.0.1:{port}, the port is in use; set MASTER_PORT" in ends[0].errors[0]
    assert f"could not join the others at 127.0.0.1:{port}" in ends[1].errors[0]
    assert max(end.seconds for end in ends) < 10 + busy(10)


def _with_files(soft: int, hard: int, real: Act, *args: Any) -> Any:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return real(*args)


@pytest.mark.fault(36, "a soft limit too low for four ranks; the run is as any other")
def test_a_low_limit_on_files_is_raised(driver: Driver) -> None:
    """Accepting failed without a word, and the ranks were never told the end."""
    act = functools.partial(_with_files, 34, 1000)
    run = Run((Fault.do(act, rank=None, step=1).at(GROUP),), {"epochs": 1})
    assert [(end.exitcode, end.said) for end in driver(4, run)] == [(0, "")] * 4


@pytest.mark.fault(36, "a hard limit too low on rank zero: all ranks are told at the start")
def test_a_limit_on_files_that_cannot_be_raised_is_told(driver: Driver) -> None:
    act = functools.partial(_with_files, 60, 60)
    ends = driver(4, Run((Fault.do(act, rank=0, step=1).at(GROUP),)))
    for end in ends:
        assert end.exitcode == 6 and end.seconds < 3 + busy(8)
        (line,) = end.errors
        assert "rank 0 of 4 needs 76 file descriptors" in line and "limit is 60" in line
    assert not driver.out.exists()
