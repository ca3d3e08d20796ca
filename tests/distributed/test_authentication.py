"""A rank and its monitor know one another, and nobody else can pretend to be one of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from worm_dist.distributed.authentication import (
    MAX_HANDSHAKE_MESSAGE_BYTES,
    authenticate_to_monitor,
    confirmation,
    new_answer,
    new_challenge,
    new_secret,
    verified_rank,
)
from worm_dist.distributed.connection import JsonConnection

SECRET = new_secret()
CHALLENGE = new_challenge()
ANSWER = new_answer(SECRET, CHALLENGE, 3)


def test_a_rank_that_knows_the_secret_is_known() -> None:
    assert verified_rank(SECRET, CHALLENGE, ANSWER) == 3


def test_the_secret_is_not_sent() -> None:
    sent = json.dumps([CHALLENGE, ANSWER, confirmation(SECRET, CHALLENGE, ANSWER)])
    assert SECRET.hex() not in sent
    assert 2 * max(map(len, map(json.dumps, [CHALLENGE, ANSWER]))) < MAX_HANDSHAKE_MESSAGE_BYTES


@pytest.mark.parametrize(
    "answer",
    [
        new_answer(new_secret(), CHALLENGE, 3),
        new_answer(SECRET, new_challenge(), 3),  # heard on another connection
        {**ANSWER, "rank": 2},
        {**ANSWER, "rank_nonce": "00"},
        {**ANSWER, **confirmation(SECRET, CHALLENGE, ANSWER)},  # heard from the monitor
        {"rank": 3, "rank_nonce": ANSWER["rank_nonce"]},
        {"failed": "everything", "exit_code": 1, "what": ""},
        {},
    ],
)
def test_nobody_else_is(answer: dict[str, Any]) -> None:
    assert verified_rank(SECRET, CHALLENGE, answer) is None


@pytest.mark.parametrize("proof", [None, 0, "", "\xe4", "\ud800", [ANSWER["proof"]]])
def test_a_proof_may_be_anything(proof: object) -> None:
    assert verified_rank(SECRET, CHALLENGE, {**ANSWER, "proof": proof}) is None


@pytest.mark.parametrize("rank", [True, 3.0, "3", None, [3]])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    """Even of somebody who knows the secret."""
    answer = new_answer(SECRET, CHALLENGE, rank)
    assert verified_rank(SECRET, CHALLENGE, answer) is None


@pytest.fixture
def monitor() -> Iterator[socket.socket]:
    """What a rank has connected to: it sends what a test says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def _authenticate(server: socket.socket, seconds: float, *messages: dict[str, Any]) -> None:
    """A rank's side; the other one sends these messages, and then no more."""
    connection = JsonConnection(socket.create_connection(server.getsockname()))
    accepted, _ = server.accept()
    with accepted:
        for message in messages:
            accepted.sendall(json.dumps(message).encode() + b"\n")
        if messages:
            accepted.shutdown(socket.SHUT_WR)
        try:
            authenticate_to_monitor(connection, SECRET, 3, seconds)
        finally:
            connection.close()


def test_a_rank_does_not_believe_another_program(monitor: socket.socket) -> None:
    wrong = confirmation(new_secret(), CHALLENGE, ANSWER)
    with pytest.raises(EOFError, match="not the monitor of this run"):
        _authenticate(monitor, 5, CHALLENGE, wrong)


def test_a_rank_that_is_refused_is_told(monitor: socket.socket) -> None:
    with pytest.raises(EOFError, match="not the monitor of this run, or that has ended"):
        _authenticate(monitor, 5, CHALLENGE)


def test_a_rank_does_not_wait_forever(monitor: socket.socket) -> None:
    with pytest.raises(TimeoutError, match="no answer in time"):
        _authenticate(monitor, 0.05)
