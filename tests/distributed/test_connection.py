"""Messages over a socket, from a peer that may send anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TypeAlias

import pytest

from worm_dist.distributed.connection import JsonConnection, Message

Pair: TypeAlias = tuple[socket.socket, JsonConnection]
MOST = 20


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A peer, and the connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        connection = JsonConnection(server.accept()[0], MOST)
        with peer:
            yield peer, connection
        connection.close()


def _receive_all(connection: JsonConnection) -> Iterator[Message]:
    while True:
        message = connection.receive_within(5)
        if message is not None:
            yield message


def test_messages_come_one_by_one(pair: Pair) -> None:
    """However the kernel cuts what was sent."""
    peer, connection = pair
    peer.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
    assert connection.receive_within(5) == {"a": 1}
    assert connection.receive_within(5) == {"b": 2}
    assert connection.receive_within(5) is None  # what there is of the third one
    assert connection.receive_within(0) is None
    peer.sendall(b": 3}\n")
    assert connection.receive_within(5) == {"c": 3}


def test_a_message_may_be_as_long_as_agreed(pair: Pair) -> None:
    peer, connection = pair
    peer.sendall(b'{"a":1}'.ljust(MOST) + b"\n")
    assert connection.receive_within(5) == {"a": 1}


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_longer_one_is_not_read(end: bytes, pair: Pair) -> None:
    peer, connection = pair
    peer.sendall(b'{"a":1}'.ljust(MOST + 1) + end + 1000 * b"x")
    with pytest.raises(EOFError):
        connection.receive_within(5)
    assert len(connection._incomplete) == MOST + 1


@pytest.mark.parametrize(
    "line", [b"", b"GET / HTTP/1.1", b"[]", b"1", b"\xff", 20_000 * b"[", 5_000 * b"1"]
)
def test_what_is_no_message_ends_the_connection(line: bytes, pair: Pair) -> None:
    peer, connection = pair
    connection.max_message_bytes = 20_000
    peer.sendall(line + b"\n")
    with pytest.raises(EOFError):
        list(_receive_all(connection))


def test_a_peer_that_has_gone_is_noticed(pair: Pair) -> None:
    peer, connection = pair
    peer.sendall(b'{"a": 1}\n')
    peer.close()
    assert connection.receive_within(5) == {"a": 1}
    with pytest.raises(EOFError):
        connection.receive_within(5)
