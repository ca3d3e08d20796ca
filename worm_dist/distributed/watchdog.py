"""The watchdog of a rank: ends the run when another rank fails, instead of waiting for it forever.

A collective with a missing peer waits for its timeout and then does not say which rank was missing;
under NCCL it may never return.  So each rank has a thread with a connection to the monitor on rank
zero.  The thread reports this rank's progress when asked; it reports the rank as overdue when it
has been at one progress point for too long; and it ends the process when the run has failed and
the training thread does not return from its collective.  An error that one rank raises, and a
request to stop (see ``graceful_stop``), reach the other ranks the same way.  While all is well
nothing is sent, and training is not affected.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ..errors import BackendError, WormError
from .connection import JsonConnection, Message
from .diagnosis import FailureReport, RankStatus, diagnose
from .error_report import (
    AlreadyReported,
    hard_exit,
    one_line,
    print_error,
    write_torchelastic_error,
)
from .graceful_stop import StopCoordinator
from .init import RankInfo
from .monitor import SECONDS_FOR_STACKS, SECONDS_TO_COLLECT
from .monitor_endpoint import connect_to_monitor
from .progress import Progress, ProgressPoint
from .stacks import flight_record, own_stacks, write_stacks
from .timeouts import Timeouts, set_group_timeout

__all__ = ["watched"]

_SECONDS_TO_EXIT = 5.0
"""Time for a rank whose error is reported to close its files."""
_SECONDS_TO_WRITE = 1.0
"""Time for this rank to write its stacks, if rank zero cannot do it."""
_SECONDS_TO_RETURN = 1.0
"""Time for a training thread to return from its collective after another rank has failed."""


@contextmanager
def watched(
    rank_info: RankInfo,
    progress: Progress,
    timeouts: Timeouts,
    stop: StopCoordinator,
    stacks: Path,
) -> Iterator[None]:
    """Run the training inside this context, in a process group of several ranks.  Collective.

    Args:
        rank_info: this process's rank information.
        progress: the progress points of the training thread.
        timeouts: limits on how long ranks wait for one another.
        stop: the stop coordinator that the training thread calls between two steps.
        stacks: folder in the run's folder, for the stacks of the ranks when some are missed.

    Raises:
        AlreadyReported: this rank or another has failed, and the error was printed.  Its exit code
            is the same on every rank.  Where the training thread does not return from a collective,
            the process ends with that code instead.
        BackendError: rank zero cannot be reached.
    """
    monitor, connection = connect_to_monitor(rank_info, timeouts.starting, timeouts.grace, stacks)
    watchdog = _Watchdog(connection, rank_info.rank, progress, timeouts, stop, stacks)
    progress.when_started(lambda: set_group_timeout(timeouts.steady))
    watchdog.start()
    try:
        yield
        watchdog.done()
    except Exception as error:
        watchdog.failed(error)
    finally:
        if monitor is not None:
            monitor.join(_SECONDS_TO_RETURN)
    if watchdog.report is not None:
        raise AlreadyReported(watchdog.report) from watchdog.failure


class _Watchdog(threading.Thread):
    """The watchdog thread of one rank; created by the training thread.

    Args:
        connection: the connection to the monitor.
        rank: this process's rank.
        progress: the progress points of the training thread.
        timeouts: limits on how long ranks wait for one another.
        stop: the stop coordinator of this rank.
        stacks: folder for the stacks of the ranks.

    Attributes:
        failure: the error that the training thread has raised.
        report: the failure report shared by all ranks; None while they train, and if they complete
            the run.
    """

    def __init__(
        self,
        connection: JsonConnection,
        rank: int,
        progress: Progress,
        timeouts: Timeouts,
        stop: StopCoordinator,
        stacks: Path,
    ) -> None:
        super().__init__(name="worm_dist watchdog", daemon=True)
        self.failure: Exception | None = None
        self.report: FailureReport | None = None
        self._connection = connection
        self._rank = rank
        self._progress = progress
        self._timeouts = timeouts
        self._stacks_folder = stacks
        self._stop_coordinator = stop
        stop.notify_by(lambda: connection.send(stop_requested=True))
        self._training_thread = threading.get_ident()
        self._reported_overdue_at: float | None = None
        self._waiting_since = time.monotonic()
        self._kept_waiting_at: ProgressPoint | None = None
        self._stacks_sent_at = float("-inf")
        self._prints_report = False
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._training_returned = threading.Event()

    # ---- called by the training thread -----------------------------------------------------------

    def failed(self, error: Exception) -> None:
        """Report an error of the training thread to the monitor, and print it if need be."""
        lost_contact = _is_lost_contact(error)
        with self._lock:
            self.failure = error
            already_reported = self.report is not None  # by the watchdog thread
        self._training_returned.set()
        if not lost_contact:
            write_torchelastic_error(error)
        if not already_reported:
            message = {"lost_contact": one_line(error)} if lost_contact else self._describe(error)
            self._connection.send(**message)
            asked_at = time.monotonic()
            while not self._finished.wait(self._seconds_to_answer(asked_at)):
                if self._seconds_to_answer(asked_at) == 0:
                    self._finish(self._report_on_rank_zero(gone=False))
        assert self.report is not None
        if not lost_contact and not self.report.covers(one_line(error), self._rank):
            print_error(error, self._rank)
        elif lost_contact and not already_reported:
            print_error(AlreadyReported(self.report), self._rank)

    def done(self) -> None:
        """Report that this rank has completed the run, and wait until all have, or one fails."""
        self._progress.reach("the end of the run")
        self._connection.send(done=True)
        self._finished.wait()
        self._training_returned.set()

    def _describe(self, error: Exception) -> Message:
        return {
            "failed": one_line(error),
            "exit_code": error.exit_code if isinstance(error, WormError) else WormError.exit_code,
            "what": self._progress.now.what,
        }

    # ---- the watchdog thread ---------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._finished.is_set():
                # Not longer than this: the first step may complete meanwhile, and with it the
                # starting timeout ends.
                seconds = min(self._seconds_left, self._timeouts.steady / 10)
                message = self._connection.receive_within(seconds)
                if message is not None:
                    self._handle(message)
                if not self._finished.is_set() and self._seconds_left <= 0:
                    self._overdue()
        except EOFError:
            self._finish(self._report_on_rank_zero(gone=True))
        self._connection.close()
        if self.report is not None:
            self._end_process(self.report)

    def _handle(self, message: Message) -> None:
        if "report_progress" in message:
            now = self._progress.now
            self._connection.send(
                number=now.number,
                what=now.what,
                where=self._where(),
                has_waited=now is self._kept_waiting_at,
            )
        elif "report_stacks" in message:
            self._connection.send(stacks=self._own_stacks())
            self._connection.send(flight_record=flight_record())
            self._stacks_sent_at = time.monotonic()
        elif "hold" in message:
            self._connection.send(num_passed=self._stop_coordinator.hold())
        elif "stop_at" in message:
            self._stop_coordinator.stop_at(message["stop_at"])
        elif "keep_waiting" in message:
            self._reported_overdue_at, self._waiting_since = None, time.monotonic()
            self._kept_waiting_at = self._progress.now
        elif "failure_report" in message:
            self._finish(FailureReport.from_message(message["failure_report"]))
        elif "all_done" in message:
            self._finished.set()

    @property
    def _seconds_left(self) -> float:
        """Time until the limit on waiting for the other ranks, or for the monitor's answer."""
        if self._reported_overdue_at is not None:
            return self._seconds_to_answer(self._reported_overdue_at)
        now = self._progress.now
        limit = self._timeouts.starting if now.starting else self._timeouts.steady
        return max(now.since, self._waiting_since) + limit - time.monotonic()

    def _seconds_to_answer(self, asked_at: float) -> float:
        """Time until the monitor must have answered, which asks for stacks before it ends a run."""
        deadline = max(
            asked_at + self._timeouts.grace + SECONDS_TO_COLLECT,
            self._stacks_sent_at + SECONDS_FOR_STACKS,
        )
        return max(0.0, deadline + 1 - time.monotonic())

    def _overdue(self) -> None:
        if self._reported_overdue_at is None:
            now = self._progress.now
            self._reported_overdue_at = time.monotonic()
            self._connection.send(
                overdue=self._reported_overdue_at - now.since, again=now is self._kept_waiting_at
            )
        else:
            self._finish(self._report_on_rank_zero(gone=False))

    def _report_on_rank_zero(self, gone: bool) -> FailureReport:
        """The report when the monitor itself, which is on rank zero, does not answer."""
        now = self._progress.now
        statuses = {0: RankStatus(gone=gone), self._rank: RankStatus(now.number, now.what)}
        report = diagnose(statuses, 0 if gone else time.monotonic() - now.since)
        report = report or FailureReport("the monitor on rank 0 has ended")
        stacks = {self._rank: self._own_stacks()}
        # Before the start the folder may be that of another run.
        if now.number and write_stacks(self._stacks_folder, stacks, _SECONDS_TO_WRITE, False):
            where = f"the stacks of rank {self._rank} are in {self._stacks_folder}"
            return replace(report, text=f"{report.text}; {where}")
        return report

    def _where(self) -> str:
        """File, line and function at which the training thread is."""
        # Not by way of ``traceback``, which reads the source: the disk may be what hangs.
        frame = sys._current_frames().get(self._training_thread)
        if frame is None:
            return "its thread has ended"
        return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"

    def _own_stacks(self) -> str:
        now = self._progress.now
        what = f"rank {self._rank} at {now.what}, for {time.monotonic() - now.since:.3g} s"
        return own_stacks(what, self._training_thread)

    def _finish(self, report: FailureReport) -> None:
        with self._lock:
            if self.report is None:
                self.report = report
                self._prints_report = self.failure is None
        self._finished.set()

    def _end_process(self, report: FailureReport) -> None:
        """Print the report, unless the training thread does, and make sure the process ends."""
        if self._prints_report:
            print_error(AlreadyReported(report), self._rank)
        if self._training_returned.wait(_SECONDS_TO_RETURN):
            time.sleep(_SECONDS_TO_EXIT)
        hard_exit(report.exit_code)


def _is_lost_contact(error: Exception) -> bool:
    """Whether a backend's error means that another rank is missing; gloo has no type for it."""
    if isinstance(error, BackendError) and isinstance(error.__cause__, Exception):
        return _is_lost_contact(error.__cause__)  # of ranks that could not be compared
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )
