"""Authentication: a rank and the monitor prove to one another that they know the run's secret.

Whoever can reach the monitor's port could otherwise end the run, or take the place of a rank.  The
secret does not cross the connection:

1. the monitor sends ``monitor_nonce``;
2. the rank answers with ``rank``, ``rank_nonce`` and ``proof``;
3. the monitor answers with its own ``proof``.

A proof is an HMAC-SHA256 over the prover's role, the rank and both nonces, which are random and new
for each connection.  So a proof that was overheard is of no use on another connection or in the
other role.  The messages that follow are neither encrypted nor signed, just like the gradients.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time

from .connection import MAX_MESSAGE_BYTES, JsonConnection, Message

__all__ = [
    "MAX_HANDSHAKE_MESSAGE_BYTES",
    "authenticate_to_monitor",
    "confirmation",
    "new_answer",
    "new_challenge",
    "new_secret",
    "verified_rank",
]

MAX_HANDSHAKE_MESSAGE_BYTES = 512
"""Length of the longest message that is received from a peer before it has proved itself; more than
twice that of any message above."""
_NONCE_BYTES, _SECRET_BYTES = 16, 32


def new_secret() -> bytes:
    """A random secret for one run."""
    return secrets.token_bytes(_SECRET_BYTES)


# ---- the monitor's side --------------------------------------------------------------------------


def new_challenge() -> Message:
    """The message with which the monitor receives a new connection."""
    return {"monitor_nonce": secrets.token_hex(_NONCE_BYTES)}


def verified_rank(secret: bytes, challenge: Message, answer: Message) -> int | None:
    """The rank that has given this answer; None if the answer does not prove it.

    Args:
        secret: the run's secret.
        challenge: the monitor's ``new_challenge`` on the same connection.
        answer: the peer's answer, which may be anything.
    """
    rank = answer.get("rank")
    if type(rank) is not int or not isinstance(answer.get("rank_nonce"), str):
        return None
    expected = _proof(secret, "rank", challenge, answer)
    return rank if _is_equal(answer.get("proof"), expected) else None


def confirmation(secret: bytes, challenge: Message, answer: Message) -> Message:
    """The message by which the monitor proves itself to a rank, in reply to its answer."""
    return {"proof": _proof(secret, "monitor", challenge, answer)}


# ---- the rank's side -----------------------------------------------------------------------------


def new_answer(secret: bytes, challenge: Message, rank: int) -> Message:
    """The message by which a rank proves itself to the monitor, in reply to its challenge."""
    answer: Message = {"rank": rank, "rank_nonce": secrets.token_hex(_NONCE_BYTES)}
    return {**answer, "proof": _proof(secret, "rank", challenge, answer)}


def authenticate_to_monitor(
    connection: JsonConnection, secret: bytes, rank: int, seconds: float
) -> None:
    """Prove this rank to the monitor, and let the monitor prove itself.

    Args:
        connection: a new connection to the monitor.
        secret: the run's secret.
        rank: this process's rank.
        seconds: limit on the wait for the monitor.

    Raises:
        EOFError: the peer has refused this rank, or is not the monitor of this run.
        TimeoutError: the peer did not answer in time.
    """
    deadline = time.monotonic() + seconds
    connection.max_message_bytes = MAX_HANDSHAKE_MESSAGE_BYTES
    challenge = _receive_until(deadline, connection)
    answer = new_answer(secret, challenge, rank)
    connection.send(**answer)
    expected = confirmation(secret, challenge, answer)
    if not _is_equal(_receive_until(deadline, connection).get("proof"), expected["proof"]):
        raise EOFError("it is not the monitor of this run")
    connection.max_message_bytes = MAX_MESSAGE_BYTES


def _receive_until(deadline: float, connection: JsonConnection) -> Message:
    while (seconds := deadline - time.monotonic()) > 0:
        try:
            message = connection.receive_within(seconds)
        except EOFError as error:
            raise EOFError("it is not the monitor of this run, or that has ended") from error
        if message is not None:
            return message
    raise TimeoutError("no answer in time")


# ---- both sides ----------------------------------------------------------------------------------


def _proof(secret: bytes, prover: str, challenge: Message, answer: Message) -> str:
    # As JSON, in which no two lists look alike whatever the peer has sent.
    proved = [prover, answer.get("rank"), challenge.get("monitor_nonce"), answer.get("rank_nonce")]
    return hmac.new(secret, json.dumps(proved).encode(), "sha256").hexdigest()


def _is_equal(proof: object, expected: str) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(
        proof.encode(errors="replace"), expected.encode()
    )
