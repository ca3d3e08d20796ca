"""JSON messages between two processes over TCP, independent of torch's own communication.

When a process dies, its kernel closes the connection, so that the peer notices at once, whatever
the backend of the gradients does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import weakref
from typing import Any, TypeAlias

__all__ = ["MAX_MESSAGE_BYTES", "JsonConnection", "Message"]

Message: TypeAlias = dict[str, Any]

MAX_MESSAGE_BYTES = 2**20
"""Length of the longest message that is received.  Most have less than a kilobyte; the longest one
is a failure report that lists ranks, up to some hundred thousand of them."""
_MAX_BYTES_AT_ONCE = 2**16
_SEND_TIMEOUT_SECONDS = 5
# A host that loses power does not close its connections.  They count as closed when it has answered
# none of these probes.
_SECONDS_BEFORE_PROBES, _SECONDS_BETWEEN_PROBES, _NUM_PROBES = 10, 5, 4


class JsonConnection:
    """JSON objects, one per line, over a connected socket.

    Args:
        connection: the connected TCP socket; owned by this object.
        max_message_bytes: length of the longest message to receive.

    Attributes:
        max_message_bytes: as above; may be changed between two messages.
    """

    def __init__(
        self, connection: socket.socket, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        connection.settimeout(_SEND_TIMEOUT_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SECONDS_BEFORE_PROBES),
            ("TCP_KEEPINTVL", _SECONDS_BETWEEN_PROBES),
            ("TCP_KEEPCNT", _NUM_PROBES),
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.max_message_bytes = max_message_bytes
        self._connection = connection
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._incomplete = b""
        _open_connections.add(self)

    def fileno(self) -> int:
        """The socket's file descriptor, for ``select``."""
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send an object; errors are ignored, since ``receive`` reports a closed connection."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """Wait for data and return the object completed by it; None if it completes none.

        Raises:
            EOFError: the peer has closed the connection, or sends something else than JSON objects
                of the permitted length.
        """
        # What follows the line stays with the kernel, so that ``select`` still reports it; and not
        # even one byte more than the longest line is kept in memory.
        most = self.max_message_bytes + len(b"\n") - len(self._incomplete)
        try:
            data = self._connection.recv(min(most, _MAX_BYTES_AT_ONCE), socket.MSG_PEEK)
            data = self._connection.recv(data.find(b"\n") + 1 or len(data))
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._incomplete += data
        if not data.endswith(b"\n"):
            if len(self._incomplete) > self.max_message_bytes:
                raise EOFError
            return None
        line, self._incomplete = self._incomplete, b""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:  # deep nesting exhausts the stack
            raise EOFError from error
        if not isinstance(message, dict):
            raise EOFError
        return message

    def receive_within(self, seconds: float) -> Message | None:
        """Like ``receive``, but return None too if no data arrives within ``seconds``.

        Raises:
            EOFError: as ``receive`` does.
        """
        return self.receive() if self._readable.poll(1000 * max(0.0, seconds)) else None

    def close(self) -> None:
        """Close the socket."""
        _open_connections.discard(self)
        self._connection.close()


_open_connections: weakref.WeakSet[JsonConnection] = weakref.WeakSet()


def _close_all() -> None:
    for connection in list(_open_connections):
        connection.close()


# Otherwise a data loader process would keep them open for seconds after its rank was killed.
os.register_at_fork(after_in_child=_close_all)
