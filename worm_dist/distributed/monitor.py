"""The monitor on rank zero: watches all ranks and ends the run on all of them if one fails.

Every rank, rank zero included, has a connection to it.  Messages from a rank:

- ``rank``, ``token``: identification, the first message.
- ``failed``, ``exit_code``, ``what``: the rank has raised an error of its own, and at which
  progress point.
- ``lost_contact``: its backend reports that it lost contact with another rank.
- ``overdue``: seconds that it has been at one progress point, once that exceeds its timeout.
- ``number``, ``what``, ``where``: its progress point, in answer to ``report_progress``.
- ``stop_requested``: it has been asked to stop; ``num_passed`` is its answer to ``hold``.
- ``done``: it has completed the run.

Messages to the ranks: ``report_progress`` asks for the progress point, ``keep_waiting`` says that
nothing is wrong, ``failure_report`` that all ranks end, ``all_done`` that all have completed the
run; ``hold`` and ``stop_at`` belong to a graceful stop, see ``graceful_stop``.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

from .connection import JsonConnection, Message
from .diagnosis import Failure, RankStatus, diagnose

__all__ = ["MonitorServer"]

SECONDS_TO_COLLECT = 0.3
"""Time within which the errors that several ranks raise at the same step arrive."""
_SECONDS_TO_DISCONNECT = 1.0


class MonitorServer(threading.Thread):
    """A thread that serves all ranks until they have completed the run, or one has failed.

    Args:
        server: listening socket to which the ranks connect; closed at the end.
        token: secret by which the ranks identify themselves.
        world_size: number of ranks.
        grace_seconds: time that a rank may take to answer.
    """

    def __init__(
        self, server: socket.socket, token: str, world_size: int, grace_seconds: float
    ) -> None:
        super().__init__(name="worm_dist monitor", daemon=True)
        self._server = server
        self._token = token
        self._grace_seconds = grace_seconds
        self._statuses = {rank: RankStatus() for rank in range(world_size)}
        self._connections: dict[int, JsonConnection] = {}
        self._done: set[int] = set()
        self._stop_requested = False
        self._num_passed: dict[int, int] = {}
        self._asked_at: float | None = None
        self._waited_seconds = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def run(self) -> None:
        last_message: Message | None = None
        while last_message is None:
            for connection, message in self._receive(self._seconds_to_decision):
                self._handle(connection, message)
            last_message = self._decide()
        self._send_to_all(**last_message)
        # The ranks must have received it before this process ends and closes the connections.
        deadline = time.monotonic() + _SECONDS_TO_DISCONNECT
        while self._connections and time.monotonic() < deadline:
            for _ in self._receive(deadline - time.monotonic()):
                pass
        self._server.close()

    # ---- receiving -------------------------------------------------------------------------------

    def _receive(self, seconds: float | None) -> Iterator[tuple[JsonConnection, Message]]:
        """Yield the messages that arrive within that time; accept and close connections."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                with contextlib.suppress(OSError):
                    accepted, _ = self._server.accept()
                    self._selector.register(JsonConnection(accepted), selectors.EVENT_READ)
                continue
            connection = key.fileobj
            assert isinstance(connection, JsonConnection)
            try:
                yield from ((connection, message) for message in connection.receive())
            except EOFError:
                self._disconnect(connection)

    def _disconnect(self, connection: JsonConnection) -> None:
        if connection not in self._selector.get_map():
            return
        self._selector.unregister(connection)
        connection.close()
        for rank in [rank for rank, other in self._connections.items() if other is connection]:
            del self._connections[rank]
            self._statuses[rank].gone = True
            self._ask_for_progress()

    def _handle(self, connection: JsonConnection, message: Message) -> None:
        if "token" in message:
            if message["token"] != self._token:
                self._disconnect(connection)
                return
            self._connections[message["rank"]] = connection
            # The rank has connected after these were sent to the others.
            if self._asked_at is not None:
                connection.send(report_progress=True)
            if self._stop_requested:
                connection.send(hold=True)
            return
        rank = self._rank_of(connection)
        if rank is None:
            return  # the sender has not identified itself
        status = self._statuses[rank]
        if "number" in message:
            status.number, status.what = message["number"], message["what"]
            status.where = message["where"]
        if "failed" in message:
            status.failure = Failure(message["failed"], message["exit_code"])
            status.what = message["what"]
            self._ask_for_progress()
        elif "lost_contact" in message:
            status.lost_contact = message["lost_contact"]
            self._ask_for_progress()
        elif "overdue" in message:
            self._ask_for_progress(message["overdue"])
        elif "stop_requested" in message:
            self._request_stop()
        elif "num_passed" in message:
            self._num_passed[rank] = message["num_passed"]
            if len(self._num_passed) == len(self._statuses):
                self._send_to_all(stop_at=max(self._num_passed.values()) + 1)
        elif "done" in message:
            self._done.add(rank)

    def _rank_of(self, connection: JsonConnection) -> int | None:
        ranks = (rank for rank, other in self._connections.items() if other is connection)
        return next(ranks, None)

    def _request_stop(self) -> None:
        """Hold all ranks at their next step boundary; without effect after the first call."""
        if not self._stop_requested:
            self._stop_requested = True
            self._send_to_all(hold=True)

    # ---- deciding --------------------------------------------------------------------------------

    def _ask_for_progress(self, waited_seconds: float = 0) -> None:
        """Ask every rank for its progress point, unless the ranks are being asked already."""
        self._waited_seconds = max(self._waited_seconds, waited_seconds)
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
        report = diagnose(self._statuses, self._waited_seconds)
        if report is not None:
            return {"failure_report": asdict(report)}
        self._asked_at, self._waited_seconds = None, 0.0
        self._send_to_all(keep_waiting=True)
        return None

    def _send_to_all(self, **message: object) -> None:
        for connection in list(self._connections.values()):
            connection.send(**message)
