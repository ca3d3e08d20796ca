"""The monitor as its callers meet it: over sockets, each of them a rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from worm_dist.distributed.connection import JsonConnection, Message
from worm_dist.distributed.monitor import MonitorServer

GRACE_SECONDS = 1.0
TOKEN = "secret"


class _Ranks:
    """Two ranks and their monitor."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.address = server.getsockname()
        self.monitor = MonitorServer(server, TOKEN, 2, GRACE_SECONDS)
        self.monitor.start()
        self.connections = [self.connection(rank=rank, token=TOKEN) for rank in range(2)]

    def connection(self, **message: Any) -> JsonConnection:
        connection = JsonConnection(socket.create_connection(self.address))
        connection.send(**message)
        return connection

    def answer(self, rank: int, number: int) -> None:
        """The monitor asks a rank for its progress point, and gets it."""
        assert self.receive(rank) == {"report_progress": True}
        self.connections[rank].send(number=number, what=f"point {number}", where="code")

    def receive(self, rank: int, seconds: float = 5) -> Message:
        (message,) = self.connections[rank].receive_within(seconds)
        return message

    def receive_report(self, rank: int) -> Message:
        report: Message = self.receive(rank)["failure_report"]
        return report


@pytest.fixture
def ranks() -> Iterator[_Ranks]:
    ranks = _Ranks()
    yield ranks
    for connection in ranks.connections:
        connection.close()
    ranks.monitor.join(5)
    assert not ranks.monitor.is_alive()


def test_it_ends_when_all_have_done(ranks: _Ranks) -> None:
    ranks.connections[0].send(done=True)
    assert ranks.connections[0].receive_within(0.2) == []
    ranks.connections[1].send(done=True)
    assert [ranks.receive(rank) for rank in range(2)] == [{"all_done": True}] * 2


def test_a_rank_that_dies_is_noticed_at_once(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.connections[1].close()
    ranks.answer(0, 7)
    report = ranks.receive_report(0)
    assert report["text"].startswith("point 7: rank 1 is gone")
    assert report["exit_code"] == 6
    assert time.monotonic() - began < GRACE_SECONDS


def test_a_rank_that_does_not_answer_is_told_after_a_grace(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.connections[0].send(overdue=30.0)
    ranks.answer(0, 7)
    assert "rank 1 is alive but unresponsive" in ranks.receive_report(0)["text"]
    assert GRACE_SECONDS <= time.monotonic() - began < GRACE_SECONDS + 2


@pytest.mark.parametrize("caller", [0, 1])
def test_a_rank_that_is_behind_is_told_whoever_asks(ranks: _Ranks, caller: int) -> None:
    ranks.connections[caller].send(overdue=30.0)
    ranks.answer(0, 7)
    ranks.answer(1, 6)
    ends = [ranks.receive_report(rank) for rank in range(2)]
    assert ends[0] == ends[1]
    assert "rank 1 is stuck at point 6 (code), for 30 s" in ends[0]["text"]


def test_ranks_at_the_same_place_are_asked_to_be_patient(ranks: _Ranks) -> None:
    for _ in range(2):
        ranks.connections[0].send(overdue=30.0)
        for rank in range(2):
            ranks.answer(rank, 7)
        assert [ranks.receive(rank) for rank in range(2)] == [{"keep_waiting": True}] * 2


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
    assert "rank 1 is gone" in ranks.receive_report(0)["text"]


def test_contact_that_was_lost_without_a_cause_is_told_too(ranks: _Ranks) -> None:
    ranks.connections[0].send(lost_contact="RuntimeError: closed by peer")
    ranks.answer(0, 7)
    ranks.answer(1, 7)
    assert "rank 0 is cut off from another: RuntimeError" in ranks.receive_report(0)["text"]


def test_a_rank_that_comes_late_is_asked_too(ranks: _Ranks) -> None:
    """It was told to be silent, although nobody had asked it."""
    server = socket.create_server(("127.0.0.1", 0))
    monitor = MonitorServer(server, TOKEN, 2, GRACE_SECONDS)
    monitor.start()
    ranks.address = server.getsockname()
    ranks.connections += [ranks.connection(rank=0, token=TOKEN)]
    ranks.connections[2].send(overdue=30.0)
    ranks.answer(2, 7)
    ranks.connections += [ranks.connection(rank=1, token=TOKEN)]
    ranks.answer(3, 7)
    assert ranks.receive(3) == {"keep_waiting": True}
    for connection in ranks.connections[2:]:
        connection.close()
    monitor.join(5)


def test_strangers_are_not_listened_to(ranks: _Ranks) -> None:
    stranger = ranks.connection(rank=1, token="guessed")
    with pytest.raises(EOFError):
        stranger.receive_within(5)
    browser = socket.create_connection(ranks.address)
    browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert browser.recv(1) == b""
    unnamed = ranks.connection(failed="everything", exit_code=1, what="")
    for connection in ranks.connections:
        connection.send(done=True)
    assert [ranks.receive(rank) for rank in range(2)] == [{"all_done": True}] * 2
    for peer in (stranger, browser, unnamed):
        peer.close()
