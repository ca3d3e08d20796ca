"""The monitor as its callers meet it: over sockets, each of them a rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worm_dist.distributed.authentication import authenticate_to_monitor
from worm_dist.distributed.connection import JsonConnection, Message
from worm_dist.distributed.monitor import MonitorServer
from worm_dist.distributed.stacks import STACKS

GRACE_SECONDS = 1.0
SECRET = b"secret"


class _Ranks:
    """Two ranks and their monitor.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.stacks = folder / STACKS
        server = socket.create_server(("127.0.0.1", 0))
        self.address = server.getsockname()
        self.monitor = MonitorServer(server, SECRET, 2, GRACE_SECONDS, self.stacks)
        self.monitor.start()
        self.connections = [self.connection(rank) for rank in range(2)]

    def connection(self, rank: int) -> JsonConnection:
        connection = JsonConnection(socket.create_connection(self.address))
        authenticate_to_monitor(connection, SECRET, rank, seconds=5)
        return connection

    def answer(self, rank: int, number: int, has_waited: bool = False) -> None:
        """The monitor asks a rank for its progress point, and gets it."""
        assert self.receive(rank) == {"report_progress": True}
        self.connections[rank].send(
            number=number, what=f"point {number}", where="code", has_waited=has_waited
        )

    def overdue(self, rank: int, again: bool = False) -> None:
        """A rank has waited for too long."""
        self.connections[rank].send(overdue=30.0, again=again)

    def give_stacks(self, *ranks: int) -> None:
        """The monitor asks ranks where they are in their code, and gets it."""
        for rank in ranks:
            assert self.receive(rank) == {"report_stacks": True}
            self.connections[rank].send(stacks=f"stacks of {rank}\n")
            self.connections[rank].send(flight_record="a record\n" if rank else "")

    def receive(self, rank: int, seconds: float = 5) -> Message:
        message = self.connections[rank].receive_within(seconds)
        assert message is not None
        return message

    def receive_report(self, rank: int) -> Message:
        report: Message = self.receive(rank)["failure_report"]
        return report


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[_Ranks]:
    ranks = _Ranks(tmp_path)
    yield ranks
    for connection in ranks.connections:
        connection.close()
    ranks.monitor.join(5)
    assert not ranks.monitor.is_alive()


def test_it_ends_when_all_have_done(ranks: _Ranks) -> None:
    ranks.connections[0].send(done=True)
    assert ranks.connections[0].receive_within(0.2) is None
    ranks.connections[1].send(done=True)
    assert [ranks.receive(rank) for rank in range(2)] == [{"all_done": True}] * 2


