"""Watch: no rank is left waiting for another that will not come.

A collective whose peer is missing waits for its timeout, and then does not say who was missing;
under NCCL it may never return.  So each rank has a thread that holds a line to rank zero's roll,
and does three things: it says where this rank is when it is asked; it asks by itself when the rank
has been at one station for too long; and it ends the process when it must end and does not come out
of its collective.  An error that one rank raises reaches the others the same way, and so does the
wish to stop, see ``halt``.  While all is well nothing is sent, and training is not touched.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from uuid import uuid4

import torch.distributed as dist

from ..errors import BackendError, WormError
from .connection import JsonConnection, Words
from .diagnosis import FailureReport, RankStatus, diagnose
from .error_report import AlreadyReported, hard_exit, one_line, record, tell
from .graceful_stop import StopCoordinator
from .init import RankInfo
from .monitor import SECONDS_TO_SETTLE, MonitorServer
from .progress import Progress

__all__ = ["Timeouts", "watched"]

_SECONDS_TO_LEAVE = 5.0
"""For a rank whose error has been told to close its files."""
_SECONDS_TO_COME_OUT = 1.0
"""For a rank that hears of another's error, to come out of its collective by itself."""


@dataclass(frozen=True)
class Timeouts:
    """How long a rank waits for the others, in seconds.

    Attributes:
        starting: until its first step is done.
        steady: from then on.
    """

    starting: float
    steady: float

    @property
    def grace(self) -> float:
        """How long a rank may take to say where it is."""
        return max(2.0, self.steady / 10)


@contextmanager
def watched(
    place: RankInfo, progress: Progress, patience: Timeouts, halt: StopCoordinator
) -> Iterator[None]:
    """Train inside of this, in a process group of several ranks.  Collective.

    Args:
        place: of this process.
        progress: where the training thread says how far it has come.
        patience: how long ranks wait for one another.
        halt: where the training thread looks whether it is to stop.

    Raises:
        Told: this rank or another has failed, and the error was told.  Its exit code is the same on
            every rank.  Where the training thread does not come out of a collective, the process
            ends with that code instead.
        BackendError: rank zero cannot be reached.
    """
    roll, line = _meet(place, patience)
    watch = _Watch(line, place.rank, progress, patience, halt)
    watch.start()
    try:
        yield
        watch.done()
    except Exception as error:
        watch.failed(error)
    finally:
        if roll is not None:
            roll.join(_SECONDS_TO_COME_OUT)
    if watch.ending is not None:
        raise AlreadyReported(watch.ending) from watch.failure


