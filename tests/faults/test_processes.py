"""A rank that dies, hangs or raises: the others end in bounded time, and say which one it was."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.faults.driver import Act, Driver, Ended, Fault, Run, _hang, busy
from worm_dist.distributed.progress import Progress
from worm_dist.errors import CheckpointError

pytestmark = pytest.mark.slow("waits until ranks give up")

BATCH = "worm_dist.training.data.augmentation_rng:SeededSamples.__getitem__"
TEST = "worm_dist.training.trainer:evaluate"
FINISH = "worm_dist.training.reporting.rank_zero:RankZeroReport.finish"
BATCH_FOR = {2: {}, 3: {"data.batch_size": 18}}
"""What so many ranks can share."""


def _assert_all_end(
    ends: list[Ended], exitcode: int, waits: float, works: float, *words: str
) -> None:
    """With one code, soon, and with one line each that has all the words.

    Args:
        waits: seconds that the run's own timeouts come to.
        works: seconds of what is done besides, on a machine that does nothing else.
    """
    assert ends
    for end in ends:
        assert end.exitcode == exitcode, end
        assert end.seconds < waits + busy(works), end
        assert "Traceback" not in end.said
        (line,) = end.errors
        for word in words:
            assert word in line, line


def _assert_stacks(driver: Driver, ranks: set[int], function: str) -> None:
    """These ranks, and no others, have said where their training thread was."""
    files = {path.name: path.read_text() for path in (driver.out / "stacks").iterdir()}
    assert set(files) == {f"rank-{rank}.txt" for rank in ranks}
    for text in files.values():
        _, _, training = text.partition("Thread MainThread (most recent call first):")
        training, _, others = training.partition("Thread ")
        assert function in training and "in main" in training
        assert "worm_dist watchdog" in others


# --- dead and hanging ranks -------------------------------------------------------------------


@pytest.mark.fault(3, "SIGKILL in a step, of rank zero and of others, two and three ranks")
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (3, 1)])
def test_a_killed_rank_ends_the_others_at_once(driver: Driver, world_size: int, rank: int) -> None:
    """gloo's own error named an address, and the exit code was 1."""
    ends = driver(world_size, Run((Fault.kill(rank, step=3),), BATCH_FOR[world_size]))
    victim = ends.pop(rank)
    assert victim.exitcode == -9
    _assert_all_end(ends, 6, 0, 5, "step 3, the gradients", f"rank {rank} is gone")


@pytest.mark.fault(3, "SIGKILL of a rank that has loader processes")
def test_loader_processes_do_not_hide_that_their_rank_is_dead(driver: Driver) -> None:
    """They inherit its connections, and live on for seconds; gloo noticed nothing as long."""
    ends = driver(2, Run((Fault.kill(1, step=3),), {"data.num_workers": 1}))
    assert ends.pop().exitcode == -9
    _assert_all_end(ends, 6, 0, 4, "step 3, the gradients", "rank 1 is gone")


@pytest.mark.fault(3, "SIGSTOP in a step, of rank zero and of others")
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (3, 2)])
def test_a_stopped_rank_is_named_in_bounded_time(
    driver: Driver, world_size: int, rank: int
) -> None:
    """1 s until somebody asks, 2 s for an answer, 1 s for rank zero's verdict, 1 s to come out."""
    settings = {"distributed.timeout_seconds": 1, **BATCH_FOR[world_size]}
    ends = driver(world_size, Run((Fault.stop(rank, step=3),), settings))
    victim = ends.pop(rank)
    assert victim.exitcode is None, "it was there until the driver killed it"
    _assert_all_end(
        ends,
        *(6, 4, 3, "step 3, the gradients", f"rank {rank} is alive but unresponsive"),
        f"are in {driver.out / 'stacks'}",
    )
    _assert_stacks(driver, {end.rank for end in ends}, "_train_step")


@pytest.mark.fault(3, "a training thread that hangs")
def test_a_hanging_rank_ends_by_itself_and_says_where_it_hung(driver: Driver) -> None:
    fault, settings = Fault.hang(1, step=3), {"distributed.timeout_seconds": 1}
    recording = {rank: {"TORCH_FR_BUFFER_SIZE": "100"} for rank in range(2)}
    ends = driver(2, Run((fault,), settings, environment=recording))
    _assert_all_end(
        ends,
        *(6, 4, 3, "rank 1 is stuck at step 3, the next batch", "driver.py:", "_hang"),
        f"the stacks of all ranks are in {driver.out / 'stacks'}",
    )
    _assert_stacks(driver, {0, 1}, "")
    waiting, hanging = ((driver.out / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "in _hang" in hanging and "rank 1 at step 3, the next batch, for " in hanging
    unfinished = [
        text.partition("Flight recorder:")[2].count('"retired":false')
        for text in (waiting, hanging)
    ]
    assert unfinished[0] > 0 == unfinished[1]


@pytest.mark.fault(3, "all ranks wait: a connection has failed, or a GPU")
def test_ranks_that_all_wait_end_after_two_timeouts(driver: Driver) -> None:
    """Nobody was behind the others, so all waited for the backend's timeout, or for ever."""
    hangs = Fault.do(_hang, rank=None, step=3)
    ends = driver(2, Run((hangs,), {"distributed.timeout_seconds": 1}))
    words = ("all ranks wait at step 3, the next batch (", "_hang), for 2.", "the stacks of all")
    _assert_all_end(ends, 6, 5, 3, *words)
    assert min(end.seconds for end in ends) > 2
    _assert_stacks(driver, {0, 1}, "_hang")


@pytest.mark.fault(3, "a hang at the start, where ranks wait for longer")
def test_the_start_has_a_timeout_of_its_own(driver: Driver) -> None:
    settings = {"distributed.timeout_seconds": 1, "distributed.startup_timeout_seconds": 4}
    ends = driver(2, Run((Fault.hang(1, step=1),), settings))
    _assert_all_end(ends, 6, 7, 3, "rank 1 is stuck at step 1", "for 4")
    assert min(end.seconds for end in ends) > 3.5


def _slowly(real: Act, *args: Any) -> Any:
    """Alike on all ranks: each batch of the test takes longer than the timeout."""
    (progress,) = (each for each in args if isinstance(each, Progress))
    for _ in range(2):
        time.sleep(1.5)
        progress.at_work()
    return real(*args)


@pytest.mark.fault(3, "all ranks take longer than the timeout: nothing is wrong")
def test_ranks_that_are_slow_together_go_on(driver: Driver) -> None:
    fault = Fault.do(_slowly, rank=None, step=2).at(TEST)
    ends = driver(2, Run((fault,), {"distributed.timeout_seconds": 1}))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert min(end.seconds for end in ends) > 3


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.fault(2, "raised while a batch is read, on rank zero and on another")
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_ends_all_ranks_and_is_shown_once(driver: Driver, rank: int) -> None:
    fault = Fault.raise_(rank, step=3 * 8 - 1).at(BATCH)
    ends = driver(2, Run((fault,)))
    origin, other = ends[rank], ends[1 - rank]
    _assert_all_end(
        [other], 1, 0, 5, f"rank {rank} failed at step 3, the next batch: ValueError: a"
    )
    assert (origin.exitcode, origin.seconds < busy(5)) == (1, True)
    assert origin.said.count("Traceback") == 1 and "ValueError: a bug" in origin.said


def _refuse(real: Act, *args: Any) -> Any:
    raise CheckpointError("file x: damaged; take another")


@pytest.mark.fault(2, "an error of ours has its own exit code on all ranks")
def test_an_error_of_ours_is_one_line_on_every_rank(driver: Driver) -> None:
    ends = driver(2, Run((Fault.do(_refuse, rank=1, step=1).at(TEST),)))
    _assert_all_end(ends, 3, 0, 5, "file x: damaged; take another")
    assert ends[0].errors[0].startswith("worm_dist: error (rank 0): rank 1 failed at the test")


@pytest.mark.fault(2, "raised by rank zero while it writes the results")
def test_a_rank_that_has_come_to_the_end_waits_for_the_others(driver: Driver) -> None:
    """Rank one had ended well, and its launcher took the run for half a success."""
    ends = driver(2, Run((Fault.raise_(0, step=1).at(FINISH),)))
    assert [end.exitcode for end in ends] == [1, 1]
    _assert_all_end(ends[1:], 1, 0, 5, "rank 0 failed at writing the results: ValueError: a bug")


def _compute(real: Act, *args: Any) -> Any:
    """For long, without asking anybody."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pass


@pytest.mark.fault(2, "the other rank is in no collective")
def test_an_exception_ends_a_rank_that_computes(driver: Driver) -> None:
    computes = Fault.do(_compute, rank=0, step=1).at(TEST)
    ends = driver(2, Run((computes, Fault.raise_(1, step=1).at(TEST))))
    _assert_all_end(ends[:1], 1, 0, 6, "rank 1 failed at the test after epoch 1: ValueError: a bug")
