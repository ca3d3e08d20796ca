from __future__ import annotations

import pytest

from worm_dist.distributed.connection import MAX_MESSAGE_BYTES
from worm_dist.distributed.diagnosis import Failure, FailureReport, RankStatus, diagnose

AHEAD = RankStatus(12, "step 3, the gradients", "graph.py:1, backward")
BEHIND = RankStatus(11, "step 3, the next batch", "data.py:7, read")
BUG = RankStatus(11, "step 3, the next batch", failure=Failure("ValueError: a bug", 1))
TYPO = RankStatus(1, "the start", failure=Failure("data.root: there is no /x", 2))
DIFFERS = RankStatus(1, "the start", failure=Failure("the ranks differ", 4))
CUT_OFF = RankStatus(12, "step 3, the gradients", lost_contact="RuntimeError: closed by peer")
STOPPED = RankStatus()
KILLED = RankStatus(gone=True)
WAITS = RankStatus(12, "step 3, the gradients", "graph.py:1, backward", has_waited=True)


@pytest.mark.parametrize(
    ("statuses", "says", "exit_code"),
    [
        ([AHEAD, KILLED], "step 3, the gradients: rank 1 is gone: killed", 6),
        ([KILLED, AHEAD, KILLED], "step 3, the gradients: ranks 0 and 2 are gone: killed", 6),
        ([CUT_OFF, KILLED], "step 3, the gradients: rank 1 is gone: killed", 6),
        ([AHEAD, STOPPED], "rank 1 is alive but unresponsive, for 3 s: stopped, or ", 6),
        ([BEHIND, AHEAD], "rank 0 is stuck at step 3, the next batch (data.py:7, read), for ", 6),
        ([BEHIND, AHEAD, BEHIND, BEHIND], "ranks 0, 2 and 3 are stuck at step 3, the next", 6),
        ([CUT_OFF, AHEAD], "all ranks are alive, but rank 0 is cut off from another: Runt", 6),
        ([AHEAD, BUG], "rank 1 failed at step 3, the next batch: ValueError: a bug", 1),
        ([KILLED, BUG], "rank 1 failed at step 3, the next batch: ValueError: a bug", 1),
    ],
)
def test_whoever_is_missed_is_named(statuses: list[RankStatus], says: str, exit_code: int) -> None:
    report = diagnose(dict(enumerate(statuses)), waited_seconds=3)
    assert report is not None
    assert says in report.text and "\n" not in report.text
    assert report.exit_code == exit_code


@pytest.mark.parametrize("at", [AHEAD, BEHIND])
def test_ranks_that_are_all_at_the_same_place_go_on(at: RankStatus) -> None:
    """A test of a large network may take longer than anybody would wait for a step."""
    assert diagnose({0: at, 1: at}, waited_seconds=300) is None


@pytest.mark.parametrize(
    ("statuses", "again", "ends"),
    [
        ([WAITS, WAITS], True, True),
        ([WAITS, WAITS], False, False),
        ([WAITS, AHEAD], True, False),
    ],
)
def test_ranks_that_all_wait_are_ended_the_second_time(
    statuses: list[RankStatus], again: bool, ends: bool
) -> None:
    """Unless one of them has been seen at work meanwhile."""
    report = diagnose(dict(enumerate(statuses)), 600, again)
    assert (report is not None) == ends
    if report is not None:
        assert "all ranks wait at step 3, the gradients (graph.py:1, backward), for" in report.text
        assert report.exit_code == 6 and "\n" not in report.text


def test_all_end_with_the_code_that_is_closest_to_the_cause() -> None:
    """The rank without data has nothing that the others could agree with."""
    report = diagnose({0: DIFFERS, 1: TYPO, 2: DIFFERS})
    assert report is not None and report.exit_code == 2
    assert report.text == (
        "rank 0 failed at the start: the ranks differ; "
        "rank 1 failed at the start: data.root: there is no /x"
    )


def test_of_ranks_with_the_same_error_one_tells_it() -> None:
    report = diagnose({0: DIFFERS, 1: TYPO, 2: DIFFERS})
    assert report is not None
    covered = [report.covers("the ranks differ", rank) for rank in (0, 2)]
    assert covered == [False, True]
    assert not report.covers("data.root: there is no /x", 1)
    assert not report.covers("an error that came too late", 2)


def test_a_report_of_many_errors_names_some() -> None:
    """Where all ranks are wrong, each in its own words, nobody would read them all.  A rank that is
    left out tells its error itself."""
    failed = {
        rank: RankStatus(failure=Failure(f"rank {rank}: not finite", 5)) for rank in range(1000)
    }
    report = diagnose(failed)
    assert report is not None and report.reporting_ranks == tuple(range(8))
    assert report.text.endswith("rank 7: not finite; and 992 other errors")
    assert not report.covers("rank 900: not finite", 900)


def test_the_longest_report_may_be_sent() -> None:
    """All ranks but one are gone."""
    statuses = {rank: RankStatus(gone=rank > 0) for rank in range(100_000)}
    report = diagnose(statuses)
    assert report is not None and len(report.text) < MAX_MESSAGE_BYTES


def test_a_report_survives_the_round_trip_through_json() -> None:
    message = {"text": "gone", "exit_code": 6, "reporting_ranks": [1, 2]}
    assert FailureReport.from_message(message) == FailureReport("gone", 6, (1, 2))
