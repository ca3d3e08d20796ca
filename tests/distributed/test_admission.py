"""Who comes to the monitor's port, and who is let in.  All in one thread."""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import time
from collections.abc import Iterator

import pytest

from worm_dist.distributed import admission
from worm_dist.distributed.admission import Admission
from worm_dist.distributed.authentication import MAX_HANDSHAKE_MESSAGE_BYTES, new_answer
from worm_dist.distributed.connection import JsonConnection, Message

SECRET = b"secret"


class _Guest:
    """Who comes to the port."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.connection = JsonConnection(self.socket)

    def hears(self) -> Message:
        message = self.connection.receive_within(5)
        assert message is not None
        return message

    def is_sent_away(self) -> bool:
        """Now, or in a moment; it may have heard something before."""
        try:
            while True:
                self.hears()
        except EOFError:
            return True


class _Door:
    """The admission of two ranks, and those who come to it."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.address = server.getsockname()
        self.selector = selectors.DefaultSelector()
        self.admission = Admission(server, SECRET, 2, self.selector)
        self.admitted: dict[int, JsonConnection] = {}
        self.guests: list[_Guest] = []

    def serve(self) -> None:
        """Wait until somebody does something, and react to it."""
        ready = self.selector.select(5)
        assert len(ready) == 1
        admitted = self.admission.serve(ready[0][0].fileobj)
        if admitted is not None:
            rank, connection = admitted
            self.admitted[rank] = connection
            self.selector.unregister(connection)

    def guest(self) -> _Guest:
        """Somebody who is let wait, if anybody is."""
        guest = _Guest(self.address)
        self.guests.append(guest)
        return guest

    def newcomer(self) -> _Guest:
        guest = self.guest()
        self.serve()
        return guest

    def identify(self, guest: _Guest, rank: int, secret: bytes = SECRET) -> None:
        """A guest who may know the secret, and says that he is this rank."""
        guest.connection.send(**new_answer(secret, guest.hears(), rank))
        self.serve()

    def is_admitted(self, guest: _Guest, rank: int) -> bool:
        """And there still."""
        self.admitted[rank].send(spoken_to=rank)
        return set(guest.hears()) == {"proof"} and guest.hears() == {"spoken_to": rank}

    def close(self) -> None:
        self.admission.close()
        for connection in self.admitted.values():
            connection.close()
        for guest in self.guests:
            guest.connection.close()
        self.selector.close()


@pytest.fixture
def door() -> Iterator[_Door]:
    door = _Door()
    yield door
    door.close()


def test_a_rank_is_let_in(door: _Door) -> None:
    rank = door.newcomer()
    assert 0 < (door.admission.seconds_to_deadline or 0) <= admission._SECONDS_TO_IDENTIFY
    door.identify(rank, 1)
    assert door.is_admitted(rank, 1)
    assert door.admission.seconds_to_deadline is None


def test_an_answer_may_come_in_pieces(door: _Door) -> None:
    rank = door.newcomer()
    answer = json.dumps(new_answer(SECRET, rank.hears(), 0)).encode() + b"\n"
    for piece in (answer[:10], answer[10:]):
        assert not door.admitted
        rank.socket.sendall(piece)
        door.serve()
    assert door.is_admitted(rank, 0)


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_who_does_not_know_the_secret_is_refused(door: _Door) -> None:
    stranger = door.newcomer()
    door.identify(stranger, 1, b"guessed")
    assert stranger.is_sent_away()
    assert not door.admitted


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_who_speaks_another_language_is_refused(door: _Door) -> None:
    browser = door.newcomer()
    browser.socket.sendall(b"GET / HTTP/1.1\r\n")
    door.serve()
    assert browser.is_sent_away()


@pytest.mark.parametrize("number", [-1, 2, 10**30])
def test_a_rank_outside_of_the_world_is_refused(door: _Door, number: int) -> None:
    """The monitor believed the number, and failed at the first message."""
    rank = door.newcomer()
    door.identify(rank, number)
    assert rank.is_sent_away()
    assert not door.admitted


def test_a_rank_that_is_there_does_not_come_again(door: _Door) -> None:
    """The second one took the place of the first, whose end was not noticed any more."""
    first, second = door.newcomer(), door.newcomer()
    door.identify(first, 1)
    door.identify(second, 1)
    assert second.is_sent_away()
    assert door.is_admitted(first, 1)


def test_a_rank_that_has_gone_does_not_come_back(door: _Door) -> None:
    first, second = door.newcomer(), door.newcomer()
    door.identify(first, 1)
    door.admitted.pop(1).close()
    door.identify(second, 1)
    assert second.is_sent_away()


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_who_is_silent_is_sent_away(door: _Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_SECONDS_TO_IDENTIFY", 0)
    strangers = [door.newcomer(), door.newcomer()]
    assert door.admission.seconds_to_deadline == 0
    door.admission.meet_deadlines()
    assert all(stranger.is_sent_away() for stranger in strangers)
    assert door.admission.seconds_to_deadline is None


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_not_much_is_read_of_who_talks(door: _Door) -> None:
    stranger = door.newcomer()
    stranger.socket.sendall(MAX_HANDSHAKE_MESSAGE_BYTES * b"x")
    door.serve()
    assert door.admission.seconds_to_deadline is not None
    stranger.socket.sendall(b"x")
    door.serve()
    assert door.admission.seconds_to_deadline is None
    assert stranger.is_sent_away()


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_only_so_many_are_let_wait(door: _Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port scanner could have used up the file descriptors.  A rank behind strangers has its turn
    when one of them has gone."""
    monkeypatch.setattr(admission, "_MAX_NEWCOMERS", 2)
    strangers = [door.newcomer(), door.newcomer()]
    rank = door.guest()
    assert door.selector.select(0) == []
    strangers[0].connection.close()
    door.serve()
    door.serve()
    door.identify(rank, 0)
    assert door.is_admitted(rank, 0)


@pytest.mark.fault(35, "strangers at the port, one after the other")
def test_when_all_are_there_nobody_else_can_come(door: _Door) -> None:
    stranger = door.newcomer()
    ranks = [door.newcomer(), door.newcomer()]
    for number, rank in enumerate(ranks):
        door.identify(rank, number)
    assert stranger.is_sent_away()
    assert all(door.is_admitted(rank, number) for number, rank in enumerate(ranks))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(door.address)


@pytest.mark.fault(36, "accepting fails: nothing spins, and whoever waits is let in later")
def test_without_file_descriptors_nothing_spins(door: _Door) -> None:
    """The selector reported the port again and again, to a thread that could not accept."""
    rank = door.guest()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest_free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno(), hard))
    try:
        door.serve()
        assert door.selector.select(0) == []
        assert 0 < (door.admission.seconds_to_deadline or 0) <= 0.5
        door.admission.meet_deadlines()
        assert door.selector.select(0) == [], "it is too early"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    time.sleep(door.admission.seconds_to_deadline or 0)
    door.admission.meet_deadlines()
    assert door.admission.seconds_to_deadline is None
    door.serve()
    door.identify(rank, 1)
    assert door.is_admitted(rank, 1)
