"""The roll as its callers meet it: over sockets, each of them a rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from worm_dist.distributed.connection import JsonConnection, Words
from worm_dist.distributed.monitor import MonitorServer

GRACE_SECONDS = 1.0
TOKEN = "secret"


class _Ranks:
    """Two ranks and their roll."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.address = server.getsockname()
        self.roll = MonitorServer(server, TOKEN, 2, GRACE_SECONDS)
        self.roll.start()
        self.lines = [self.line(rank=rank, token=TOKEN) for rank in range(2)]

    def line(self, **words: Any) -> JsonConnection:
        line = JsonConnection(socket.create_connection(self.address))
        line.say(**words)
        return line

    def answer(self, rank: int, number: int) -> None:
        """The roll is called, and a rank says where it is."""
        assert self.hear(rank) == {"where": True}
        self.lines[rank].say(at=number, what=f"station {number}", where="code")

    def hear(self, rank: int, seconds: float = 5) -> Words:
        (words,) = self.lines[rank].heard_within(seconds)
        return words

    def hear_ending(self, rank: int) -> Words:
        ending: Words = self.hear(rank)["ending"]
        return ending


@pytest.fixture
def ranks() -> Iterator[_Ranks]:
    ranks = _Ranks()
    yield ranks
    for line in ranks.lines:
        line.close()
    ranks.roll.join(5)
    assert not ranks.roll.is_alive()


def test_it_ends_when_all_have_done(ranks: _Ranks) -> None:
    ranks.lines[0].say(done=True)
    assert ranks.lines[0].heard_within(0.2) == []
    ranks.lines[1].say(done=True)
    assert [ranks.hear(rank) for rank in range(2)] == [{"end": True}] * 2


def test_a_rank_that_dies_is_noticed_at_once(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.lines[1].close()
    ranks.answer(0, 7)
    ending = ranks.hear_ending(0)
    assert ending["text"].startswith("station 7: rank 1 is gone")
    assert ending["exit_code"] == 6
    assert time.monotonic() - began < GRACE_SECONDS


def test_a_rank_that_does_not_answer_is_told_after_a_grace(ranks: _Ranks) -> None:
    began = time.monotonic()
    ranks.lines[0].say(overdue=30.0)
    ranks.answer(0, 7)
    assert "rank 1 is there but silent" in ranks.hear_ending(0)["text"]
    assert GRACE_SECONDS <= time.monotonic() - began < GRACE_SECONDS + 2


@pytest.mark.parametrize("caller", [0, 1])
def test_a_rank_that_is_behind_is_told_whoever_asks(ranks: _Ranks, caller: int) -> None:
    ranks.lines[caller].say(overdue=30.0)
    ranks.answer(0, 7)
    ranks.answer(1, 6)
    ends = [ranks.hear_ending(rank) for rank in range(2)]
    assert ends[0] == ends[1]
    assert "rank 1 is stuck at station 6 (code), for 30 s" in ends[0]["text"]


def test_ranks_at_the_same_place_are_asked_to_be_patient(ranks: _Ranks) -> None:
    for _ in range(2):
        ranks.lines[0].say(overdue=30.0)
        for rank in range(2):
            ranks.answer(rank, 7)
        assert [ranks.hear(rank) for rank in range(2)] == [{"patience": True}] * 2


def test_an_error_reaches_a_rank_that_waits(ranks: _Ranks) -> None:
    ranks.lines[1].say(failed="ValueError: a bug", exit_code=1, what="station 6")
    ranks.answer(0, 7)
    ending = ranks.hear_ending(0)
    assert ending == {
        "text": "rank 1 failed at station 6: ValueError: a bug",
        "exit_code": 1,
        "speakers": [1],
    }


def test_an_error_reaches_a_rank_that_has_done(ranks: _Ranks) -> None:
    """Rank zero may yet fail to write the results."""
    ranks.lines[1].say(done=True)
    ranks.lines[0].say(failed="no room", exit_code=3, what="writing")
    assert ranks.hear(1) == {"where": True}
    assert ranks.hear_ending(1)["exit_code"] == 3


def test_errors_at_the_same_step_are_one_ending(ranks: _Ranks) -> None:
    for rank in (1, 0):
        ranks.lines[rank].say(failed="not finite", exit_code=5, what="station 7")
    assert ranks.hear(0) == {"where": True}
    assert ranks.hear_ending(0)["speakers"] == [0]


def test_contact_that_was_lost_waits_for_the_cause(ranks: _Ranks) -> None:
    """gloo notices a closed connection a moment before the roll does."""
    ranks.lines[0].say(lost="RuntimeError: closed by peer")
    ranks.answer(0, 7)
    ranks.lines[1].close()
    assert "rank 1 is gone" in ranks.hear_ending(0)["text"]


def test_contact_that_was_lost_without_a_cause_is_told_too(ranks: _Ranks) -> None:
    ranks.lines[0].say(lost="RuntimeError: closed by peer")
    ranks.answer(0, 7)
    ranks.answer(1, 7)
    assert "rank 0 is cut off from another: RuntimeError" in ranks.hear_ending(0)["text"]


def test_a_rank_that_comes_late_is_asked_too(ranks: _Ranks) -> None:
    """It was told to be silent, although nobody had asked it."""
    server = socket.create_server(("127.0.0.1", 0))
    roll = MonitorServer(server, TOKEN, 2, GRACE_SECONDS)
    roll.start()
    ranks.address = server.getsockname()
    ranks.lines += [ranks.line(rank=0, token=TOKEN)]
    ranks.lines[2].say(overdue=30.0)
    ranks.answer(2, 7)
    ranks.lines += [ranks.line(rank=1, token=TOKEN)]
    ranks.answer(3, 7)
    assert ranks.hear(3) == {"patience": True}
    for line in ranks.lines[2:]:
        line.close()
    roll.join(5)


def test_strangers_are_not_listened_to(ranks: _Ranks) -> None:
    stranger = ranks.line(rank=1, token="guessed")
    with pytest.raises(EOFError):
        stranger.heard_within(5)
    browser = socket.create_connection(ranks.address)
    browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert browser.recv(1) == b""
    unnamed = ranks.line(failed="everything", exit_code=1, what="")
    for line in ranks.lines:
        line.say(done=True)
    assert [ranks.hear(rank) for rank in range(2)] == [{"end": True}] * 2
    for connection in (stranger, browser, unnamed):
        connection.close()
