"""Roll: rank zero knows who is there, and says when nobody is to go on.

Every rank holds a line to it, rank zero included.  What comes over it:

- ``rank``, ``token``: who this is, first of all.
- ``failed``, ``exit_code``, ``what``: the rank has raised an error of its own, and where.
- ``lost``: it has lost contact with another rank, says its backend.
- ``overdue``: it has been at one station for as long as it is willing to wait, in seconds.
- ``at``, ``what``, ``where``: its answer to a call of the roll.
- ``halt``: it has been asked to stop; ``passed`` is the answer to a question of the same name.
- ``done``: it has come to the end of the run.

What goes back: ``where`` calls the roll, ``patience`` says that nothing is wrong, ``ending`` that
all stop, ``end`` that all have done; ``passed`` and ``halt_at`` are about a halt, see there.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

from .connection import JsonConnection, Words
from .diagnosis import Failure, RankStatus, diagnose

__all__ = ["MonitorServer"]

SECONDS_TO_SETTLE = 0.3
"""Errors that several ranks raise at the same step come in within this time."""
_SECONDS_TO_HANG_UP = 1.0


class MonitorServer(threading.Thread):
    """Answers all ranks until they have come to the end or to an ending.

    Args:
        server: where the ranks call; closed at the end.
        token: what they identify themselves with.
        world_size: how many there are.
        grace_seconds: how long a rank may take to answer.
    """

    def __init__(
        self, server: socket.socket, token: str, world_size: int, grace_seconds: float
    ) -> None:
        super().__init__(name="worm_dist roll", daemon=True)
        self._server = server
        self._token = token
        self._grace_seconds = grace_seconds
        self._standings = {rank: RankStatus() for rank in range(world_size)}
        self._lines: dict[int, JsonConnection] = {}
        self._done: set[int] = set()
        self._halts = False
        self._passed: dict[int, int] = {}
        self._called_at: float | None = None
        self._waited_seconds = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def run(self) -> None:
        over: Words | None = None
        while over is None:
            for line, words in self._heard(self._seconds_to_decision):
                self._take(line, words)
            over = self._outcome()
        self._tell_all(**over)
        # The words must have arrived before this process ends, and the lines with it.
        deadline = time.monotonic() + _SECONDS_TO_HANG_UP
        while self._lines and time.monotonic() < deadline:
            for _ in self._heard(deadline - time.monotonic()):
                pass
        self._server.close()

    # ---- listening -------------------------------------------------------------------------------

    def _heard(self, seconds: float | None) -> Iterator[tuple[JsonConnection, Words]]:
        """What comes in that time; a line that ends is noted."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                with contextlib.suppress(OSError):
                    connection, _ = self._server.accept()
                    self._selector.register(JsonConnection(connection), selectors.EVENT_READ)
                continue
            line = key.fileobj
            assert isinstance(line, JsonConnection)
            try:
                yield from ((line, words) for words in line.heard())
            except EOFError:
                self._hang_up(line)

    def _hang_up(self, line: JsonConnection) -> None:
        if line not in self._selector.get_map():
            return
        self._selector.unregister(line)
        line.close()
        for rank in [rank for rank, theirs in self._lines.items() if theirs is line]:
            del self._lines[rank]
            self._standings[rank].gone = True
            self._call()

    def _take(self, line: JsonConnection, words: Words) -> None:
        if "token" in words:
            if words["token"] != self._token:
                self._hang_up(line)
                return
            self._lines[words["rank"]] = line
            if self._called_at is not None:  # it has come in the middle of a call
                line.say(where=True)
            if self._halts:
                line.say(passed=True)
            return
        rank = next((rank for rank, theirs in self._lines.items() if theirs is line), None)
        if rank is None:
            return  # whoever that is has not said who it is
        known = self._standings[rank]
        if "at" in words:
            known.number, known.what, known.where = words["at"], words["what"], words["where"]
        if "failed" in words:
            known.failure, known.what = Failure(words["failed"], words["exit_code"]), words["what"]
            self._call()
        elif "lost" in words:
            known.lost = words["lost"]
            self._call()
        elif "overdue" in words:
            self._call(words["overdue"])
        elif "halt" in words:
            self._halt()
        elif "passed" in words:
            self._passed[rank] = words["passed"]
            if len(self._passed) == len(self._standings):
                self._tell_all(halt_at=max(self._passed.values()) + 1)
        elif "done" in words:
            self._done.add(rank)

    def _halt(self) -> None:
        """Let all ranks wait, unless they do."""
        if not self._halts:
            self._halts = True
            self._tell_all(passed=True)

    # ---- deciding --------------------------------------------------------------------------------

    def _call(self, waited_seconds: float = 0) -> None:
        """Ask every rank where it is, unless they are being asked."""
        self._waited_seconds = max(self._waited_seconds, waited_seconds)
        if self._called_at is None:
            self._called_at = time.monotonic()
            for known in self._standings.values():
                known.number = None
            self._tell_all(where=True)

    @property
    def _seconds_to_decision(self) -> float | None:
        if self._called_at is None:
            return None
        return max(0.0, self._called_at + SECONDS_TO_SETTLE - time.monotonic()) or 0.05

    def _outcome(self) -> Words | None:
        """What ends the roll, if something does."""
        if len(self._done) == len(self._standings):
            return {"end": True}
        if self._called_at is None:
            return None
        seconds = time.monotonic() - self._called_at
        standings = self._standings.values()
        if seconds < SECONDS_TO_SETTLE:
            return None
        clear = any(known.failure or known.gone for known in standings)
        if not clear and seconds < self._grace_seconds:
            # Contact is lost a moment before the kernel ends the line of a killed rank.
            waits = any(known.lost for known in standings)
            if waits or any(known.number is None for known in standings):
                return None
        ending = diagnose(self._standings, self._waited_seconds)
        if ending is not None:
            return {"ending": asdict(ending)}
        self._called_at, self._waited_seconds = None, 0.0
        self._tell_all(patience=True)
        return None

    def _tell_all(self, **words: object) -> None:
        for line in list(self._lines.values()):
            line.say(**words)
