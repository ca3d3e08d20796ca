"""Diagnosis: the one reason, the same on all ranks, for which the run cannot go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError

__all__ = ["Failure", "FailureReport", "RankStatus", "diagnose", "ranks_are", "ranks_have"]

_START_AGAIN = "start again from the last checkpoint"
_RAISE = "raise distributed.timeout_seconds (startup_timeout_seconds until the first step is done)"
_MOST_ERRORS_NAMED = 8


@dataclass(frozen=True)
class Failure:
    """An error that a rank raised itself, as opposed to one caused by another rank.

    Attributes:
        text: error message, one line.
        exit_code: exit code of the error.
    """

    text: str
    exit_code: int


@dataclass
class RankStatus:
    """What the monitor knows of a rank.

    Attributes:
        number: number of the progress point that the rank has reached; None if it has not
            answered.
        what: description of that progress point.
        where: file, line and function at which the training thread is.
        has_waited: whether the rank has not moved since all ranks were told to keep waiting.
        failure: the rank's own error, if it raised one.
        lost_contact: the backend's error message if the rank lost contact with another one;
            otherwise empty.
        gone: whether the process has ended without an error and without completing the run.
    """

    number: int | None = None
    what: str = ""
    where: str = ""
    has_waited: bool = False
    failure: Failure | None = None
    lost_contact: str = ""
    gone: bool = False


@dataclass(frozen=True)
class FailureReport:
    """Why and how all ranks end.

    Attributes:
        text: error message, one line, for the ranks that have no error of their own.
        exit_code: exit code of every rank.
        reporting_ranks: the ranks whose own errors the text names, and that print them: of several
            ranks with the same error only the first.
    """

    text: str
    exit_code: int = BackendError.exit_code
    reporting_ranks: tuple[int, ...] = ()

    def covers(self, text: str, rank: int) -> bool:
        """Whether another rank prints the same error message as ``rank`` would."""
        return rank not in self.reporting_ranks and text in self.text

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> FailureReport:
        """Rebuild a report from its ``dataclasses.asdict`` after a round trip through JSON."""
        return cls(message["text"], message["exit_code"], tuple(message["reporting_ranks"]))


def diagnose(
    statuses: Mapping[int, RankStatus], waited_seconds: float = 0, again: bool = False
) -> FailureReport | None:
    """Find the reason for which the run cannot go on.

    Args:
        statuses: status of every rank.
        waited_seconds: longest time that a rank had waited before it reported itself overdue.
        again: whether that rank had been told to keep waiting before, at the same point.

    Returns:
        The report for all ranks; None if nothing is wrong and all ranks should go on waiting.
    """
    failures = {rank: status.failure for rank, status in statuses.items() if status.failure}
    if failures:
        return _report_failures(failures, statuses)
    gone = [rank for rank, status in statuses.items() if status.gone]
    answered = {
        rank: status
        for rank, status in statuses.items()
        if status.number is not None and not status.gone
    }
    at = answered[min(answered)].what if answered else "the start"
    waited = f", for {waited_seconds:.3g} s" if waited_seconds else ""
    if gone:
        return FailureReport(
            f"{at}: {ranks_are(gone)} gone: killed (out of memory?), crashed, or cut off with "
            f"the host; look into its log, and {_START_AGAIN}"
        )
    unresponsive = [rank for rank in statuses if rank not in answered]
    if unresponsive:
        return FailureReport(
            f"{at}: {ranks_are(unresponsive)} alive but unresponsive{waited}: stopped, or "
            f"unreachable; look at the process, and {_START_AGAIN}"
        )
    numbers = {rank: status.number or 0 for rank, status in answered.items()}
    lowest = min(numbers.values())
    behind = [rank for rank, number in numbers.items() if number == lowest]
    if len(behind) < len(numbers):
        last = answered[behind[0]]
        ahead = answered[max(numbers, key=lambda rank: numbers[rank])]
        return FailureReport(
            f"{ahead.what}: {ranks_are(behind)} stuck at {last.what} ({last.where}){waited}; "
            f"{_RAISE} if that may take so long, or {_START_AGAIN}"
        )
    lost = {rank: status.lost_contact for rank, status in statuses.items() if status.lost_contact}
    if lost:
        return FailureReport(
            f"{at}: all ranks are alive, but {ranks_are(list(lost))} cut off from another: "
            f"{lost[min(lost)]}; check the network, and {_START_AGAIN}"
        )
    if again and all(status.has_waited for status in statuses.values()):
        return FailureReport(
            f"all ranks wait at {at} ({answered[min(answered)].where}){waited}: a connection "
            f"between two of them or a GPU may have failed; {_RAISE} if that may take so long, or "
            f"{_START_AGAIN}"
        )
    return None


def ranks_are(ranks: Sequence[int]) -> str:
    """The ranks as the subject of a sentence: ``rank 1 is``, ``ranks 1, 2 and 5 are``."""
    return f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def ranks_have(ranks: Sequence[int]) -> str:
    """The same with ``has`` or ``have``."""
    return f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _report_failures(
    failures: Mapping[int, Failure], statuses: Mapping[int, RankStatus]
) -> FailureReport:
    first_rank: dict[str, int] = {}
    for rank in sorted(failures):
        first_rank.setdefault(failures[rank].text, rank)
    # Each of thousands of ranks may have its own, such as one that says which rank it is.
    named = list(first_rank.items())[:_MOST_ERRORS_NAMED]
    parts = [f"rank {rank} failed at {statuses[rank].what}: {error}" for error, rank in named]
    if len(named) < len(first_rank):
        parts.append(f"and {len(first_rank) - len(named)} other errors")
    # The lower the code, the closer to the cause: a mistake in the settings of one rank may well
    # make the others differ from it, or lose contact with it.
    exit_code = min(failure.exit_code for failure in failures.values())
    return FailureReport("; ".join(parts), exit_code, tuple(rank for _, rank in named))
