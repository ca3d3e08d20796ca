"""Admission: accepts connections to the monitor, and keeps those of ranks.

Any program that reaches this host can connect to the port.  So until a connection has proved that
it is a rank's, only a few hundred bytes are read from it, it is closed after some seconds, and the
number of such connections is limited.  The port is closed when all ranks have connected.

A process without free file descriptors cannot accept a connection, and the selector would report it
at once again: the thread would spin, and take the interpreter from the training.  So the port is
left alone for a moment then.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from typing import NamedTuple

from .authentication import (
    MAX_HANDSHAKE_MESSAGE_BYTES,
    confirmation,
    new_challenge,
    verified_rank,
)
from .connection import MAX_MESSAGE_BYTES, JsonConnection, Message

__all__ = ["Admission"]

_SECONDS_TO_IDENTIFY = 10.0
_MAX_NEWCOMERS = 64
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SECONDS_WITHOUT_RESOURCES = 0.5


class _Newcomer(NamedTuple):
    """A connection that has not identified itself.

    Attributes:
        challenge: the challenge that it was sent.
        deadline: time at which it is closed, in seconds of ``time.monotonic``.
    """

    challenge: Message
    deadline: float


class Admission:
    """The listening socket of the monitor, and the connections that have not identified themselves.

    Args:
        server: listening socket; owned by this object.
        secret: the secret by which the ranks identify themselves.
        world_size: number of ranks.
        selector: selector with which the listening socket and new connections are registered;
            their ``data`` is None.
    """

    def __init__(
        self,
        server: socket.socket,
        secret: bytes,
        world_size: int,
        selector: selectors.BaseSelector,
    ) -> None:
        server.setblocking(False)  # a peer that is gone again must not make ``accept`` wait
        self._server = server
        self._secret = secret
        self._expected = set(range(world_size))
        self._selector = selector
        self._newcomers: dict[JsonConnection, _Newcomer] = {}
        self._is_listening = False
        self._listens_again_at: float | None = None
        self._listen()

    @property
    def seconds_to_deadline(self) -> float | None:
        """Time until ``meet_deadlines`` has something to do; None if it never has."""
        # The first newcomer has the earliest deadline.
        deadlines = [newcomer.deadline for newcomer in list(self._newcomers.values())[:1]]
        if self._listens_again_at is not None:
            deadlines.append(self._listens_again_at)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def serve(self, ready: object) -> tuple[int, JsonConnection] | None:
        """Handle a socket of this object that the selector has reported.

        Args:
            ready: the ``fileobj`` that was registered.

        Returns:
            A rank and its connection, if it has identified itself just now; from then on the
            connection is owned by the caller, and is still registered.  Otherwise None.
        """
        if ready is self._server:
            self._accept()
        elif ready in self._newcomers:  # may have been closed since the selector reported it
            assert isinstance(ready, JsonConnection)
            return self._identify(ready)
        return None

    def meet_deadlines(self) -> None:
        """Close the connections that have not identified themselves in time; listen again after a
        pause."""
        now = time.monotonic()
        for connection, newcomer in list(self._newcomers.items()):
            if newcomer.deadline <= now:
                self._refuse(connection)
        if self._listens_again_at is not None and self._listens_again_at <= now:
            self._listen()

    def close(self) -> None:
        """Close the listening socket, and all connections that have not identified themselves."""
        for connection in list(self._newcomers):
            self._refuse(connection)
        self._pause()
        self._listens_again_at = None
        self._server.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._server.accept()
        except OSError as error:  # mostly: the peer is gone again
            if error.errno in _OUT_OF_RESOURCES:
                self._pause()
                self._listens_again_at = time.monotonic() + _SECONDS_WITHOUT_RESOURCES
            return
        try:
            connection = JsonConnection(accepted, MAX_HANDSHAKE_MESSAGE_BYTES)
        except OSError:  # on some systems, for the same reason
            accepted.close()
            return
        newcomer = _Newcomer(new_challenge(), time.monotonic() + _SECONDS_TO_IDENTIFY)
        self._newcomers[connection] = newcomer
        self._selector.register(connection, selectors.EVENT_READ)
        connection.send(**newcomer.challenge)
        # Further connections wait in the kernel, where they take no file descriptor.  A rank among
        # them is accepted after others have identified themselves or been closed.
        if len(self._newcomers) >= _MAX_NEWCOMERS:
            self._pause()

    def _identify(self, connection: JsonConnection) -> tuple[int, JsonConnection] | None:
        challenge = self._newcomers[connection].challenge
        try:
            answer = connection.receive()
        except EOFError:
            self._refuse(connection)
            return None
        if answer is None:
            return None
        rank = verified_rank(self._secret, challenge, answer)
        # A rank connects once: the run ends when its connection does.
        if rank is None or rank not in self._expected:
            self._refuse(connection)
            return None
        self._expected.remove(rank)
        self._forget(connection)
        connection.max_message_bytes = MAX_MESSAGE_BYTES
        connection.send(**confirmation(self._secret, challenge, answer))
        if not self._expected:
            self.close()
        return rank, connection

    def _refuse(self, connection: JsonConnection) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._forget(connection)

    def _forget(self, connection: JsonConnection) -> None:
        del self._newcomers[connection]
        self._listen()

    def _listen(self) -> None:
        self._listens_again_at = None
        if not self._is_listening:
            self._selector.register(self._server, selectors.EVENT_READ)
            self._is_listening = True

    def _pause(self) -> None:
        if self._is_listening:
            self._selector.unregister(self._server)
            self._is_listening = False