class _Watch(threading.Thread):
    """The watch of one rank; made by the thread that trains.

    Attributes:
        failure: what the training thread has raised.
        ending: how all ranks end; None while they train, and if they come to the end of the run.
    """

    def __init__(
        self,
        line: JsonConnection,
        rank: int,
        progress: Progress,
        patience: Timeouts,
        halt: StopCoordinator,
    ) -> None:
        super().__init__(name="worm_dist watch", daemon=True)
        self.failure: Exception | None = None
        self.ending: FailureReport | None = None
        self._line = line
        self._rank = rank
        self._progress = progress
        self._patience = patience
        self._halt = halt
        halt.speak_through(lambda: line.say(halt=True))
        self._trainer = threading.get_ident()
        self._asked_at: float | None = None
        self._patient_since = time.monotonic()
        self._tells = False
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._came_out = threading.Event()

    # ---- the thread that trains ------------------------------------------------------------------

    def failed(self, error: Exception) -> None:
        """This rank has raised an error; tell what has to be told of it."""
        lost = _is_lost_contact(error)
        with self._lock:
            self.failure = error
            told = self.ending is not None  # by the watch
        self._came_out.set()
        if not lost:
            record(error)
        if not told:
            said = {"lost": one_line(error)} if lost else self._own(error)
            self._line.say(**said)
            if not self._settled.wait(self._patience.grace + SECONDS_TO_SETTLE + 1):
                self._settle(self._without_rank_zero(gone=False))
        assert self.ending is not None
        if not lost and not self.ending.tells(one_line(error), self._rank):
            tell(error, self._rank)
        elif lost and not told:
            tell(AlreadyReported(self.ending), self._rank)

    def done(self) -> None:
        """This rank has come to the end; wait for the others, and for what may happen to them."""
        self._progress.reach("the end of the run")
        self._line.say(done=True)
        self._settled.wait()
        self._came_out.set()

    def _own(self, error: Exception) -> Words:
        return {
            "failed": one_line(error),
            "exit_code": error.exit_code if isinstance(error, WormError) else WormError.exit_code,
            "what": self._progress.now.what,
        }

    # ---- the thread that watches -----------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._settled.is_set():
                # Not for longer: the start may be over by then, and with it the long patience.
                seconds = min(self._seconds_left, self._patience.steady / 10)
                for words in self._line.heard_within(seconds):
                    self._take(words)
                if not self._settled.is_set() and self._seconds_left <= 0:
                    self._overdue()
        except EOFError:
            self._settle(self._without_rank_zero(gone=True))
        self._line.close()
        if self.ending is not None:
            self._end(self.ending)

    def _take(self, words: Words) -> None:
        if "where" in words:
            now = self._progress.now
            self._line.say(at=now.number, what=now.what, where=self._where())
        elif "passed" in words:
            self._line.say(passed=self._halt.waits())
        elif "halt_at" in words:
            self._halt.stop_at(words["halt_at"])
        elif "patience" in words:
            self._asked_at, self._patient_since = None, time.monotonic()
        elif "ending" in words:
            self._settle(FailureReport.of_words(words["ending"]))
        elif "end" in words:
            self._settled.set()

    @property
    def _seconds_left(self) -> float:
        """Until this rank has waited for too long: for the others, or for rank zero's answer."""
        if self._asked_at is not None:
            return self._asked_at + self._patience.grace + 1 - time.monotonic()
        now = self._progress.now
        limit = self._patience.starting if now.starting else self._patience.steady
        return max(now.since, self._patient_since) + limit - time.monotonic()

    def _overdue(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._line.say(overdue=self._asked_at - self._progress.now.since)
        else:
            self._settle(self._without_rank_zero(gone=False))

    def _without_rank_zero(self, gone: bool) -> FailureReport:
        """Rank zero keeps the roll, so nobody else can say what has become of it."""
        now = self._progress.now
        standings = {0: RankStatus(gone=gone), self._rank: RankStatus(now.number, now.what)}
        ending = diagnose(standings, 0 if gone else time.monotonic() - now.since)
        return ending or FailureReport("the roll has ended")

    def _where(self) -> str:
        """The line of code that the training thread is at."""
        frame = sys._current_frames().get(self._trainer)
        newest = traceback.extract_stack(frame)[-1]
        return f"{newest.filename}:{newest.lineno}, {newest.name}"

    def _settle(self, ending: FailureReport) -> None:
        with self._lock:
            if self.ending is None:
                self.ending = ending
                self._tells = self.failure is None
        self._settled.set()

    def _end(self, ending: FailureReport) -> None:
        """Tell why, unless the training thread does, and see that the process ends."""
        if self._tells:
            tell(AlreadyReported(ending), self._rank)
        if self._came_out.wait(_SECONDS_TO_COME_OUT):
            time.sleep(_SECONDS_TO_LEAVE)
        hard_exit(ending.exit_code)


# ---- meeting -------------------------------------------------------------------------------------


def _meet(place: RankInfo, patience: Timeouts) -> tuple[MonitorServer | None, JsonConnection]:
    """Rank zero opens the roll and tells the others where; all call it.  Collective."""
    roll = None
    told: list[tuple[str, int, str] | None] = [None]
    if place.rank == 0:
        token = uuid4().hex
        server = _server(place.world_size)
        told = [(_own_address(place), server.getsockname()[1], token)]
        roll = MonitorServer(server, token, place.world_size, patience.grace)
        roll.start()
    try:
        dist.broadcast_object_list(told, src=0)
    except RuntimeError as error:
        raise BackendError(
            f"launch: rank {place.rank} has lost another rank before the run began: "
            f"{one_line(error)}; see that rank's own words"
        ) from error
    assert told[0] is not None
    address, port, token = told[0]
    try:
        line = JsonConnection(socket.create_connection((address, port), timeout=patience.starting))
    except OSError as error:
        raise BackendError(
            f"launch: rank {place.rank} cannot reach rank 0 at {address}:{port}: {error}; the "
            "ranks must be able to connect to one another, at any port"
        ) from error
    line.say(rank=place.rank, token=token)
    return roll, line


def _server(world_size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world_size
        )
    return socket.create_server(("", 0), backlog=world_size)


def _own_address(place: RankInfo) -> str:
    """Rank zero's host, as the others reach it.

    Rank zero may be on another host than the store that ``MASTER_ADDR`` names.  Its own address is
    the one that it would speak to that store from; on the store's own host that may be the
    loopback, and then the store's name is what others know this host by.
    """
    try:
        kind, *_, there = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as unsent:
            unsent.connect(there)  # sends nothing
            own = str(unsent.getsockname()[0])
    except OSError:
        return place.address
    return place.address if ip_address(own.partition("%")[0]).is_loopback else own


def _is_lost_contact(error: Exception) -> bool:
    """Whether this is what a backend says when another rank is missing; gloo has no type for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )
