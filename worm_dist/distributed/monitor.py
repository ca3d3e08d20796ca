"""The monitor on rank zero: watches all ranks and ends the run on all of them if one fails.

Every rank, rank zero included, has a connection to it, on which nothing is sent while all is well.
Messages from a rank, once it has proved itself (see ``authentication``):

- ``failed``, ``exit_code``, ``what``: the rank has raised an error of its own, and at which
  progress point.
- ``lost_contact``: its backend reports that it lost contact with another rank.
- ``overdue``: seconds that it has been at one progress point, once that exceeds its timeout;
  ``again``: whether it has been told to keep waiting there before.
- ``number``, ``what``, ``where``: its progress point, in answer to ``report_progress``;
  ``has_waited``: whether it has been there since it was told to keep waiting.
- ``stacks`` and then ``flight_record``: texts for the run's folder, in answer to ``report_stacks``.
- ``stop_requested``: it has been asked to stop; ``num_passed`` is its answer to ``hold``.
- ``done``: it has completed the run.

Messages to the ranks: ``report_progress`` asks for the progress point, ``keep_waiting`` says that
nothing is wrong, ``report_stacks`` asks where all threads are, ``failure_report`` says that all
ranks end, ``all_done`` that all have completed the run; ``hold`` and ``stop_at`` belong to a
graceful stop, see ``graceful_stop``.

Ranks that are all at the same point may be slow together, so they are told to keep waiting once.
If none of them has moved when a rank is overdue again, none of them is at work.

The monitor does not use the store in which the ranks have met:

- A store does not report that a client is gone, so every rank would have to write heartbeats, and
  rank zero to poll them.  Measured with four processes on one busy host, of which one was killed,
  twelve times: by heartbeats and polls once a second, and death assumed after two seconds without
  one, rank zero knew after 1.1 to 2.3 s; by the closed connection after 13 ms (median; 22 at most).
- Operations of a store block one another: a write took 2.8 s while another thread waited for a key
  through the same client.  So each thread would need a client of its own.
- torchrun's store belongs to its agent, which may be on another host than rank zero.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import WormError
from .admission import Admission
from .connection import JsonConnection, Message
from .diagnosis import Failure, FailureReport, RankStatus, diagnose
from .error_report import one_line, print_error
from .stacks import write_stacks

__all__ = ["SECONDS_FOR_STACKS", "SECONDS_TO_COLLECT", "MonitorServer"]

SECONDS_TO_COLLECT = 0.3
"""Time within which the errors that several ranks raise at the same step arrive."""
SECONDS_FOR_STACKS = 5.0
"""Time within which the stacks are in the run's folder, or else are not."""
_SECONDS_TO_WRITE = 2.0
_SECONDS_TO_DISCONNECT = 1.0


