from __future__ import annotations

import pytest

from worm_dist.distributed.diagnosis import Failure, FailureReport, RankStatus, diagnose

AHEAD = RankStatus(12, "step 3, the gradients", "graph.py:1, backward")
BEHIND = RankStatus(11, "step 3, the next batch", "data.py:7, read")
BUG = RankStatus(11, "step 3, the next batch", failure=Failure("ValueError: a bug", 1))
TYPO = RankStatus(1, "the start", failure=Failure("data.root: there is no /x", 2))
DIFFERS = RankStatus(1, "the start", failure=Failure("the ranks differ", 4))
CUT_OFF = RankStatus(12, "step 3, the gradients", lost="RuntimeError: closed by peer")
STOPPED = RankStatus()
KILLED = RankStatus(gone=True)


@pytest.mark.parametrize(
    ("standings", "says", "exit_code"),
    [
        ([AHEAD, KILLED], "step 3, the gradients: rank 1 is gone: killed", 6),
        ([KILLED, AHEAD, KILLED], "step 3, the gradients: ranks 0 and 2 are gone: killed", 6),
        ([CUT_OFF, KILLED], "step 3, the gradients: rank 1 is gone: killed", 6),
        ([AHEAD, STOPPED], "rank 1 is there but silent: stopped, or out of reach, for 3 s; ", 6),
        ([BEHIND, AHEAD], "rank 0 is stuck at step 3, the next batch (data.py:7, read), for ", 6),
        ([BEHIND, AHEAD, BEHIND, BEHIND], "ranks 0, 2 and 3 are stuck at step 3, the next", 6),
        ([CUT_OFF, AHEAD], "all ranks are there, but rank 0 is cut off from another: Runt", 6),
        ([AHEAD, BUG], "rank 1 failed at step 3, the next batch: ValueError: a bug", 1),
        ([KILLED, BUG], "rank 1 failed at step 3, the next batch: ValueError: a bug", 1),
    ],
)
def test_whoever_is_missed_is_named(standings: list[RankStatus], says: str, exit_code: int) -> None:
    ending = diagnose(dict(enumerate(standings)), waited_seconds=3)
    assert ending is not None
    assert says in ending.text and "\n" not in ending.text
    assert ending.exit_code == exit_code


@pytest.mark.parametrize("at", [AHEAD, BEHIND])
def test_ranks_that_are_all_at_the_same_place_go_on(at: RankStatus) -> None:
    """A test of a large network may take longer than anybody would wait for a step."""
    assert diagnose({0: at, 1: at}, waited_seconds=300) is None


def test_all_end_with_the_code_that_is_closest_to_the_cause() -> None:
    """The rank without data has nothing that the others could agree with."""
    ending = diagnose({0: DIFFERS, 1: TYPO, 2: DIFFERS})
    assert ending is not None and ending.exit_code == 2
    assert ending.text == (
        "rank 0 failed at the start: the ranks differ; "
        "rank 1 failed at the start: data.root: there is no /x"
    )


def test_of_ranks_with_the_same_error_one_tells_it() -> None:
    ending = diagnose({0: DIFFERS, 1: TYPO, 2: DIFFERS})
    assert ending is not None
    told = [ending.tells("the ranks differ", rank) for rank in (0, 2)]
    assert told == [False, True]
    assert not ending.tells("data.root: there is no /x", 1)
    assert not ending.tells("an error that came too late", 2)


def test_words_say_the_whole_ending() -> None:
    words = {"text": "gone", "exit_code": 6, "speakers": [1, 2]}
    assert FailureReport.of_words(words) == FailureReport("gone", 6, (1, 2))
