"""Ending: why no rank can go on, told alike on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError

__all__ = ["Failure", "FailureReport", "RankStatus", "diagnose", "ranks_named"]

_START_AGAIN = "start again from the last checkpoint"


@dataclass(frozen=True)
class Failure:
    """An error that a rank raised by itself.

    Attributes:
        text: one line.
        exit_code: what the rank would exit with.
    """

    text: str
    exit_code: int


@dataclass
class RankStatus:
    """What is known of a rank.

    Attributes:
        number, what: the station that it has reached; no number if it did not answer.
        where: the line of code that it is at.
        failure: its own error.
        lost: what its backend said, if it lost contact with another rank.
        gone: its process has ended, without an error or a goodbye.
    """

    number: int | None = None
    what: str = ""
    where: str = ""
    failure: Failure | None = None
    lost: str = ""
    gone: bool = False


@dataclass(frozen=True)
class FailureReport:
    """How all ranks end.

    Attributes:
        text: one line for the ranks that have no error of their own.
        exit_code: of every rank.
        speakers: the ranks that tell their own error; others have the same one.
    """

    text: str
    exit_code: int = BackendError.exit_code
    speakers: tuple[int, ...] = ()

    def tells(self, text: str, rank: int) -> bool:
        """Whether another rank tells the same error as this one."""
        return rank not in self.speakers and text in self.text

    @classmethod
    def of_words(cls, words: Mapping[str, Any]) -> FailureReport:
        """From what ``dataclasses.asdict`` and JSON have made of it."""
        return cls(words["text"], words["exit_code"], tuple(words["speakers"]))


def diagnose(
    standings: Mapping[int, RankStatus], waited_seconds: float = 0
) -> FailureReport | None:
    """What has to be told; None if nothing is wrong, and all shall go on.

    Args:
        standings: of all ranks.
        waited_seconds: how long a rank had been waiting before it asked.
    """
    failures = {rank: known.failure for rank, known in standings.items() if known.failure}
    if failures:
        return _of_failures(failures, standings)
    gone = [rank for rank, known in standings.items() if known.gone]
    answered = {
        rank: known
        for rank, known in standings.items()
        if known.number is not None and not known.gone
    }
    at = answered[min(answered)].what if answered else "the start"
    waited = f", for {waited_seconds:.3g} s" if waited_seconds else ""
    if gone:
        return FailureReport(
            f"{at}: {ranks_named(gone)} gone: killed (out of memory?), crashed, or cut off with "
            f"the host; look into its log, and {_START_AGAIN}"
        )
    silent = [rank for rank in standings if rank not in answered]
    if silent:
        return FailureReport(
            f"{at}: {ranks_named(silent)} there but silent: stopped, or out of reach{waited}; look "
            f"at the process, and {_START_AGAIN}"
        )
    numbers = {rank: known.number or 0 for rank, known in answered.items()}
    lowest = min(numbers.values())
    behind = [rank for rank, number in numbers.items() if number == lowest]
    if len(behind) < len(numbers):
        last = answered[behind[0]]
        ahead = answered[max(numbers, key=lambda rank: numbers[rank])]
        return FailureReport(
            f"{ahead.what}: {ranks_named(behind)} stuck at {last.what} ({last.where}){waited}; "
            f"raise distributed.timeout_seconds if that may take so long, or {_START_AGAIN}"
        )
    lost = {rank: known.lost for rank, known in standings.items() if known.lost}
    if lost:
        return FailureReport(
            f"{at}: all ranks are there, but {ranks_named(list(lost))} cut off from another: "
            f"{lost[min(lost)]}; check the network, and {_START_AGAIN}"
        )
    return None


def ranks_named(ranks: Sequence[int]) -> str:
    """``rank 1 is``, ``ranks 1, 2 and 5 are``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} are"


def _of_failures(
    failures: Mapping[int, Failure], standings: Mapping[int, RankStatus]
) -> FailureReport:
    first: dict[str, int] = {}
    for rank in sorted(failures):
        first.setdefault(failures[rank].text, rank)
    text = "; ".join(
        f"rank {rank} failed at {standings[rank].what}: {said}" for said, rank in first.items()
    )
    # The lower the code, the closer to the cause: a mistake in the settings of one rank may well
    # make the others differ from it, or lose it.
    exit_code = min(failure.exit_code for failure in failures.values())
    return FailureReport(text, exit_code, tuple(first.values()))
