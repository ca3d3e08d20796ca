"""JSON messages between two processes over TCP, independent of torch's own communication.

Nothing is sent while all is well.  When a process dies, its kernel closes the connection, so that
the peer notices at once, whatever the backend of the gradients does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from typing import Any, TypeAlias

__all__ = ["JsonConnection", "Message"]

Message: TypeAlias = dict[str, Any]

_SEND_TIMEOUT_SECONDS = 5
# A host that loses its power closes no connection; after these probes it counts as closed.
_SECONDS_BEFORE_PROBES, _SECONDS_BETWEEN_PROBES, _NUM_PROBES = 10, 5, 4


class JsonConnection:
    """JSON objects, one per line, over a connected socket.

    Args:
        connection: the connected TCP socket; owned by this object.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_TIMEOUT_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SECONDS_BEFORE_PROBES),
            ("TCP_KEEPINTVL", _SECONDS_BETWEEN_PROBES),
            ("TCP_KEEPCNT", _NUM_PROBES),
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # A data loader process would keep it open for seconds after its rank was killed.
        os.register_at_fork(after_in_child=connection.close)
        self._connection = connection
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._incomplete = b""

    def fileno(self) -> int:
        """The socket's file descriptor, for ``select``."""
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send an object; errors are ignored, since ``receive`` reports a closed connection."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """Wait for data and return the objects completed by it; none if it ends within an object.

        Raises:
            EOFError: the peer has closed the connection, or does not send JSON.
        """
        try:
            data = self._connection.recv(65536)
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        try:
            objects = [json.loads(line) for line in lines]
        except ValueError as error:  # a port scanner, for example
            raise EOFError from error
        return [message for message in objects if isinstance(message, dict)]

    def receive_within(self, seconds: float) -> list[Message]:
        """Like ``receive``, but return an empty list if no data arrives within ``seconds``.

        Raises:
            EOFError: the peer has closed the connection, or does not send JSON.
        """
        return self.receive() if self._readable.poll(1000 * max(0.0, seconds)) else []

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()