class MonitorServer(threading.Thread):
    """A thread that serves all ranks until they have completed the run, or one has failed.

    Args:
        server: listening socket to which the ranks connect; closed once all of them have.
        secret: the secret by which the ranks prove themselves.
        world_size: number of ranks.
        grace_seconds: time that a rank may take to answer.
        stacks: folder for the stacks of the ranks, in the run's folder.
    """

    def __init__(
        self,
        server: socket.socket,
        secret: bytes,
        world_size: int,
        grace_seconds: float,
        stacks: Path,
    ) -> None:
        super().__init__(name="worm_dist monitor", daemon=True)
        self._grace_seconds = grace_seconds
        self._statuses = {rank: RankStatus() for rank in range(world_size)}
        self._connections: dict[int, JsonConnection] = {}
        self._done: set[int] = set()
        self._stop_requested = False
        self._num_passed: dict[int, int] = {}
        self._asked_at: float | None = None
        self._waited_seconds, self._again = 0.0, False
        self._stacks_folder = stacks
        self._stacks: dict[int, str] = {}
        self._records: dict[int, str] = {}
        self._selector = selectors.DefaultSelector()
        self._admission = Admission(server, secret, world_size, self._selector)

    def run(self) -> None:
        try:
            last_message = self._watch()
        except Exception as error:  # the ranks must not rely on a monitor that has ended
            print_error(error, rank=0)
            text = f"the monitor on rank 0 has failed: {one_line(error)}"
            last_message = _failure_message(FailureReport(text, WormError.exit_code))
        try:
            self._send_to_all(**last_message)
            # They must have received it before this process ends and closes the connections.
            deadline = time.monotonic() + _SECONDS_TO_DISCONNECT
            while self._connections and (seconds := deadline - time.monotonic()) > 0:
                for _ in self._receive(seconds):
                    pass
        finally:
            self._admission.close()
            for connection in self._connections.values():
                connection.close()
            self._selector.close()

    def _watch(self) -> Message:
        """Serve the ranks until the run ends; returns the message with which it does."""
        last_message: Message | None = None
        while last_message is None:
            for rank, message in self._receive(self._seconds_to_decision):
                self._handle(rank, message)
            last_message = self._decide()
        return last_message

    # ---- receiving -------------------------------------------------------------------------------

    def _receive(self, seconds: float | None) -> Iterator[tuple[int, Message]]:
        """Wait until something arrives, at most that long, and yield the messages of ranks.

        New connections and closed ones are handled here; they too end the wait."""
        limits = [seconds, self._admission.seconds_to_deadline]
        ready = self._selector.select(min((s for s in limits if s is not None), default=None))
        for key, _ in ready:
            if key.data is None:
                admitted = self._admission.serve(key.fileobj)
                if admitted is not None:
                    self._admit(*admitted)
                continue
            rank: int = key.data
            try:
                message = self._connections[rank].receive()
            except EOFError:
                self._disconnect(rank)
                continue
            if message is not None:
                yield rank, message
        self._admission.meet_deadlines()

    def _admit(self, rank: int, connection: JsonConnection) -> None:
        self._selector.modify(connection, selectors.EVENT_READ, data=rank)
        self._connections[rank] = connection
        # The other ranks have been sent these already.
        if self._asked_at is not None:
            connection.send(report_progress=True)
        if self._stop_requested:
            connection.send(hold=True)

    def _disconnect(self, rank: int) -> None:
        connection = self._connections.pop(rank)
        self._selector.unregister(connection)
        connection.close()
        self._statuses[rank].gone = True
        self._ask_for_progress()

    def _handle(self, rank: int, message: Message) -> None:
        status = self._statuses[rank]
        if "number" in message:
            status.number, status.what = message["number"], message["what"]
            status.where, status.has_waited = message["where"], message["has_waited"]
        if "failed" in message:
            status.failure = Failure(message["failed"], message["exit_code"])
            status.what = message["what"]
            self._ask_for_progress()
        elif "lost_contact" in message:
            status.lost_contact = message["lost_contact"]
            self._ask_for_progress()
        elif "overdue" in message:
            self._ask_for_progress(message["overdue"], message["again"])
        elif "stop_requested" in message:
            self._request_stop()
        elif "num_passed" in message:
            self._num_passed[rank] = message["num_passed"]
            if len(self._num_passed) == len(self._statuses):
                self._send_to_all(stop_at=max(self._num_passed.values()) + 1)
        elif "stacks" in message:
            self._stacks[rank] = message["stacks"]
        elif "flight_record" in message:
            self._records[rank] = message["flight_record"]
        elif "done" in message:
            self._done.add(rank)

    def _request_stop(self) -> None:
        """Hold all ranks at their next step boundary; without effect after the first call."""
        if not self._stop_requested:
            self._stop_requested = True
            self._send_to_all(hold=True)

    # ---- deciding --------------------------------------------------------------------------------

    def _ask_for_progress(self, waited_seconds: float = 0, again: bool = False) -> None:
        """Ask every rank for its progress point, unless the ranks are being asked already."""
        self._waited_seconds = max(self._waited_seconds, waited_seconds)
        self._again = self._again or again
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for status in self._statuses.values():
                status.number = None
            self._send_to_all(report_progress=True)

    @property
    def _seconds_to_decision(self) -> float | None:
        if self._asked_at is None:
            return None
        return max(0.0, self._asked_at + SECONDS_TO_COLLECT - time.monotonic()) or 0.05

    def _decide(self) -> Message | None:
        """The message that ends the monitor; None while the run goes on."""
        if len(self._done) == len(self._statuses):
            return {"all_done": True}
        if self._asked_at is None:
            return None
        seconds = time.monotonic() - self._asked_at
        statuses = self._statuses.values()
        if seconds < SECONDS_TO_COLLECT:
            return None
        cause_is_known = any(status.failure or status.gone for status in statuses)
        if not cause_is_known and seconds < self._grace_seconds:
            # Ranks lose contact a moment before the kernel closes a killed rank's connection.
            has_lost_contact = any(status.lost_contact for status in statuses)
            if has_lost_contact or any(status.number is None for status in statuses):
                return None
        report = diagnose(self._statuses, self._waited_seconds, self._again)
        if report is not None:
            return _failure_message(self._with_stacks(report))
        self._asked_at, self._waited_seconds, self._again = None, 0.0, False
        self._send_to_all(keep_waiting=True)
        return None

    def _with_stacks(self, report: FailureReport) -> FailureReport:
        """Write the stacks of the ranks to the run's folder, if that helps; the report says so."""
        began = any(status.number for status in self._statuses.values())
        # An error of a rank's own has its traceback.  Before the start the folder may be that of
        # another run, which is not put aside yet.
        if report.reporting_ranks or not began:
            return report
        self._send_to_all(report_stacks=True)
        deadline = time.monotonic() + SECONDS_FOR_STACKS - _SECONDS_TO_WRITE
        answering = {rank for rank, status in self._statuses.items() if status.number is not None}
        while answering & self._connections.keys() - self._records.keys():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                break
            for rank, message in self._receive(seconds):
                self._handle(rank, message)
        texts = {rank: text + self._records.get(rank, "") for rank, text in self._stacks.items()}
        if not write_stacks(self._stacks_folder, texts, _SECONDS_TO_WRITE, removes_others=True):
            return report
        num, all_ = len(texts), len(self._statuses)
        whose = "all ranks" if num == all_ else f"{num} of {all_} ranks"
        where = f"the stacks of {whose} are in {self._stacks_folder}"
        return replace(report, text=f"{report.text}; {where}")

    def _send_to_all(self, **message: object) -> None:
        for connection in self._connections.values():
            connection.send(**message)


def _failure_message(report: FailureReport) -> Message:
    return {"failure_report": asdict(report)}