def test_a_rank_that_dies_is_noticed_at_once(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.connections[1].close()
    ranks.answer(0, 7)
    ranks.give_stacks(0)
    report = ranks.receive_report(0)
    assert report["text"].startswith("point 7: rank 1 is gone")
    assert report["text"].endswith(f"; the stacks of 1 of 2 ranks are in {ranks.stacks}")
    assert [path.name for path in ranks.stacks.iterdir()] == ["rank-0.txt"]
    assert report["exit_code"] == 6
    assert time.monotonic() - began < GRACE_SECONDS


def test_a_rank_that_does_not_answer_is_told_after_a_grace(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.overdue(0)
    ranks.answer(0, 7)
    ranks.give_stacks(0)
    assert "rank 1 is alive but unresponsive" in ranks.receive_report(0)["text"]
    assert GRACE_SECONDS <= time.monotonic() - began < GRACE_SECONDS + 2


@pytest.mark.parametrize("caller", [0, 1])
def test_a_rank_that_is_behind_is_told_whoever_asks(ranks: _Ranks, caller: int) -> None:
    ranks.overdue(caller)
    ranks.answer(0, 7)
    ranks.answer(1, 6)
    ranks.give_stacks(0, 1)
    ends = [ranks.receive_report(rank) for rank in range(2)]
    assert ends[0] == ends[1]
    assert "rank 1 is stuck at point 6 (code), for 30 s" in ends[0]["text"]
    assert ends[0]["text"].endswith(f"; the stacks of all ranks are in {ranks.stacks}")
    texts = [(ranks.stacks / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert texts == ["stacks of 0\n", "stacks of 1\na record\n"]


def test_ranks_at_the_same_place_are_asked_to_be_patient(ranks: _Ranks) -> None:
    """However often, if a rank was seen at work, or asks a second time before it has the answer."""
    for again, moved in ((False, 1), (True, 0), (False, None), (True, 1)):
        ranks.overdue(0, again)
        for rank in range(2):
            ranks.answer(rank, 7, has_waited=rank != moved)
        assert [ranks.receive(rank) for rank in range(2)] == [{"keep_waiting": True}] * 2


def test_ranks_that_all_wait_are_ended(ranks: _Ranks) -> None:
    """A connection between two of them had failed, or a GPU: nobody was behind, so nobody was
    named, and all waited for what the backend would do."""
    for again in (False, True):
        ranks.overdue(1, again)
        for rank in range(2):
            ranks.answer(rank, 7, has_waited=again)
        if not again:
            assert [ranks.receive(rank) for rank in range(2)] == [{"keep_waiting": True}] * 2
    ranks.give_stacks(0, 1)
    ends = [ranks.receive_report(rank) for rank in range(2)]
    assert ends[0] == ends[1] and ends[0]["exit_code"] == 6
    assert ends[0]["text"].startswith("all ranks wait at point 7 (code), for 30 s: a connection ")


def test_stacks_that_do_not_come_are_not_waited_for(
    ranks: _Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worm_dist.distributed.monitor.SECONDS_FOR_STACKS", 2.5)
    ranks.stacks.mkdir()
    (ranks.stacks / "rank-7.txt").write_text("of an earlier failure")
    ranks.overdue(0)
    ranks.answer(0, 7)
    ranks.answer(1, 6)
    ranks.give_stacks(1)
    assert ranks.receive(0) == {"report_stacks": True}
    assert ranks.receive_report(0)["text"].endswith(
        f"; the stacks of 1 of 2 ranks are in {ranks.stacks}"
    )
    assert [path.name for path in ranks.stacks.iterdir()] == ["rank-1.txt"]


def test_before_the_start_no_stacks_are_written(ranks: _Ranks) -> None:
    """The folder may yet be that of another run."""
    ranks.overdue(0)
    ranks.answer(0, 0)
    assert "rank 1 is alive but unresponsive" in ranks.receive_report(0)["text"]
    assert not ranks.stacks.exists()


def test_an_error_reaches_a_rank_that_waits(ranks: _Ranks) -> None:
    ranks.connections[1].send(failed="ValueError: a bug", exit_code=1, what="point 6")
    ranks.answer(0, 7)
    report = ranks.receive_report(0)
    assert report == {
        "text": "rank 1 failed at point 6: ValueError: a bug",
        "exit_code": 1,
        "reporting_ranks": [1],
    }


def test_an_error_reaches_a_rank_that_has_done(ranks: _Ranks) -> None:
    """Rank zero may yet fail to write the results."""
    ranks.connections[1].send(done=True)
    ranks.connections[0].send(failed="no room", exit_code=3, what="writing")
    assert ranks.receive(1) == {"report_progress": True}
    assert ranks.receive_report(1)["exit_code"] == 3


def test_errors_at_the_same_step_are_one_ending(ranks: _Ranks) -> None:
    for rank in (1, 0):
        ranks.connections[rank].send(failed="not finite", exit_code=5, what="point 7")
    assert ranks.receive(0) == {"report_progress": True}
    assert ranks.receive_report(0)["reporting_ranks"] == [0]


def test_contact_that_was_lost_waits_for_the_cause(ranks: _Ranks) -> None:
    """gloo notices a closed connection a moment before the monitor does."""
    ranks.connections[0].send(lost_contact="RuntimeError: closed by peer")
    ranks.answer(0, 7)
    ranks.connections[1].close()
    ranks.give_stacks(0)
    assert "rank 1 is gone" in ranks.receive_report(0)["text"]


def test_contact_that_was_lost_without_a_cause_is_told_too(ranks: _Ranks) -> None:
    ranks.connections[0].send(lost_contact="RuntimeError: closed by peer")
    ranks.answer(0, 7)
    ranks.answer(1, 7)
    ranks.give_stacks(0, 1)
    assert "rank 0 is cut off from another: RuntimeError" in ranks.receive_report(0)["text"]


def test_a_rank_that_comes_late_is_asked_too(ranks: _Ranks) -> None:
    """It was told to be silent, although nobody had asked it."""
    server = socket.create_server(("127.0.0.1", 0))
    monitor = MonitorServer(server, SECRET, 2, GRACE_SECONDS, ranks.stacks)
    monitor.start()
    ranks.address = server.getsockname()
    ranks.connections += [ranks.connection(0)]
    ranks.overdue(2)
    ranks.answer(2, 7)
    ranks.connections += [ranks.connection(1)]
    ranks.answer(3, 7)
    assert ranks.receive(3) == {"keep_waiting": True}
    for connection in ranks.connections[2:]:
        connection.close()
    monitor.join(5)


def test_a_stranger_that_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the monitor waits for nothing else."""
    monkeypatch.setattr("worm_dist.distributed.admission._SECONDS_TO_IDENTIFY", 0.1)
    server = socket.create_server(("127.0.0.1", 0))
    monitor = MonitorServer(server, SECRET, 1, GRACE_SECONDS, Path())
    monitor.start()
    with socket.create_connection(server.getsockname(), timeout=5) as stranger:
        assert b"monitor_nonce" in stranger.recv(1000)
        assert stranger.recv(1) == b""
    rank = JsonConnection(socket.create_connection(server.getsockname()))
    authenticate_to_monitor(rank, SECRET, 0, seconds=5)
    rank.send(done=True)
    assert rank.receive_within(5) == {"all_done": True}
    rank.close()
    monitor.join(5)


@pytest.mark.fault(3, "the monitor itself fails")
def test_a_monitor_that_fails_ends_the_run(
    ranks: _Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its thread ended, and the ranks relied on it until something else went wrong too."""
    ranks.connections[1].send(failed="without the exit code")
    for rank in range(2):
        report = ranks.receive_report(rank)
        assert report["text"] == "the monitor on rank 0 has failed: KeyError: 'exit_code'"
        assert report["exit_code"] == 1
        with pytest.raises(EOFError):
            ranks.receive(rank)
    assert capsys.readouterr().err.count("Traceback") == 1
